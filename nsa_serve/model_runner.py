"""Runs one scheduled step on the device: tensors, forward pass, sampling."""

import torch

from nsa_serve.batch import PromptSpan, build_batch
from nsa_serve.kv_cache import KVCache
from nsa_serve.models.nsa_transformer import NSATransformer
from nsa_serve.sampler import Sampler, SamplingFailure, token_logprobs
from nsa_serve.scheduler import SampledToken, SchedulerOutput

# Rows of prompt logits held at once: 64 x 128k fp32 are 32 MiB.
_PROMPT_LOGIT_ROWS = 64


class ModelRunner:
    """A model, its cache and its sampler."""

    def __init__(self, model: NSATransformer, cache: KVCache, sampler: Sampler) -> None:
        self.model = model
        self.cache = cache
        self.sampler = sampler

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> dict[str, SampledToken | SamplingFailure]:
        """Run a step; return a token, or why there is none, for each row that samples, by id."""
        batch = build_batch(output, self.model.config.nsa)
        plan = self.model.plan(batch.attn)
        hidden = self.model(batch.input_ids, batch.attn.positions, plan, self.cache.layers)
        for span in batch.prompt_spans:
            self._score_prompt(hidden, span)
        if not batch.sampling_requests:
            return {}
        logits = self.model.logits(hidden.index_select(0, batch.sampling_rows))
        sampled = self.sampler.sample(logits, batch.sampling_requests)
        return {
            request.request_id: token
            for request, token in zip(batch.sampling_requests, sampled, strict=True)
        }

    def _score_prompt(self, hidden: torch.Tensor, span: PromptSpan) -> None:
        """Append the log-probabilities of a span's prompt tokens to its request."""
        num_top = span.request.params.prompt_logprobs or 0
        for start in range(0, len(span.targets), _PROMPT_LOGIT_ROWS):
            targets = span.targets[start : start + _PROMPT_LOGIT_ROWS]
            first = span.first_row + start
            logits = self.model.logits(hidden[first : first + len(targets)])
            span.request.prompt_logprobs += token_logprobs(logits, targets, num_top)
