"""Selection on the vectorised PyTorch path: scores to blocks, ties to the lower index."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nsa_kernels.torch_plan import SelectionPlan

# exp of it, summed over any group, stays finite.
MAX_EXPONENT = 80.0


def group_block_scores(cmp_probs: Tensor, plan: SelectionPlan) -> Tensor:
    """Return block scores [..., P] fp32 from [..., G, P * E] fp32 probabilities, summed over G."""
    padded = F.pad(cmp_probs.sum(-2), (0, plan.touching - plan.per_block))
    touching = padded.unfold(-1, plan.touching, plan.per_block)  # [..., P, E + l/d - 1]
    if plan.weights is None:
        return touching.amax(-1)
    # Copied flat: a product with the overlapping view itself is split into one call a row.
    return touching.reshape(-1, plan.touching).mv(plan.weights).view(touching.shape[:-1])


def relative_probs(scores: Tensor, lse_scores: Tensor) -> Tensor:
    """Return exp(scores - logsumexp(lse_scores)) [..., N] for fp32 [..., N] and [..., N'].

    Bounded, so that a block that is not forced stays below one that is.
    """
    lse = torch.logsumexp(lse_scores, dim=-1, keepdim=True)
    return (scores - lse).clamp_(max=MAX_EXPONENT).exp_()


def select_block_indices(scores: Tensor, plan: SelectionPlan) -> Tensor:
    """Return [B, H, n] int64 block indices for [B, H, P] scores, -1 where there is none.

    A stable sort, because `topk` leaves the order of equal scores open.
    """
    if plan.halves is None:
        indices = _top_indices(scores + plan.force.unsqueeze(1), plan.num_selected)
        if plan.limits is not None:
            beyond = torch.arange(indices.shape[-1]) >= plan.limits.view(-1, 1, 1)
            indices.masked_fill_(beyond, -1)
        return indices
    half = plan.num_selected // 2
    picked = [_top_indices(scores + force.unsqueeze(1), half) for force in plan.halves]
    return torch.cat(picked, dim=-1)


def _top_indices(scores: Tensor, count: int) -> Tensor:
    values, indices = torch.sort(scores, dim=-1, descending=True, stable=True)
    return indices[..., :count].masked_fill_(values[..., :count] == -torch.inf, -1)


def select_block_mask(scores: Tensor, plan: SelectionPlan) -> Tensor:
    """Return [H, Q, P] bool for [H, Q, P] scores: True where the block is selected."""
    if plan.halves is None:
        return _top_mask(scores + plan.force, plan.num_selected)
    past, last = plan.halves
    half = plan.num_selected // 2
    return _top_mask(scores + past, half) | _top_mask(scores + last, half)


def _top_mask(scores: Tensor, count: int) -> Tensor:
    if scores.shape[-1] <= count:
        return scores > -torch.inf
    threshold = scores.topk(count, dim=-1).values.amin(-1, keepdim=True)
    above = scores > threshold
    tied = scores == threshold
    room = count - above.sum(-1, keepdim=True)
    # Cumulative count picks the lowest indices among the tied.
    mask = above | (tied & (tied.cumsum(-1) <= room))
    return mask & (scores > -torch.inf)
