"""The tokens that top_k and top_p leave of a row, and a draw from them.

A draw inverts the distribution function of the kept tokens in the order (weight descending, token
id ascending). Sorting a whole vocabulary is slow, so it is done on a head of that order that is
known to hold all kept tokens: first the largest few, then, for rows that keep more, what a
histogram of the weights says is enough. Which head is sorted changes the speed, never the result.

Shapes: F rows, V vocabulary, K candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa_serve.request import SamplingParams

# Weights are at most 1; the upper bits of a float32 (exponent and 3 bits of the mantissa) order
# them into eight bins per power of two.
_BIN_SHIFT = 20
_NUM_BINS = (0x3F800000 >> _BIN_SHIFT) + 1
# Covers the rounding of float64 sums of up to a million weights in any order.
_MASS_MARGIN = 1e-9


def is_cut(params: SamplingParams, vocab_size: int) -> bool:
    """Return whether top_k or top_p can exclude a token."""
    return params.top_p < 1.0 or 0 < params.top_k < vocab_size


@dataclass(frozen=True, slots=True)
class Cuts:
    """What top_k and top_p ask of F rows: each field is [F, 1].

    top_k is the largest int64 where it is off, top_p is infinite where it is off.
    totals: float64, the weight of the whole row. uniforms: float64, the random numbers.
    """

    top_k: Tensor
    top_p: Tensor
    totals: Tensor
    uniforms: Tensor

    @classmethod
    def build(cls, params: Sequence[SamplingParams], totals: Tensor, uniforms: Tensor) -> "Cuts":
        """Collect the parameters of F rows; totals, uniforms: float64 [F]."""
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

    @property
    def has_top_k(self) -> Tensor:
        """Bool [F, 1]."""
        return self.top_k < torch.iinfo(torch.int64).max

    def select(self, rows: Tensor) -> "Cuts":
        """Return the part for some rows."""
        return Cuts(self.top_k[rows], self.top_p[rows], self.totals[rows], self.uniforms[rows])

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
        mass = torch.where(self.has_top_k, cumulative.gather(1, last), self.totals)
        position = torch.arange(num_candidates, device=values.device)
        is_kept = (position < self.top_k) & (before < self.top_p * mass) & (weights > 0)
        num_kept = is_kept.sum(-1, keepdim=True)

        known = num_known[:, None]
        is_complete = known == num_candidates
        is_exact = is_complete | ((num_kept <= known) & (~self.has_top_k | (self.top_k <= known)))
        targets = self.uniforms * cumulative.gather(1, num_kept - 1)
        chosen = torch.searchsorted(cumulative, targets, right=True)
        chosen = torch.minimum(chosen, num_kept - 1)
        return ids.gather(1, chosen)[:, 0], is_exact[:, 0]


def draw_cut(weights: Tensor, cuts: Cuts, num_candidates: int) -> list[int]:
    """Draw from the tokens that top_k and top_p leave.

    weights: float32 [F, V] in [0, 1], not normalised. num_candidates: the size of the first head.
    """
    drawn, is_exact = _draw_largest(weights, cuts, min(num_candidates, weights.shape[1]))
    rows = (~is_exact).nonzero()[:, 0]
    if len(rows):
        drawn[rows] = _draw_head(weights[rows], cuts.select(rows))
    return [int(token_id) for token_id in drawn.tolist()]


def _draw_largest(weights: Tensor, cuts: Cuts, num_candidates: int) -> tuple[Tensor, Tensor]:
    """Draw from the `num_candidates` largest weights; return ids [F] and whether they sufficed."""
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
    return cuts.draw(values, ids, num_known)


def _draw_head(weights: Tensor, cuts: Cuts) -> Tensor:
    """Draw token ids [F], sorting as much of each row as it needs, however much that is."""
    rows, ids = (weights >= _lowest_needed(weights, cuts)).nonzero(as_tuple=True)
    num_head = rows.bincount(minlength=len(weights))
    width = int(num_head.max())
    # Each row's head moves to the front in the order of ids; the rest is filled with weight 0.
    first = num_head.cumsum(0) - num_head
    columns = torch.arange(len(rows), device=weights.device) - first[rows]
    head_values = weights.new_zeros(len(weights), width)
    head_values[rows, columns] = weights[rows, ids]
    head_ids = ids.new_zeros(len(weights), width)
    head_ids[rows, columns] = ids
    values, order = head_values.sort(dim=-1, descending=True, stable=True)
    drawn, is_exact = cuts.draw(values, head_ids.gather(1, order), torch.full_like(num_head, width))
    assert bool(is_exact.all()), "the head of a row lacks tokens"
    return drawn


def _lowest_needed(weights: Tensor, cuts: Cuts) -> Tensor:
    """Return a weight, [F, 1], below which top_k and top_p keep no token."""
    # The bits of floats that are not negative are in the order of the floats.
    bins = (weights.view(torch.int32) >> _BIN_SHIFT).long()
    amounts = weights.double()
    if bool(cuts.has_top_k.any()):
        amounts = torch.where(cuts.has_top_k, 1.0, amounts)
    needed = torch.where(
        cuts.has_top_k, cuts.top_k.double(), cuts.top_p * cuts.totals * (1.0 + _MASS_MARGIN)
    )
    histogram = amounts.new_zeros(len(weights), _NUM_BINS).scatter_add_(1, bins, amounts)
    # From the highest bin down, bins before the one that reaches what is needed; all bins when
    # rounding lets none reach it.
    num_above = (histogram.flip(1).cumsum(-1) < needed).sum(-1, keepdim=True)
    lowest_bin = (_NUM_BINS - 1 - num_above).clamp_min(0)
    return (lowest_bin.int() << _BIN_SHIFT).view(torch.float32)
