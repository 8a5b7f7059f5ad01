"""The synchronous core: a scheduler and a model runner, one step at a time."""

import logging
from collections.abc import Iterable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import torch

from nsa_serve.config import EngineConfig, num_usable_cpus
from nsa_serve.engine_setup import (
    OnProgress,
    describe,
    load_runner,
    load_vocabulary,
    make_plan,
    read_costs,
    timed,
)
from nsa_serve.errors import ConfigError, NSAServeError, RequestError
from nsa_serve.messages import EngineStats
from nsa_serve.model_runner import ModelRunner
from nsa_serve.page_pool import PagePool
from nsa_serve.request import EngineRequest, FinishReason, Request, TokenOutput
from nsa_serve.request_check import make_refusal
from nsa_serve.scheduler import Scheduler
from nsa_serve.step_pipeline import Runner, StepPipeline
from nsa_serve.structured.grammar import compile_error
from nsa_serve.structured.masks import GrammarMasks, TokenMatcher
from nsa_serve.structured.matcher import GrammarError
from nsa_serve.trace import check_trace
from nsa_serve.warm_up import first_request, gpu_batches, grammar_request
from nsa_serve.window_pages import WindowPages, history_len

# Most grammars take less: their requests then run in the next step already.
_COMPILE_WAIT_S = 0.005
logger = logging.getLogger(__name__)


class Engine:
    """Loads a model and runs requests.

    Raises ModelError (the checkpoint), CapacityError (memory) or ConfigError (settings).
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: OnProgress | None = None,
        import_s: float | None = None,
    ) -> None:
        """Load. import_s: seconds that importing took, for the start-up report."""
        self.config = config
        phases: dict[str, float] = {} if import_s is None else {"import": import_s}
        torch.set_num_threads(config.num_threads or num_usable_cpus())
        with timed(phases, "config"):
            plan = make_plan(config)
        model, limits = plan.model, plan.limits
        self.grammars = GrammarMasks(partial(load_vocabulary, config, model))
        loaded = load_runner(plan, self.grammars, phases, on_progress=on_progress)
        self.runner = loaded.runner
        self.pool = PagePool(
            loaded.num_pages,
            model.nsa.block_size,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        windows = None
        if loaded.num_swa_pages:
            windows = WindowPages(
                PagePool(
                    loaded.num_swa_pages,
                    model.nsa.block_size,
                    enable_prefix_caching=config.enable_prefix_caching,
                ),
                history_len=history_len(model.nsa.window_size, model.nsa.cmp_len),
            )
        self.swa_pool = None if windows is None else windows.pool
        capacity = self.pool.num_pages * self.pool.page_size
        max_model_len = min(plan.max_model_len, capacity)
        self.scheduler = Scheduler(
            self.pool,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=max_model_len,
            policy=config.scheduling_policy,
            enable_chunked_prefill=config.enable_chunked_prefill,
            eos_token_ids=model.eos_token_ids,
            windows=windows,
        )
        # By request id.
        self._compiling: dict[str, tuple[Request, Future[TokenMatcher]]] = {}
        runner: Runner[Any] = self.runner
        self._pipeline = StepPipeline(
            self.scheduler,
            runner,
            read_costs(model, plan.cache_dtype),
            is_overlapped=limits.is_async,
        )
        with timed(phases, "warm-up"):
            self._warm_up(model.vocab_size)
        self.info = describe(plan, loaded, max_model_len, phases)

    @property
    def has_unfinished(self) -> bool:
        """True while any request waits or runs, or its grammar is compiled, or a step runs."""
        return self.scheduler.has_unfinished or self.has_step_in_flight or bool(self._compiling)

    @property
    def has_step_in_flight(self) -> bool:
        """True while the next call of `step` waits for a step that was launched before."""
        return self._pipeline.has_step_in_flight

    @property
    def stats(self) -> EngineStats:
        """Counters and gauges after the last step."""
        scheduler, pipeline = self.scheduler, self._pipeline
        return EngineStats(
            num_steps_total=pipeline.num_steps,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_pages=self.pool.num_free_pages,
            num_pages=self.pool.num_pages,
            num_preemptions_total=scheduler.num_preemptions_total,
            prefix_cache_queries_total=scheduler.prefix_cache_queries_total,
            prefix_cache_hits_total=scheduler.prefix_cache_hits_total,
            num_step_tokens=pipeline.num_step_tokens,
            decode_reads=pipeline.decode_reads,
            prefill_reads=pipeline.prefill_reads,
            num_graph_replays_total=self._num_graph_replays,
            num_free_swa_pages=0 if self.swa_pool is None else self.swa_pool.num_free_pages,
            num_swa_pages=0 if self.swa_pool is None else self.swa_pool.num_pages,
        )

    @property
    def _num_graph_replays(self) -> int | None:
        """Steps replayed from a graph; None where there are none, so that a 0 means trouble."""
        if isinstance(self.runner, ModelRunner) or self.config.enforce_eager:
            return None
        return self.runner.num_graph_replays

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
        """Run one step; return what it produced. Does nothing when there is no work.

        With asynchronous scheduling, what it returns is of the step that was launched by the call
        before, and the first call returns nothing.
        """
        refused = self._admit_compiled()
        return refused + self._pipeline.step()

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

    def close(self) -> None:
        """Abort what is unfinished."""
        self.abort([*self._compiling, *self.scheduler.unfinished_ids])
        self._pipeline.forget()
        self.grammars.close()

    def _warm_up(self, vocab_size: int) -> None:
        """Run what first runs are slow for, so that no user's request pays for it."""
        first = first_request(self.scheduler.max_request_tokens)
        if first is None:
            return
        self._run_all([first])
        if not isinstance(self.runner, ModelRunner):
            for batch in gpu_batches(
                max_request_tokens=self.scheduler.max_request_tokens,
                max_num_batched_tokens=self.scheduler.max_num_batched_tokens,
                vocab_size=vocab_size,
            ):
                self._run_all(batch)
            self._warm_up_grammars()
            self.runner.reset_counts()
        self._pipeline.reset_counts()
        self.scheduler.reset_prefix_cache()
        self.scheduler.num_preemptions_total = 0
        self.scheduler.prefix_cache_queries_total = 0
        self.scheduler.prefix_cache_hits_total = 0

    def _warm_up_grammars(self) -> None:
        """Build the vocabulary, and run a request with a grammar."""
        request = grammar_request()
        assert request.params.structured is not None
        try:
            self.grammars.compile(request.params.structured).result()
        except GrammarError as error:
            # The model is served all the same; a request with a grammar will be told.
            logger.warning("structured output is not available: %s", error)
            return
        self._run_all([request])

    def _run_all(self, requests: list[EngineRequest]) -> None:
        """Run requests to their ends. Raises ConfigError when one fails."""
        for request in requests:
            self.add(request)
        while self.has_unfinished:
            for output in self.step():
                if output.finish_reason is FinishReason.ERROR:
                    raise ConfigError(f"the model does not run: {output.error}")
