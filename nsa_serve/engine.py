"""The synchronous core: a scheduler and a model runner, one step at a time."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from functools import partial

import torch

from nsa_serve.cache_reads import CacheReads, ReadCosts, step_reads
from nsa_serve.config import EngineConfig, ModelConfig, num_usable_cpus
from nsa_serve.errors import CapacityError, ConfigError, ModelError, NSAServeError, RequestError
from nsa_serve.kv_cache import KVCache, bytes_per_page, components, num_pages_for
from nsa_serve.memory import available_bytes
from nsa_serve.messages import EngineInfo, EngineStats, LoadProgress, TraceGeometry
from nsa_serve.model_runner import ModelRunner
from nsa_serve.model_source import load_tokenizer, resolve_model
from nsa_serve.models.families import load_model_config
from nsa_serve.models.layers import cpu_has_bfloat16
from nsa_serve.models.nsa_transformer import NSATransformer, used_branches
from nsa_serve.models.weights import expected_weights, load_weights
from nsa_serve.page_pool import PagePool
from nsa_serve.request import EngineRequest, FinishReason, Request, SamplingParams, TokenOutput
from nsa_serve.request_check import make_refusal
from nsa_serve.sampler import Sampler, SamplingFailure
from nsa_serve.scheduler import SampledToken, Scheduler, SchedulerOutput
from nsa_serve.structured.grammar import compile_error
from nsa_serve.structured.masks import GrammarMasks, TokenMatcher
from nsa_serve.structured.matcher import GrammarError, Vocabulary, make_table
from nsa_serve.trace import check_trace

# Most grammars take less: their requests then run in the next step already.
_COMPILE_WAIT_S = 0.005
logger = logging.getLogger(__name__)

OnProgress = Callable[[LoadProgress], None]
# Of the free memory, when --page-memory does not say.
_DEFAULT_MEMORY_SHARE = 4


class Engine:
    """Loads a model and runs requests.

    Raises ModelError (the checkpoint), CapacityError (memory) or ConfigError (settings).
    """

    def __init__(self, config: EngineConfig, *, on_progress: OnProgress | None = None) -> None:
        self.config = config
        phases: dict[str, float] = {}
        torch.set_num_threads(config.num_threads or num_usable_cpus())
        device = torch.device("cpu")
        with _timed(phases, "config"):
            source = resolve_model(config)
            model_config = load_model_config(source)
            dtype = run_dtype(config)
            # Before the weights are read, so that a setting that cannot work fails at once.
            limit = _model_len_limit(config, model_config)
            num_pages = size_cache(config, model_config, dtype, limit)
        with _timed(phases, "weights"):
            weights = load_weights(
                source, model_config, dtype, on_progress=_weight_progress(on_progress)
            )
            num_parameters = sum(tensor.numel() for tensor in weights.values())
        with _timed(phases, "layout"):
            model = NSATransformer(model_config, weights, max_positions=limit).eval()
        with _timed(phases, "cache"):
            cache = KVCache(model_config, num_pages, dtype=dtype, device=device)
        capacity = (num_pages - 1) * model_config.nsa.block_size
        max_model_len = min(limit, capacity)
        self.grammars = GrammarMasks(partial(_load_vocabulary, config, model_config))
        self.runner = ModelRunner(model, cache, Sampler(model_config.eos_token_ids), self.grammars)
        self.pool = PagePool(
            num_pages,
            model_config.nsa.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=max_model_len,
            policy=config.scheduling_policy,
            eos_token_ids=model_config.eos_token_ids,
        )
        # By request id.
        self._compiling: dict[str, tuple[Request, Future[TokenMatcher]]] = {}
        self._num_steps = 0
        self._num_step_tokens = 0
        self._read_costs = read_costs(model_config, dtype)
        self._decode_reads, self._prefill_reads = CacheReads(), CacheReads()
        with _timed(phases, "warm-up"):
            self._warm_up()
        self.info = EngineInfo(
            family=model_config.family,
            dtype=str(dtype).removeprefix("torch."),
            device=str(device),
            num_parameters=num_parameters,
            weight_bytes=num_parameters * dtype.itemsize,
            max_model_len=max_model_len,
            vocab_size=model_config.vocab_size,
            page_size=model_config.nsa.block_size,
            num_pages=num_pages - 1,
            cache=components(model_config, dtype, num_pages - 1),
            phase_s=phases,
            bos_token_id=model_config.bos_token_id,
            eos_token_ids=model_config.eos_token_ids,
            trace=_trace_geometry(model_config, self._read_costs, device),
        )

    @property
    def has_unfinished(self) -> bool:
        """True while any request waits or runs, or its grammar is compiled."""
        return self.scheduler.has_unfinished or bool(self._compiling)

    @property
    def stats(self) -> EngineStats:
        """Counters and gauges after the last step."""
        scheduler = self.scheduler
        return EngineStats(
            num_steps_total=self._num_steps,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_pages=self.pool.num_free_pages,
            num_pages=self.pool.num_pages,
            num_preemptions_total=scheduler.num_preemptions_total,
            prefix_cache_queries_total=scheduler.prefix_cache_queries_total,
            prefix_cache_hits_total=scheduler.prefix_cache_hits_total,
            num_step_tokens=self._num_step_tokens,
            decode_reads=self._decode_reads,
            prefill_reads=self._prefill_reads,
        )

    def add(self, request: EngineRequest) -> None:
        """Queue a request. Raises RequestError when it cannot be served.

        One with a grammar that is not compiled at once is queued by a later `step`.
        """
        if request.request_id in self._compiling:
            raise RequestError(
                f"request id {request.request_id!r} is in use; choose another", param="request_id"
            )
        if request.trace is not None:
            check_trace(request.trace, self.info)
        item = Request(request)
        if item.params.structured is None:
            self.scheduler.add(item)
            return
        matcher = self.grammars.compile(item.params.structured)
        if not self._compiling:
            wait([matcher], timeout=_COMPILE_WAIT_S)
        if matcher.done():
            self._admit(item, matcher)
        else:
            self._compiling[item.request_id] = item, matcher

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests in any state and free their pages; ids that have ended are ignored."""
        for request_id in request_ids:
            compiling = self._compiling.pop(request_id, None)
            if compiling is None:
                self.scheduler.abort(request_id)
            else:
                compiling[1].cancel()

    def step(self) -> list[TokenOutput]:
        """Run one step; return what it produced. Does nothing when there is no work."""
        refused = self._admit_compiled()
        scheduled = self.scheduler.schedule()
        self._num_step_tokens = scheduled.num_tokens
        if not scheduled.rows:
            return refused
        self._num_steps += 1
        self._decode_reads, self._prefill_reads = step_reads(scheduled, self._read_costs)
        return refused + self._finish(scheduled, self.runner.execute(scheduled))

    def _admit(self, request: Request, matcher: "Future[TokenMatcher]") -> None:
        """Queue a request whose grammar is compiled. Raises RequestError."""
        assert request.params.structured is not None
        try:
            request.matcher = matcher.result()
        except GrammarError as error:
            kind = request.params.structured.kind
            raise compile_error(kind, str(error), param="structured") from None
        self.scheduler.add(request)

    def _admit_compiled(self) -> list[TokenOutput]:
        """Queue the requests whose grammars are compiled by now; return what came of the others."""
        refused = []
        for request_id, (request, matcher) in list(self._compiling.items()):
            if not matcher.done():
                continue
            del self._compiling[request_id]
            try:
                self._admit(request, matcher)
            except NSAServeError as error:
                refused.append(make_refusal(request_id, error))
            except Exception as error:
                logger.exception("request %s could not be added", request_id)
                refused.append(make_refusal(request_id, error))
        return refused

    def _finish(
        self, scheduled: SchedulerOutput, sampled: dict[str, SampledToken | SamplingFailure]
    ) -> list[TokenOutput]:
        """Take in the tokens; a row that could not be sampled ends its own request only."""
        outputs: list[TokenOutput] = []
        tokens: dict[str, SampledToken] = {}
        for request_id, result in sampled.items():
            if isinstance(result, SamplingFailure):
                kind = RequestError.__name__ if result.is_request_fault else None
                outputs.append(self.scheduler.fail(request_id, result.message, error_kind=kind))
            else:
                tokens[request_id] = result
        return outputs + self.scheduler.update(scheduled, tokens)

    def close(self) -> None:
        """Abort what is unfinished."""
        self.abort([*self._compiling, *self.scheduler.unfinished_ids])
        self.grammars.close()

    def _warm_up(self) -> None:
        """Run one small request, so that the first real one does not pay for first-use costs."""
        length = min(4, self.scheduler.max_request_tokens - 1)
        if length < 1:
            return
        params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        self.add(EngineRequest(request_id="warm-up", prompt_token_ids=[0] * length, params=params))
        while self.has_unfinished:
            for output in self.step():
                if output.finish_reason is FinishReason.ERROR:
                    raise ConfigError(f"the model does not run: {output.error}")
        self._num_steps = 0
        self._decode_reads, self._prefill_reads = CacheReads(), CacheReads()
        self.pool.reset_prefix_cache()
        self.scheduler.prefix_cache_queries_total = 0
        self.scheduler.prefix_cache_hits_total = 0


def _load_vocabulary(config: EngineConfig, model: ModelConfig) -> Vocabulary:
    """Read the tokenizer; GrammarError when no grammar can be followed with it."""
    try:
        tokenizer = load_tokenizer(config)
    except ModelError as error:
        raise GrammarError(f"the model's tokenizer cannot be read: {error}") from None
    table = make_table(tokenizer, model.vocab_size, model.eos_token_ids)
    return Vocabulary(table, partial(tokenizer.encode, add_special_tokens=False))


@contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    phases[name] = time.perf_counter() - start


def _weight_progress(on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(LoadProgress("weights", done, total))


def run_dtype(config: EngineConfig) -> torch.dtype:
    """Return the dtype to run in: "auto" is bfloat16 where oneDNN computes in it."""
    if config.dtype == "auto":
        return torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def read_costs(model: ModelConfig, dtype: torch.dtype) -> ReadCosts:
    """Return what a query of this model costs in cache bytes."""
    branches = used_branches(model)
    num_rows = model.num_layers * model.num_kv_heads
    return ReadCosts(
        spec=model.nsa,
        key_bytes=num_rows * model.head_dim * dtype.itemsize,
        value_bytes=num_rows * model.v_head_dim * dtype.itemsize,
        uses_cmp=branches.cmp,
        uses_slc=branches.slc,
        uses_swa=branches.swa,
    )


def _trace_geometry(
    model: ModelConfig, costs: ReadCosts, device: torch.device
) -> TraceGeometry | None:
    """Return what traces need, or None where there are none: the GPU path keeps no selection."""
    if device.type != "cpu":
        return None
    return TraceGeometry(num_layers=model.num_layers, num_kv_heads=model.num_kv_heads, costs=costs)


def _model_len_limit(config: EngineConfig, model: ModelConfig) -> int:
    """Return the longest request that settings and model allow, before memory is looked at."""
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_position_embeddings:
        raise ConfigError(
            f"max_model_len is {config.max_model_len} but the model was made for "
            f"{model.max_position_embeddings} tokens (max_position_embeddings); "
            f"lower --max-model-len"
        )
    return config.max_model_len


def size_cache(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, max_model_len: int
) -> int:
    """Return the number of pages, the null page included.

    Raises CapacityError, with the numbers and a remedy, when a --max-model-len that was asked for
    does not fit.
    """
    page_size = model.nsa.block_size
    pages_per_request = -(-max_model_len // page_size)
    per_page = bytes_per_page(model, dtype)
    if config.page_memory is not None:
        num_pages = num_pages_for(model, dtype, config.page_memory)
    else:
        weight_bytes = dtype.itemsize * sum(
            math.prod(shape) for shape in expected_weights(model).values()
        )
        free = available_bytes()
        if free <= weight_bytes:
            raise CapacityError(
                f"the weights need {weight_bytes} bytes in {dtype}, but {free} bytes of memory are "
                f"free: free some, or serve a smaller model"
            )
        memory = (free - weight_bytes) // _DEFAULT_MEMORY_SHARE
        useful = config.max_num_seqs * pages_per_request + 1
        num_pages = min(num_pages_for(model, dtype, memory), useful)
    if config.max_model_len is not None and num_pages - 1 < pages_per_request:
        fits = (num_pages - 1) * page_size
        raise CapacityError(
            f"one request of max_model_len {max_model_len} needs {pages_per_request} pages of "
            f"{per_page} bytes, but the cache holds {num_pages - 1}: set --max-model-len {fits} or "
            f"less, or --page-memory {(pages_per_request + 1) * per_page} or more"
        )
    return num_pages
