"""The tokens that top_k and top_p leave of a row.

They are the head of the order (weight descending, token id ascending). Nothing is sorted: a bound
that is cheap to compute leaves few tokens of most rows, and a radix search among those finds where
the head ends.

Shapes: F rows, V vocabulary, N tokens at or above the bounds of their rows.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from nsa_serve.request import SamplingParams
from nsa_serve.row_search import by_chunk

# The bits of a float32 in [0, 1] are three digits of ten bits.
_DIGIT_BITS = 10
_NUM_BINS = 1 << _DIGIT_BITS
_SHIFTS = (2 * _DIGIT_BITS, _DIGIT_BITS, 0)


def is_cut(params: SamplingParams, vocab_size: int) -> bool:
    """Return whether top_k or top_p can exclude a token."""
    return params.top_p < 1.0 or 0 < params.top_k < vocab_size


def cut_weights(weights: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Return the weights with 0 for the tokens that top_k and top_p exclude.

    weights: float32 [F, V] in [0, 1], the largest of each row 1; row i is for `params[i]`. top_p
    is a share of what top_k left. A token is kept while the weight of those before it is below
    that share, all sums being in float64.
    """
    vocab_size = weights.shape[1]
    device = weights.device
    # Infinite where they are off.
    top_k = torch.tensor(
        [item.top_k if 0 < item.top_k < vocab_size else torch.inf for item in params],
        dtype=torch.float64,
        device=device,
    )
    top_p = torch.tensor(
        [item.top_p if item.top_p < 1.0 else torch.inf for item in params],
        dtype=torch.float64,
        device=device,
    )
    mass = by_chunk(weights, partial(torch.sum, dtype=torch.float64)).cumsum(-1)[:, -1]
    bounds = _lower_bounds(weights, top_k, top_p, mass)
    index = (weights >= bounds[:, None]).flatten().nonzero()[:, 0]  # [N]
    rows = index // vocab_size
    head = weights.flatten()[index]
    has_top_k = top_k.isfinite()
    if bool(has_top_k.any()):
        head *= _is_kept(head, rows, torch.ones_like(head, dtype=torch.float64), top_k)
        left = torch.zeros_like(mass).scatter_add_(0, rows, head.double())
        mass = torch.where(has_top_k, left, mass)
    if bool(top_p.isfinite().any()):
        head *= _is_kept(head, rows, head.double(), top_p * mass)
    return weights.new_zeros(weights.numel()).index_copy_(0, index, head).view_as(weights)


def _lower_bounds(weights: Tensor, top_k: Tensor, top_p: Tensor, totals: Tensor) -> Tensor:
    """Return weights, float32 [F], below which top_k and top_p keep no token."""
    # Tokens below x, of which there are at most V - 1, weigh less than (V - 1) * x together.
    # Dividing by V instead leaves room for rounding.
    bounds = (1.0 - top_p.clamp_max(1.0)) * totals / weights.shape[1]
    has_top_k = top_k.isfinite()
    if bool(has_top_k.any()):
        # Each of k chunks has a token of at least the k-th largest maximum.
        maxima = by_chunk(weights, torch.amax)
        num_maxima = min(int(top_k[has_top_k].max()), maxima.shape[1])
        maxima = torch.nn.functional.pad(maxima.topk(num_maxima).values, (0, 1))
        last = (top_k - 1).clamp_max(num_maxima).long()
        bounds = torch.where(has_top_k, maxima.gather(1, last[:, None])[:, 0].double(), bounds)
    return bounds.float()


def _is_kept(weights: Tensor, rows: Tensor, amounts: Tensor, needed: Tensor) -> Tensor:
    """Mark the tokens before which the amounts of their row sum to less than is needed.

    weights: float32 [N] in [0, 1]. rows: int64 [N], ascending; within a row in the order of token
    ids. amounts: float64 [N], equal where weights are. needed: float64 [F], above 0. Returns
    bool [N].

    Each digit, the highest first, splits the open tokens of a row into bins. The bin that reaches
    what is needed stays open; those above it are kept. The last open tokens tie.
    """
    # The bits of floats that are not negative are in the order of the floats.
    bits = weights.view(torch.int32)
    cut_bits = torch.zeros_like(needed, dtype=torch.int32)
    first_bins = torch.arange(len(needed), device=rows.device) * _NUM_BINS
    open_rows, open_bits, open_amounts = rows, bits, amounts
    for shift in _SHIFTS:
        digits = (open_bits >> shift) & (_NUM_BINS - 1)
        bins = first_bins[open_rows] + (_NUM_BINS - 1 - digits)
        histogram = amounts.new_zeros(len(needed) * _NUM_BINS).scatter_add_(0, bins, open_amounts)
        reached = histogram.view(len(needed), _NUM_BINS).cumsum(-1)
        # The last bin when top_k or top_p is off, or when rounding lets no bin reach it.
        last = (reached < needed[:, None]).sum(-1).clamp_max(_NUM_BINS - 1)
        before = torch.nn.functional.pad(reached, (1, 0)).gather(1, last[:, None])[:, 0]
        needed = needed - before
        cut_bits |= (_NUM_BINS - 1 - last).int() << shift
        is_open = (bins == (first_bins + last)[open_rows]).nonzero()[:, 0]
        open_rows, open_bits = open_rows[is_open], open_bits[is_open]
        open_amounts = open_amounts[is_open]
    row_cut_bits = cut_bits[rows]
    is_kept = bits > row_cut_bits
    ties = (bits == row_cut_bits).nonzero()[:, 0]
    tied_rows = rows[ties]
    rank = torch.arange(len(ties), device=rows.device) - torch.searchsorted(tied_rows, tied_rows)
    is_kept[ties] = rank * amounts[ties] < needed[tied_rows]
    return is_kept
