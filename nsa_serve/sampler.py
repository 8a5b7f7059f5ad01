"""Choose the next token of every row of a step.

The order is vLLM's: reported log-probabilities are of the model's own distribution; then logit
bias, min_tokens, the penalties; greedy rows take the likeliest token; the others are scaled by
the temperature, cut by min_p, top_k and top_p, and drawn.

A draw is a function of the row's logits, its request's seed and its position alone, so that a
request gets the same tokens whatever batch it runs in. Every sum over the vocabulary therefore
has one fixed order, whatever the number of rows and threads.

Shapes: R rows, V vocabulary, F rows that are cut by top_k or top_p, K candidates.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
from torch import Tensor

from nsa_serve.request import MAX_LOGPROBS, Request, SamplingParams, TokenLogprobs
from nsa_serve.scheduler import SampledToken

# Rows are summed and searched in two levels; 64 floats are four cache lines.
_CHUNK_SIZE = 64
_LOGPROB_ROWS = 64


@dataclass(frozen=True, slots=True)
class SamplingFailure:
    """No token could be chosen for a row; `message` says why. It ends that request alone."""

    message: str


class Sampler:
    """Turns logits into tokens.

    eos_token_ids: what `min_tokens` holds back besides a request's own stop_token_ids.
    num_candidates: how many of a row's likeliest tokens are sorted before top_k and top_p; a row
    that needs more costs a sort of all that it needs. It changes the speed, never the result.
    """

    def __init__(self, eos_token_ids: Sequence[int] = (), *, num_candidates: int = 256) -> None:
        if num_candidates < 1:
            raise ValueError(f"num_candidates must be at least 1, got {num_candidates}")
        self._eos_token_ids = tuple(eos_token_ids)
        self._num_candidates = num_candidates
        self._penalties: dict[str, _PenaltyState] = {}

    def sample(
        self, logits: Tensor, requests: Sequence[Request]
    ) -> list[SampledToken | SamplingFailure]:
        """Return one token a row, in order.

        logits: float32 [R, V], row i for `requests[i]`; they are overwritten. A row whose largest
        logit is NaN or infinite gives a `SamplingFailure`.
        """
        assert logits.dtype == torch.float32, logits.dtype
        assert logits.shape[0] == len(requests), (logits.shape, len(requests))
        if not requests:
            return []
        reported = [row for row, item in enumerate(requests) if item.params.logprobs is not None]
        raw_logits = logits[reported] if reported else None
        self._edit_logits(logits, requests)

        best = _first_argmax(logits)  # [R]
        peaks = logits.gather(1, best[:, None])  # [R, 1]
        token_ids = best.tolist()
        is_valid = torch.isfinite(peaks[:, 0]).tolist()
        drawn = [
            row for row, item in enumerate(requests) if is_valid[row] and not item.params.is_greedy
        ]
        if drawn:
            for row, token_id in zip(
                drawn, self._draw(logits, peaks, drawn, requests), strict=True
            ):
                token_ids[row] = token_id
        logprobs = {}
        if raw_logits is not None:
            logprobs = _chosen_logprobs(raw_logits, reported, token_ids, requests)
        return [
            SampledToken(token_ids[row], logprobs.get(row))
            if is_valid[row]
            else SamplingFailure(_failure_message(float(peaks[row, 0])))
            for row in range(len(requests))
        ]

    def _edit_logits(self, logits: Tensor, requests: Sequence[Request]) -> None:
        """Apply logit bias, min_tokens and the penalties, in place."""
        penalties: dict[str, _PenaltyState] = {}
        for row, request in enumerate(requests):
            params = request.params
            if params.logit_bias:
                ids = torch.tensor(list(params.logit_bias), device=logits.device)
                logits[row, ids] += torch.tensor(
                    list(params.logit_bias.values()), dtype=logits.dtype, device=logits.device
                )
            if request.num_output_tokens < params.min_tokens:
                held_back = [*self._eos_token_ids, *params.stop_token_ids]
                if held_back:
                    logits[row, torch.tensor(held_back, device=logits.device)] = -torch.inf
            if _has_penalties(params):
                state = self._penalties.get(request.request_id)
                if state is None or state.request is not request:
                    state = _PenaltyState(request, logits.device)
                penalties[request.request_id] = state
                state.apply(logits[row])
        # States of requests that left the batch go with the old dict.
        self._penalties = penalties

    def _draw(
        self, logits: Tensor, peaks: Tensor, rows: list[int], requests: Sequence[Request]
    ) -> list[int]:
        """Draw a token for each of `rows`. Overwrites the logits of those rows."""
        params = [requests[row].params for row in rows]
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
        cumulative = _by_chunk(weights, torch.sum).double().cumsum(-1)  # [rows, chunks]
        uniforms = torch.tensor(
            [uniform(requests[row].sampling_seed, requests[row].num_output_tokens) for row in rows],
            dtype=torch.float64,
            device=logits.device,
        )
        token_ids = _draw_by_index(weights, cumulative, uniforms).tolist()
        vocab_size = logits.shape[1]
        cut = [i for i, item in enumerate(params) if _is_cut(item, vocab_size)]
        if cut:
            cuts = _Cuts.build([params[i] for i in cut], cumulative[cut, -1], uniforms[cut])
            kept = weights if len(cut) == len(rows) else weights[cut]
            for i, token_id in zip(cut, self._draw_cut(kept, cuts), strict=True):
                token_ids[i] = token_id
        return [int(token_id) for token_id in token_ids]

    def _draw_cut(self, weights: Tensor, cuts: "_Cuts") -> list[int]:
        """Draw from the tokens that top_k and top_p leave; weights [F, V]."""
        num_candidates = min(self._num_candidates, weights.shape[1])
        values, ids = weights.topk(num_candidates, sorted=False)
        ids, order = ids.sort(-1)
        values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
        ids = ids.gather(1, order)
        # Which of the tokens that tie with the last candidate were taken is arbitrary, so only
        # those above it are known to be the head of the whole sorted row.
        smallest = values[:, -1:]
        num_known = (values > smallest).sum(-1)
        num_known[smallest[:, 0] == 0.0] = num_candidates
        if num_candidates == weights.shape[1]:
            num_known.fill_(num_candidates)
        drawn, is_exact = cuts.draw(values, ids, num_known)
        token_ids = drawn.tolist()
        for row, exact in enumerate(is_exact.tolist()):
            if not exact:
                token_ids[row] = _draw_sorted(weights[row], cuts.row(row))
        return [int(token_id) for token_id in token_ids]


def uniform(seed: int, position: int) -> float:
    """Return the random number in [0, 1) of a request's output position: 53 bits of BLAKE2b."""
    digest = blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def token_logprobs(
    logits: Tensor, token_ids: Sequence[int], num_top: int | Sequence[int]
) -> list[TokenLogprobs]:
    """Return the log-probability, rank and `num_top` likeliest tokens for each row of logits.

    logits: [N, V], of the model itself. token_ids: N ids. num_top: 0..20, one for all or one a row.
    Equal log-probabilities share a rank and are listed by token id.
    """
    assert logits.shape[0] == len(token_ids), (logits.shape, len(token_ids))
    tops = [num_top] * len(token_ids) if isinstance(num_top, int) else list(num_top)
    entries: list[TokenLogprobs] = []
    for start in range(0, len(token_ids), _LOGPROB_ROWS):
        stop = start + _LOGPROB_ROWS
        rows = logits[start:stop].float().log_softmax(-1)
        entries += _logprob_entries(rows, token_ids[start:stop], tops[start:stop])
    return entries


def _logprob_entries(
    logprobs: Tensor, token_ids: Sequence[int], tops: Sequence[int]
) -> list[TokenLogprobs]:
    chosen = logprobs.gather(1, torch.tensor(token_ids, device=logprobs.device)[:, None])
    ranks = ((logprobs > chosen).sum(-1) + 1).tolist()
    # Always as many as any request may ask for, so that ties do not depend on the neighbours.
    values, ids = logprobs.topk(min(MAX_LOGPROBS, logprobs.shape[1]), sorted=False)
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    top_ids, top_values = ids.gather(1, order).tolist(), values.tolist()
    return [
        TokenLogprobs(
            token_id=token_id,
            logprob=logprob,
            rank=rank,
            top=list(zip(row_ids[:num_top], row_values[:num_top], strict=True)),
        )
        for token_id, logprob, rank, row_ids, row_values, num_top in zip(
            token_ids, chosen[:, 0].tolist(), ranks, top_ids, top_values, tops, strict=True
        )
    ]


def _chosen_logprobs(
    raw_logits: Tensor, rows: list[int], token_ids: list[int], requests: Sequence[Request]
) -> dict[int, TokenLogprobs]:
    tops = [requests[row].params.logprobs or 0 for row in rows]
    entries = token_logprobs(raw_logits, [token_ids[row] for row in rows], tops)
    return dict(zip(rows, entries, strict=True))


def _failure_message(peak: float) -> str:
    if peak == -torch.inf:
        return "every token was excluded: no logit is above -inf"
    return f"the model produced logits that are not finite (largest: {peak})"


def _has_penalties(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty != 1.0
        or params.presence_penalty != 0.0
        or params.frequency_penalty != 0.0
    )


def _is_cut(params: SamplingParams, vocab_size: int) -> bool:
    return params.top_p < 1.0 or 0 < params.top_k < vocab_size


class _PenaltyState:
    """The distinct tokens of one request and how often each was generated, from step to step.

    Slot i holds token `ids[i]` and its number of occurrences in the output, 0 for a token that
    only the prompt has.
    """

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request = request
        # The prompt counts for the repetition penalty alone.
        seen = request.prompt_token_ids if request.params.repetition_penalty != 1.0 else []
        self._slots = {token_id: slot for slot, token_id in enumerate(dict.fromkeys(seen))}
        capacity = max(64, 2 * len(self._slots))
        self._ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self._ids[: len(self._slots)] = torch.tensor(list(self._slots), dtype=torch.int64)
        self._counts = torch.zeros(capacity, dtype=torch.float32, device=device)
        self._num_counted = 0

    def apply(self, row: Tensor) -> None:
        """Penalise `row` [V] in place for the tokens so far."""
        for token_id in self.request.output_token_ids[self._num_counted :]:
            self._count(token_id)
        self._num_counted = self.request.num_output_tokens
        params = self.request.params
        ids, counts = self._ids[: len(self._slots)], self._counts[: len(self._slots)]
        values = row[ids]
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            values = torch.where(values > 0, values / penalty, values * penalty)
        values -= params.frequency_penalty * counts + params.presence_penalty * (counts > 0)
        row[ids] = values

    def _count(self, token_id: int) -> None:
        slot = self._slots.setdefault(token_id, len(self._slots))
        if slot == len(self._ids):
            self._ids = torch.cat((self._ids, torch.zeros_like(self._ids)))
            self._counts = torch.cat((self._counts, torch.zeros_like(self._counts)))
        self._ids[slot] = token_id
        self._counts[slot] += 1


@dataclass(frozen=True, slots=True)
class _Cuts:
    """What top_k and top_p ask of F rows: each field is [F, 1].

    top_k is the size of the vocabulary or more where it is off, top_p is infinite where it is off.
    totals: float64, the weight of the whole row. uniforms: float64, the random numbers.
    """

    top_k: Tensor
    top_p: Tensor
    totals: Tensor
    uniforms: Tensor

    @classmethod
    def build(cls, params: Sequence[SamplingParams], totals: Tensor, uniforms: Tensor) -> "_Cuts":
        off = torch.iinfo(torch.int64).max
        top_k = [item.top_k if item.top_k > 0 else off for item in params]
        top_p = [item.top_p if item.top_p < 1.0 else torch.inf for item in params]
        device = totals.device
        return cls(
            top_k=torch.tensor(top_k, device=device)[:, None],
            top_p=torch.tensor(top_p, dtype=torch.float64, device=device)[:, None],
            totals=totals[:, None],
            uniforms=uniforms[:, None],
        )

    def row(self, row: int) -> "_Cuts":
        """Return the part for one row."""
        part = slice(row, row + 1)
        return _Cuts(self.top_k[part], self.top_p[part], self.totals[part], self.uniforms[part])

    def draw(self, values: Tensor, ids: Tensor, num_known: Tensor) -> tuple[Tensor, Tensor]:
        """Draw from rows sorted by (weight descending, id ascending).

        values, ids: [F, K], the likeliest tokens; the first `num_known` [F] of a row are the head
        of the whole sorted row, or all of it that matters when num_known is K. Returns the token
        ids [F], and bool [F]: whether what is known was enough.
        """
        num_candidates = values.shape[1]
        weights = values.double()
        cumulative = weights.cumsum(-1)
        before = torch.nn.functional.pad(cumulative[:, :-1], (1, 0))
        # top_p is a share of what top_k left, or of the whole row.
        last = (self.top_k - 1).clamp_max(num_candidates - 1)
        has_top_k = self.top_k < torch.iinfo(torch.int64).max
        mass = torch.where(has_top_k, cumulative.gather(1, last), self.totals)
        position = torch.arange(num_candidates, device=values.device)
        is_kept = (position < self.top_k) & (before < self.top_p * mass) & (weights > 0)
        num_kept = is_kept.sum(-1, keepdim=True)

        known = num_known[:, None]
        is_complete = known == num_candidates
        is_exact = is_complete | ((num_kept <= known) & (~has_top_k | (self.top_k <= known)))
        targets = self.uniforms * cumulative.gather(1, num_kept - 1)
        chosen = torch.searchsorted(cumulative, targets, right=True)
        chosen = torch.minimum(chosen, num_kept - 1)
        return ids.gather(1, chosen)[:, 0], is_exact[:, 0]


def _draw_sorted(weights: Tensor, cut: _Cuts) -> int:
    """Draw one row [V] by sorting every token that can matter."""
    top_p = float(cut.top_p)
    threshold = 0.0
    if top_p < 1.0 and int(cut.top_k) >= weights.shape[0]:
        # Tokens below (1 - p) * total / V weigh less than (1 - p) * total together: none of them
        # is in the nucleus. Half of it leaves room for rounding.
        threshold = 0.5 * (1.0 - top_p) * float(cut.totals) / weights.shape[0]
    ids = (weights > threshold).nonzero()[:, 0]
    values, order = weights[ids].sort(dim=-1, descending=True, stable=True)
    num_known = torch.tensor([len(ids)], device=weights.device)
    drawn, is_exact = cut.draw(values[None], ids[order][None], num_known)
    assert bool(is_exact), "a sorted row is complete"
    return int(drawn)


def _by_chunk(rows: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce each chunk of `_CHUNK_SIZE` columns: [R, V] -> [R, ceil(V / chunk)]."""
    num_full = rows.shape[1] // _CHUNK_SIZE * _CHUNK_SIZE
    parts = []
    if num_full:
        parts.append(reduce(rows[:, :num_full].view(rows.shape[0], -1, _CHUNK_SIZE), dim=-1))
    if num_full < rows.shape[1]:
        parts.append(reduce(rows[:, num_full:], dim=-1, keepdim=True))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _chunk_columns(chunks: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return the columns [R, chunk] of one chunk a row, and which of them exist."""
    columns = chunks[:, None] * _CHUNK_SIZE + torch.arange(_CHUNK_SIZE, device=chunks.device)
    return columns.clamp_max(vocab_size - 1), columns < vocab_size


def _first_argmax(rows: Tensor) -> Tensor:
    """Return the lowest index of each row's maximum, [R]; a NaN counts as the maximum.

    On CPU this is ten times as fast as `argmax` of the whole row, which is not vectorised.
    """
    chunks = _by_chunk(rows, torch.amax).argmax(-1)
    columns, _ = _chunk_columns(chunks, rows.shape[1])
    within = rows.gather(1, columns).argmax(-1, keepdim=True)
    return columns.gather(1, within)[:, 0]


def _draw_by_index(weights: Tensor, cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the distribution function in the order of token ids: [R, V] -> [R].

    cumulative: float64 [R, chunks], running sums of the weights of the chunks.
    """
    targets = uniforms[:, None] * cumulative[:, -1:]
    chunks = _inverse(cumulative, targets)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(1, chunks)
    columns, exists = _chunk_columns(chunks[:, 0], weights.shape[1])
    inner = weights.gather(1, columns).double().mul_(exists).cumsum(-1)
    return columns.gather(1, _inverse(inner, targets - before))[:, 0]


def _inverse(cumulative: Tensor, targets: Tensor) -> Tensor:
    """Return the first index [R, 1] whose running sum exceeds the target, never a weight of 0."""
    index = torch.searchsorted(cumulative, targets, right=True)
    last_positive = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    return torch.minimum(index, last_positive)
