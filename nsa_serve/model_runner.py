"""Runs one scheduled step on the device: tensors, forward pass, sampling."""

import msgspec
import torch

from nsa_kernels.block_trace import BlockTrace
from nsa_serve.batch import ForwardBatch, PromptSpan, build_batch
from nsa_serve.kv_cache import KVCache
from nsa_serve.models.nsa_transformer import NSATransformer
from nsa_serve.sampler import Sampler, SamplingFailure, token_logprobs
from nsa_serve.scheduler import SampledToken, SchedulerOutput
from nsa_serve.structured.masks import GrammarMasks

# Rows of prompt logits held at once: 64 x 128k fp32 are 32 MiB.
_PROMPT_LOGIT_ROWS = 64


class ModelRunner:
    """A model, its cache, its sampler, and the grammars of requests."""

    def __init__(
        self, model: NSATransformer, cache: KVCache, sampler: Sampler, grammars: GrammarMasks
    ) -> None:
        self.model = model
        self.cache = cache
        self.sampler = sampler
        self.grammars = grammars

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> dict[str, SampledToken | SamplingFailure]:
        """Run a step; return a token, or why there is none, for each row that samples, by id."""
        batch = build_batch(output, self.model.config.nsa)
        masks = self.grammars.start(batch.sampling_requests)
        trace = start_trace(batch)
        plan = self.model.plan(batch.attn, trace)
        hidden = self.model(batch.input_ids, batch.attn.positions, plan, self.cache.layers)
        for span in batch.prompt_spans:
            self._score_prompt(hidden, span)
        if not batch.sampling_requests:
            return {}
        logits = self.model.logits(hidden.index_select(0, batch.sampling_rows))
        sampled = self.sampler.sample(
            logits, batch.sampling_requests, None if masks is None else masks.result()
        )
        tokens = {
            request.request_id: token
            for request, token in zip(batch.sampling_requests, sampled, strict=True)
        }
        if trace is not None:
            _add_blocks(tokens, batch, trace)
        return tokens

    def _score_prompt(self, hidden: torch.Tensor, span: PromptSpan) -> None:
        """Append the log-probabilities of a span's prompt tokens to its request."""
        num_top = span.request.params.prompt_logprobs or 0
        for start in range(0, len(span.targets), _PROMPT_LOGIT_ROWS):
            targets = span.targets[start : start + _PROMPT_LOGIT_ROWS]
            first = span.first_row + start
            logits = self.model.logits(hidden[first : first + len(targets)])
            span.request.prompt_logprobs += token_logprobs(logits, targets, num_top)


def start_trace(batch: ForwardBatch) -> BlockTrace | None:
    """Return a recorder of the rows whose tokens are traced; None when there are none."""
    if not any(request.is_traced for request in batch.sampling_requests):
        return None
    rows = zip(batch.sampling_requests, batch.sampling_rows.tolist(), strict=True)
    return BlockTrace([row for request, row in rows if request.is_traced])


def _add_blocks(
    tokens: dict[str, SampledToken | SamplingFailure], batch: ForwardBatch, trace: BlockTrace
) -> None:
    """Put into each traced token what its query selected."""
    traced = [request for request in batch.sampling_requests if request.is_traced]
    for index, request in enumerate(traced):
        token = tokens[request.request_id]
        if isinstance(token, SampledToken) and request.trace is not None:
            layers = request.trace.layers
            blocks = trace.blocks_of(index, range(len(trace.layers)) if layers is None else layers)
            tokens[request.request_id] = msgspec.structs.replace(token, blocks=blocks)
