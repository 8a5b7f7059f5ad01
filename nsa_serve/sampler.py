"""Choose the next token of every row of a step.

The order is vLLM's: reported log-probabilities are of the model's own distribution; then excluded
tokens, logit bias, the penalties; greedy rows take the likeliest token; the others are scaled by
the temperature, cut by min_p, top_k and top_p, and drawn.

A draw is a function of the row's logits, its request's seed and its position alone, so that a
request gets the same tokens whatever batch it runs in. It goes through the tokens in the order of
their ids: in the order of weight, the rounding by which batches differ would swap near ties and
change the draw.

Shapes: R rows, V vocabulary.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from nsa_serve.exclusions import Exclusions
from nsa_serve.logprobs import token_logprobs
from nsa_serve.penalties import Penalties, has_penalties
from nsa_serve.request import Request, SamplingParams, TokenLogprobs
from nsa_serve.row_search import draw_by_index, first_argmax
from nsa_serve.sampling_cut import cut_weights, is_cut
from nsa_serve.scheduler_output import SampledToken
from nsa_serve.structured.masks import StepMasks

__all__ = ["Sampler", "SamplingFailure", "needs_history", "token_logprobs", "uniform"]


@dataclass(frozen=True, slots=True)
class SamplingFailure:
    """No token could be chosen for a row; `message` says why. It ends that request alone.

    is_request_fault: what the request asked for left no token.
    """

    message: str
    is_request_fault: bool = False


class Sampler:
    """Turns logits into tokens.

    eos_token_ids: what `min_tokens` holds back besides a request's own stop_token_ids.
    """

    def __init__(self, eos_token_ids: Sequence[int] = ()) -> None:
        self._exclusions = Exclusions(eos_token_ids)
        self._penalties = Penalties()

    def sample(
        self,
        logits: Tensor,
        requests: Sequence[Request],
        masks: StepMasks | None = None,
        *,
        output_positions: Sequence[int] | None = None,
    ) -> list[SampledToken | SamplingFailure]:
        """Return one token a row, in order.

        logits: float32 [R, V], row i for `requests[i]`; they are overwritten. masks: what grammars
        allow. output_positions: [R], which of its request's output tokens a row yields, counted
        from 0; default: the one after those that are known. A row whose largest logit is NaN or
        infinite, or whose grammar has failed, gives a `SamplingFailure`.
        """
        assert logits.dtype == torch.float32, logits.dtype
        assert logits.shape[0] == len(requests), (logits.shape, len(requests))
        if not requests:
            return []
        reported = [row for row, item in enumerate(requests) if item.params.logprobs is not None]
        raw_logits = logits[reported] if reported else None
        self._exclusions.apply(logits, requests, masks)
        self._add_bias(logits, requests)
        self._penalties.apply(logits, requests)

        failed = {} if masks is None else masks.failures
        best = first_argmax(logits)  # [R]
        peaks = logits.gather(1, best[:, None])  # [R, 1]
        token_ids = best.tolist()
        is_valid = torch.isfinite(peaks[:, 0]).tolist()
        drawn = [
            row for row, item in enumerate(requests) if is_valid[row] and not item.params.is_greedy
        ]
        if drawn:
            if output_positions is None:
                output_positions = [item.num_output_tokens for item in requests]
            uniforms = [
                uniform(requests[row].sampling_seed, output_positions[row]) for row in drawn
            ]
            params = [requests[row].params for row in drawn]
            chosen = _draw(logits, peaks, drawn, params, uniforms=uniforms)
            for row, token_id in zip(drawn, chosen, strict=True):
                token_ids[row] = token_id
        logprobs = {}
        if raw_logits is not None:
            logprobs = _chosen_logprobs(raw_logits, reported, token_ids, requests)
        return [
            SamplingFailure(failed[row].message, failed[row].is_request_fault)
            if row in failed
            else SampledToken(token_ids[row], logprobs.get(row))
            if is_valid[row]
            else failure_of(request.params, float(peaks[row, 0]))
            for row, request in enumerate(requests)
        ]

    def _add_bias(self, logits: Tensor, requests: Sequence[Request]) -> None:
        for row, request in enumerate(requests):
            bias = request.params.logit_bias
            if bias:
                ids = torch.tensor(list(bias), device=logits.device)
                logits[row, ids] += torch.tensor(
                    list(bias.values()), dtype=logits.dtype, device=logits.device
                )


def needs_history(request: Request) -> bool:
    """Return whether a choice for this request depends on its output so far.

    Its logits do not count: they come from the cache.
    """
    params = request.params
    return (
        request.matcher is not None
        or has_penalties(params)
        or bool(params.bad_words)
        or params.min_tokens > 0
    )


def _draw(
    logits: Tensor,
    peaks: Tensor,
    rows: list[int],
    params: list[SamplingParams],
    *,
    uniforms: list[float],
) -> list[int]:
    """Draw a token for each of `rows`. Overwrites the logits of those rows."""
    weights = logits
    if len(rows) < logits.shape[0]:
        weights, peaks = logits[rows], peaks[rows]
    # Below float32's smallest normal number a temperature is greedy, and must not divide by 0.
    temperature = torch.tensor([item.temperature for item in params], device=logits.device)
    temperature.clamp_min_(torch.finfo(torch.float32).tiny)
    weights.sub_(peaks).div_(temperature[:, None]).exp_()  # [rows, V], at most 1
    if any(item.min_p > 0.0 for item in params):
        min_p = torch.tensor([item.min_p for item in params], device=logits.device)
        weights.masked_fill_(weights < min_p[:, None], 0.0)
    vocab_size = logits.shape[1]
    cut = [i for i, item in enumerate(params) if is_cut(item, vocab_size)]
    if len(cut) == len(rows):
        weights = cut_weights(weights, params)
    elif cut:
        weights[cut] = cut_weights(weights[cut], [params[i] for i in cut])
    points = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
    return [int(token_id) for token_id in draw_by_index(weights, points).tolist()]


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) of a request's output position: 53 bits of BLAKE2b."""
    digest = blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _chosen_logprobs(
    raw_logits: Tensor, rows: list[int], token_ids: list[int], requests: Sequence[Request]
) -> dict[int, TokenLogprobs]:
    tops = [requests[row].params.logprobs or 0 for row in rows]
    entries = token_logprobs(raw_logits, [token_ids[row] for row in rows], tops)
    return dict(zip(rows, entries, strict=True))


def failure_of(params: SamplingParams, peak: float) -> SamplingFailure:
    """Say why a row whose largest logit is `peak`, not a finite number, has no token."""
    if peak != -torch.inf:
        return SamplingFailure(f"the model produced logits that are not finite (largest: {peak})")
    constraints = {
        "allowed_token_ids": params.allowed_token_ids,
        "bad_words": params.bad_words,
        "min_tokens": params.min_tokens,
        "structured output": params.structured,
    }
    named = [name for name, value in constraints.items() if value]
    return SamplingFailure(
        "every token was excluded: "
        + (f"loosen {', '.join(named)}" if named else "no logit is above -inf"),
        is_request_fault=bool(named),
    )
