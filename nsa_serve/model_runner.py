"""Runs scheduled steps on the CPU: tensors, forward pass, sampling.

Nothing here happens behind the caller's back, but the three calls are those of a device that works
on its own, so that steps can be overlapped, and that be tested, without one.
"""

from concurrent.futures import Future
from dataclasses import dataclass, field
from operator import attrgetter

import msgspec
import torch
from torch import Tensor

from nsa_kernels.block_trace import BlockTrace
from nsa_serve.batch import ForwardBatch, PromptSpan, build_batch
from nsa_serve.kv_cache import KVCache
from nsa_serve.models.nsa_transformer import NSATransformer
from nsa_serve.request import Request, TokenLogprobs
from nsa_serve.sampler import Sampler, SamplingFailure, needs_history, token_logprobs
from nsa_serve.scheduler_output import SampledToken, SchedulerOutput
from nsa_serve.structured.masks import GrammarMasks, StepMasks

# Rows of prompt logits held at once: 64 x 128k fp32 are 32 MiB.
_PROMPT_LOGIT_ROWS = 64


@dataclass(slots=True)
class LaunchedStep:
    """A step whose forward pass is done.

    needs_history: a row's choice depends on a token that the step before this one samples. logits:
    [R, V] of the rows that sample, None once they are sampled or when there are none. tokens: by
    request id, once sampled.
    """

    scheduled: SchedulerOutput
    batch: ForwardBatch
    needs_history: bool
    logits: Tensor | None
    masks: "Future[StepMasks] | None"
    trace: BlockTrace | None
    scores: list[tuple[PromptSpan, list[TokenLogprobs]]]
    tokens: dict[str, SampledToken | SamplingFailure] = field(default_factory=dict)


class ModelRunner:
    """A model, its cache, its sampler, and the grammars of requests.

    Steps are launched, sampled and read in order, and each is sampled before the next is launched.
    """

    def __init__(
        self, model: NSATransformer, cache: KVCache, sampler: Sampler, grammars: GrammarMasks
    ) -> None:
        self.model = model
        self.cache = cache
        self.sampler = sampler
        self.grammars = grammars
        # Of the step sampled last, by request id: what rows with a pending token run.
        self._last_token_ids: dict[str, int] = {}

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        """Run the forward pass of a step, and the masks of its grammars beside it."""
        swa_pages_of = attrgetter("swa_pages") if self.model.config.kv_per_branch else None
        batch = build_batch(output, self.model.config.nsa, swa_pages_of=swa_pages_of)
        for index, request in batch.pending_tokens:
            batch.input_ids[index] = self._last_token_ids[request.request_id]
        is_waiting = any(
            row.has_pending_token and row.samples and needs_history(row.request)
            for row in output.rows
        )
        masks = None if is_waiting else self.grammars.start(batch.sampling_requests)
        trace = start_trace(batch)
        plan = self.model.plan(batch.attn, trace)
        hidden = self.model(batch.input_ids, batch.attn.positions, plan, self.cache.layers)
        scores = [(span, self._score_prompt(hidden, span)) for span in batch.prompt_spans]
        logits = None
        if batch.sampling_requests:
            logits = self.model.logits(hidden.index_select(0, batch.sampling_rows))
        return LaunchedStep(output, batch, is_waiting, logits, masks, trace, scores)

    @torch.inference_mode()
    def sample(self, step: LaunchedStep) -> None:
        """Choose the step's tokens.

        When it needs history, the tokens of earlier steps must have been given to their requests.
        """
        batch, logits = step.batch, step.logits
        if logits is None:
            self._last_token_ids = {}
            return
        requests = batch.sampling_requests
        masks = self.grammars.start(requests) if step.needs_history else step.masks
        sampled = self.sampler.sample(
            logits,
            requests,
            None if masks is None else masks.result(),
            output_positions=batch.output_positions,
        )
        step.logits = None
        step.tokens = {
            request.request_id: token for request, token in zip(requests, sampled, strict=True)
        }
        # A row behind one that failed is stale; any token will do for it.
        self._last_token_ids = {
            name: token.token_id if isinstance(token, SampledToken) else 0
            for name, token in step.tokens.items()
        }
        if step.trace is not None:
            _add_blocks(step.tokens, batch, step.trace)

    def result(self, step: LaunchedStep) -> dict[str, SampledToken | SamplingFailure]:
        """Return a token, or why there is none, for each row that samples, by request id.

        Gives the requests of prompt chunks their prompt log-probabilities.
        """
        for span, entries in step.scores:
            span.report(entries)
        return step.tokens

    def reset(self) -> None:
        """Forget what steps have left behind, because some are taken back."""
        self._last_token_ids = {}

    def _score_prompt(self, hidden: Tensor, span: PromptSpan) -> list[TokenLogprobs]:
        """Return the log-probabilities of a span's prompt tokens."""
        num_top = span.request.params.prompt_logprobs or 0
        entries: list[TokenLogprobs] = []
        for start in range(0, len(span.targets), _PROMPT_LOGIT_ROWS):
            targets = span.targets[start : start + _PROMPT_LOGIT_ROWS]
            first = span.first_row + start
            logits = self.model.logits(hidden[first : first + len(targets)])
            entries += token_logprobs(logits, targets, num_top)
        return entries


def start_trace(batch: ForwardBatch) -> BlockTrace | None:
    """Return a recorder of the rows whose tokens are traced; None when there are none."""
    traced = _traced(batch)
    if not traced:
        return None
    rows = batch.sampling_rows.tolist()
    return BlockTrace([rows[index] for index, _ in traced])


def _traced(batch: ForwardBatch) -> list[tuple[int, Request]]:
    """Return (index among the rows that sample, request) of the tokens to trace."""
    return [
        (index, request)
        for index, request in enumerate(batch.sampling_requests)
        if request.trace is not None and batch.output_positions[index] < request.trace.max_tokens
    ]


def _add_blocks(
    tokens: dict[str, SampledToken | SamplingFailure], batch: ForwardBatch, trace: BlockTrace
) -> None:
    """Put into each traced token what its query selected."""
    for index, (_, request) in enumerate(_traced(batch)):
        token = tokens[request.request_id]
        if isinstance(token, SampledToken) and request.trace is not None:
            layers = request.trace.layers
            blocks = trace.blocks_of(index, range(len(trace.layers)) if layers is None else layers)
            tokens[request.request_id] = msgspec.structs.replace(token, blocks=blocks)
