"""Runs scheduled steps on a GPU without waiting for them.

A step of decode rows alone replays a CUDA graph from static buffers; a step with prompt chunks is
launched kernel by kernel. Tokens stay on the device, where the next step reads them, and come to
the host while that step runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter

import torch
from torch import Tensor

from nsa_kernels.gpu.decode_inputs import decode_inputs
from nsa_kernels.gpu.plan import GpuPlan, plan_decode
from nsa_kernels.gpu.skinny import ROW_CLASSES
from nsa_kernels.metadata import AttnMetadata, build_metadata
from nsa_serve.batch import PromptSpan, build_batch
from nsa_serve.config import EngineConfig
from nsa_serve.cuda_graph import (
    GraphPool,
    GraphReport,
    least_at_least,
    measure,
    page_buckets,
    row_buckets,
)
from nsa_serve.device_sampler import DeviceSampler, PromptScores, SampleHandle
from nsa_serve.kv_cache import KVCache
from nsa_serve.models.nsa_transformer import NSATransformer
from nsa_serve.request import Request
from nsa_serve.sampler import SamplingFailure
from nsa_serve.scheduler_output import SampledToken, SchedulerOutput
from nsa_serve.step_buffers import DecodeBuffers
from nsa_serve.structured.masks import GrammarMasks

# Contexts that kernels may be compiled for begin here.
_LEAST_CONTEXT = 64
# Rows of prompt logits held at once: 64 x 128k fp32 are 32 MiB.
_PROMPT_LOGIT_ROWS = 64


@dataclass(slots=True)
class LaunchedStep:
    """A step whose forward pass is queued on the device, or done.

    needs_history: sampling must know the tokens of all earlier steps. requests, output_positions:
    the R rows that sample, in the order of logits [R, V]. num_padded_rows: those of the graph that
    ran, None for a step without one.
    """

    scheduled: SchedulerOutput
    requests: list[Request]
    output_positions: list[int]
    logits: Tensor | None
    needs_history: bool
    num_padded_rows: int | None = None
    scores: list[tuple[PromptSpan, PromptScores]] = field(default_factory=list)
    handle: SampleHandle | None = None


class GpuModelRunner:
    """A model, its cache and its sampler on one CUDA device.

    Steps are launched, sampled and read in order. Rows of decode steps are at most `max_num_seqs`,
    contexts at most `max_model_len` tokens.
    """

    def __init__(
        self,
        model: NSATransformer,
        cache: KVCache,
        grammars: GrammarMasks,
        *,
        config: EngineConfig,
        max_model_len: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        self.model = model
        self.cache = cache
        self.grammars = grammars
        self.device = model.device
        spec, shape = model.config.nsa, model.config
        self._spec = spec
        self._max_model_len = max_model_len
        self._max_num_batched_tokens = max_num_batched_tokens
        self._enforce_eager = config.enforce_eager
        self.sampler = DeviceSampler(
            eos_token_ids,
            vocab_size=shape.vocab_size,
            max_num_rows=max_num_seqs,
            device=self.device,
        )
        self._row_buckets = row_buckets(max_num_seqs)
        self._page_buckets = page_buckets(max_model_len, spec.block_size)
        self._buffers = DecodeBuffers(
            max_num_rows=max_num_seqs,
            max_num_pages=self._page_buckets[-1],
            device=self.device,
            has_swa_pages=shape.kv_per_branch,
        )
        self._logits = torch.zeros(
            max_num_seqs, shape.vocab_size, dtype=torch.float32, device=self.device
        )
        self._counters = torch.zeros(
            2, max_num_seqs * shape.num_q_heads, dtype=torch.int32, device=self.device
        )
        self._plans: dict[tuple[int, int], GpuPlan] = {}
        self._graphs = GraphPool(self.device)
        # Whose the sampler's tokens are, and by request id, which of them is its newest.
        self._sampled: list[Request] = []
        self._token_rows: dict[str, int] = {}
        # Steps that replayed a graph, and those that were launched kernel by kernel.
        self.reset_counts()

    def reset_counts(self) -> None:
        """Count steps from here on."""
        self.num_graph_replays = 0
        self.num_eager_steps = 0

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        """Queue the forward pass of a step; every step before it must have been sampled."""
        is_decode = output.num_decode_rows == len(output.rows) and all(
            row.samples for row in output.rows
        )
        return self._launch_decode(output) if is_decode else self._launch_mixed(output)

    @torch.inference_mode()
    def sample(self, step: LaunchedStep) -> None:
        """Queue the choice of the step's tokens.

        When it needs history, the tokens of earlier steps must have been given to their requests.
        """
        if step.logits is None:
            return
        future = self.grammars.start(step.requests)
        masks = None if future is None else future.result()
        step.handle = self.sampler.launch(
            step.logits, step.requests, step.output_positions, masks, run=self._run_sampler(step)
        )
        step.logits = None
        if step.requests != self._sampled:
            self._sampled = step.requests
            self._token_rows = {item.request_id: row for row, item in enumerate(step.requests)}

    @torch.inference_mode()
    def result(self, step: LaunchedStep) -> dict[str, SampledToken | SamplingFailure]:
        """Wait for a step; return a token, or why there is none, by request id."""
        for span, scores in step.scores:
            span.report(scores.result())
        if step.handle is None:
            return {}
        tokens = step.handle.result()
        return {
            request.request_id: token for request, token in zip(step.requests, tokens, strict=True)
        }

    def reset(self) -> None:
        """Forget what steps have left behind, because some are taken back."""
        self._sampled, self._token_rows = [], {}
        self._buffers.forget()
        self.sampler.forget()

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and load the kernels of prompts, whatever their length, and of mixed steps."""
        most = min(self._max_num_batched_tokens, self._max_model_len)
        short, middle = min(most, 5), min(most, 300)
        self._run_synthetic(0, [middle, short], middle)
        # A lone decode row: torch gives a step of one token other strides than one of several, and
        # those of several decode rows are seen to by `capture`.
        for num_pages in self._page_buckets:
            context = min(num_pages * self._spec.block_size, self._max_model_len)
            self._run_synthetic(1, [1, min(short, context)], context)
        self._run_synthetic(0, [most], self._max_model_len)
        # What a kernel is compiled for depends on the number of blocks, in powers of two.
        context = _LEAST_CONTEXT
        while context < self._max_model_len:
            self._run_synthetic(0, [min(short, context)], context)
            context *= 2
        # Linear layers are compiled for classes of rows; a step may end inside the last one.
        for count in sorted({min(size, most) for size in ROW_CLASSES}):
            self._run_synthetic(0, [count], count, num_logit_rows=count)
        self.sampler.warm_up(self._logits)
        torch.cuda.synchronize(self.device)

    @torch.inference_mode()
    def capture(self, on_progress: Callable[[int, int], None] | None = None) -> GraphReport:
        """Record a graph for every bucket; with eager steps enforced, only run them once."""
        buckets = [(rows, pages) for pages in self._page_buckets for rows in self._row_buckets]
        # The largest first: the others fit into its memory.
        buckets.reverse()

        def capture_all() -> int:
            self._buffers.packed.zero_()
            self._buffers.packed[3].fill_(-1)
            for done, (rows, pages) in enumerate(buckets):
                self._capture_bucket(rows, pages)
                if on_progress is not None:
                    on_progress(done + 1, len(buckets))
            for rows in self._row_buckets:
                self._capture_sampler(rows, is_greedy=True)
                self._capture_sampler(rows, is_greedy=False)
            return len(self._graphs)

        return measure(self.device, capture_all)

    def _capture_bucket(self, num_rows: int, num_pages: int) -> None:
        def run() -> None:
            self._decode_forward(num_rows, num_pages)

        if self._enforce_eager:
            run()
        else:
            self._graphs.capture((num_rows, num_pages), run)

    def _capture_sampler(self, num_rows: int, *, is_greedy: bool) -> None:
        def run() -> None:
            self.sampler.run_kernels(self._logits[:num_rows], num_rows, is_greedy=is_greedy)

        if self._enforce_eager:
            run()
        else:
            self._graphs.capture(("sampler", num_rows, is_greedy), run)

    def _run_sampler(self, step: LaunchedStep) -> Callable[[], None] | None:
        """Return how to run the sampler's kernels for a step's logits; None for the usual way."""
        if step.num_padded_rows is None or self._enforce_eager:
            return None
        key = ("sampler", step.num_padded_rows, self.sampler.is_greedy(step.requests))
        return lambda: self._graphs.replay(key)

    def _launch_decode(self, output: SchedulerOutput) -> LaunchedStep:
        ordered = self._buffers.fill(output.rows, self._token_rows)
        num_rows = least_at_least(self._row_buckets, len(ordered))
        num_pages = least_at_least(self._page_buckets, self._buffers.num_pages)
        if self._graphs.has((num_rows, num_pages)):
            self._graphs.replay((num_rows, num_pages))
            self.num_graph_replays += 1
        else:
            self._decode_forward(num_rows, num_pages)
            self.num_eager_steps += 1
        requests = [row.request for row in ordered]
        return LaunchedStep(
            scheduled=output,
            requests=requests,
            output_positions=[row.start + 1 - len(row.request.prompt_token_ids) for row in ordered],
            logits=self._logits[: len(ordered)],
            needs_history=self.sampler.needs_history(requests),
            num_padded_rows=num_rows,
        )

    def _decode_forward(self, num_rows: int, num_pages: int) -> None:
        """Everything from the packed inputs to `_logits`; what a graph holds."""
        buffers = self._buffers
        input_ids, positions = buffers.input_ids[:num_rows], buffers.positions[:num_rows]
        decode_inputs(
            buffers.packed,
            self.sampler.token_ids,
            num_rows=num_rows,
            input_ids=input_ids,
            seq_lens=buffers.seq_lens,
            positions=positions,
            page_table=buffers.page_table,
            swa_page_table=buffers.swa_page_table,
        )
        plan = self._plans.get((num_rows, num_pages))
        if plan is None:
            shape, swa_page_table = self.model.config, buffers.swa_page_table
            if swa_page_table is not None:
                swa_page_table = swa_page_table[:num_rows, :num_pages]
            plan = self._plans[num_rows, num_pages] = plan_decode(
                buffers.seq_lens[:num_rows],
                positions,
                buffers.page_table[:num_rows, :num_pages],
                self._counters,
                self._spec,
                num_q_heads=shape.num_q_heads,
                branches=self.model.branches,
                swa_page_table=swa_page_table,
            )
        hidden = self.model(input_ids, positions, plan, self.cache.layers)
        self.model.logits(hidden, out=self._logits[:num_rows])

    def _launch_mixed(self, output: SchedulerOutput) -> LaunchedStep:
        swa_pages_of = attrgetter("swa_pages") if self.model.config.kv_per_branch else None
        batch = build_batch(output, self._spec, self._buffers.pages_of, swa_pages_of)
        input_ids = self._to_device(batch.input_ids)
        if batch.pending_tokens:
            index = [position for position, _ in batch.pending_tokens]
            sources = [self._token_rows[item.request_id] for _, item in batch.pending_tokens]
            pair = self._to_device(torch.tensor((index, sources), dtype=torch.int64))
            input_ids.index_copy_(0, pair[0], self.sampler.token_ids.index_select(0, pair[1]))
        plan = self._plan(batch.attn)
        hidden = self.model(input_ids, plan.positions, plan, self.cache.layers)
        self.num_eager_steps += 1
        requests = batch.sampling_requests
        logits = None
        if requests:
            rows = self._to_device(batch.sampling_rows)
            logits = self.model.logits(hidden.index_select(0, rows))
        return LaunchedStep(
            scheduled=output,
            requests=requests,
            output_positions=batch.output_positions,
            logits=logits,
            needs_history=self.sampler.needs_history(requests),
            scores=[
                (span, scores)
                for span in batch.prompt_spans
                for scores in self._score_prompt(hidden, span)
            ],
        )

    def _plan(self, meta: AttnMetadata) -> GpuPlan:
        """Plan a step whose decode kernels are those of a bucket, which are compiled."""
        plan = self.model.plan(meta)
        assert isinstance(plan, GpuPlan), "a model on a GPU plans for it"
        num_rows = least_at_least(self._row_buckets, plan.num_decode_rows)
        num_pages = least_at_least(self._page_buckets, plan.page_table.shape[1])
        return replace(plan, decode_shape=(num_rows, num_pages))

    def _score_prompt(self, hidden: Tensor, span: PromptSpan) -> list[PromptScores]:
        """Queue the log-probabilities of a span's prompt tokens."""
        num_top = span.request.params.prompt_logprobs or 0
        scores = []
        for start in range(0, len(span.targets), _PROMPT_LOGIT_ROWS):
            targets = span.targets[start : start + _PROMPT_LOGIT_ROWS]
            first = span.first_row + start
            logits = self.model.logits(hidden[first : first + len(targets)])
            scores.append(PromptScores(logits, targets, num_top))
        return scores

    def _run_synthetic(
        self, num_decode_rows: int, query_lens: list[int], last: int, num_logit_rows: int = 1
    ) -> None:
        """Run rows that end `last` tokens into their contexts; page 1 takes all they write."""
        starts = [last - num_tokens for num_tokens in query_lens]
        num_pages = -(-last // self._spec.block_size)
        pages = [[1] * num_pages for _ in query_lens]
        meta = build_metadata(
            pages,
            starts,
            query_lens,
            self._spec,
            num_decode_rows=num_decode_rows,
            swa_pages=pages if self.model.config.kv_per_branch else None,
        )
        plan = self._plan(meta)
        input_ids = torch.zeros(sum(query_lens), dtype=torch.int64, device=self.device)
        hidden = self.model(input_ids, plan.positions, plan, self.cache.layers)
        self.model.logits(hidden[:num_logit_rows])

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)
