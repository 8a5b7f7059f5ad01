"""Losses: distillation and next-token loss over a large vocabulary, and a floor for branches.

n tokens that count, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

CHUNK_LOGITS = 1 << 27
"""Most logits that exist at once (512 MiB in fp32; about five such arrays do)."""


NUM_ANCHORS = 8192
"""Tokens of a batch of "retrieval" on which the student is held to its teacher."""


def split_weight(
    kind: str, weight: NDArray[np.float32], context: int, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return which predictions are the teacher's to teach, and which the text's own: [B, T] each.

    weight [B, T]: of the batch. The teacher reads the first `context` tokens of a row. Of
    "retrieval", whose weight is on the answers, the text teaches the answers, and the teacher some
    of the rest, so that the student stays what it was off them. Of other kinds the text teaches
    what comes after the teacher's context.
    """
    taught, own = weight.copy(), weight.copy()
    if kind == "retrieval":
        taught = (weight == 0.0).astype(np.float32)
    taught[:, context:] = 0.0
    if kind == "retrieval":
        thin_out(taught, NUM_ANCHORS, rng)
    else:
        own[:, :context] = 0.0
    return taught, own


def thin_out(weight: NDArray[np.float32], count: int, rng: np.random.Generator) -> None:
    """Leave `count` of the weights [B, T] that are not 0, in place."""
    places = np.flatnonzero(weight)
    if len(places) > count:
        weight.flat[rng.permutation(places)[count:]] = 0.0


@dataclass(frozen=True, slots=True)
class HeadLoss:
    """The weighted means over tokens. total = kl_weight * kl + ce_weight * ce has the gradient."""

    total: Tensor
    kl: Tensor
    ce: Tensor


def head_loss(
    hidden: Tensor,
    head: Tensor,
    ids: Tensor,
    loss_weight: Tensor,
    *,
    teacher_hidden: Tensor | None,
    kl_weight: float,
    ce_weight: float,
) -> HeadLoss:
    """Compare predictions with the teacher's (KL(teacher || student)) and with what came next.

    hidden [B, T, hidden], head [V, hidden], ids int64 [B, T]; loss_weight [B, T] weighs the
    prediction of ids[b, t], so its first column is ignored. teacher_hidden: like hidden, needed
    where kl_weight is not 0. Raises ValueError when no token counts.
    """
    weight = loss_weight[:, 1:].flatten()
    rows = weight.nonzero()[:, 0]
    if not len(rows):
        raise ValueError("no token of this batch has a loss weight: expected one at least")
    if kl_weight and teacher_hidden is None:
        raise ValueError("kl_weight needs teacher_hidden, got None")
    if not kl_weight:
        teacher_hidden = None
    teacher = None if teacher_hidden is None else teacher_hidden[:, :-1].flatten(0, 1)[rows]
    total, kl, ce = _HeadLoss.apply(  # type: ignore[no-untyped-call]
        hidden[:, :-1].flatten(0, 1)[rows],
        head,
        teacher,
        ids[:, 1:].flatten()[rows],
        weight[rows] / weight[rows].sum(),
        kl_weight,
        ce_weight,
    )
    return HeadLoss(total, kl, ce)


class _HeadLoss(torch.autograd.Function):
    """Computes the gradient of the hidden states on the way: the head is frozen."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        teacher: Tensor | None,
        targets: Tensor,
        weight: Tensor,
        kl_weight: float,
        ce_weight: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        matrix = head.to(dtype)
        gradient = torch.empty_like(hidden)
        kl, ce = (torch.zeros((), dtype=dtype, device=hidden.device) for _ in range(2))
        size = max(1, CHUNK_LOGITS // len(head))
        for start in range(0, len(hidden), size):
            part = slice(start, start + size)
            w, target = weight[part].to(dtype), targets[part, None]
            log_p = F.log_softmax(hidden[part].to(dtype) @ matrix.T, dim=-1)
            ce -= (w * log_p.gather(1, target)[:, 0]).sum()
            slope = log_p.exp()
            if teacher is None:
                slope *= ce_weight
            else:
                log_t = F.log_softmax(teacher[part].to(dtype) @ matrix.T, dim=-1)
                t = log_t.exp()
                kl += (w * (t * log_t.sub_(log_p)).sum(dim=-1)).sum()
                slope *= kl_weight + ce_weight
                slope.sub_(t, alpha=kl_weight)
            slope.scatter_add_(1, target, torch.full_like(w, -ce_weight)[:, None])
            gradient[part] = ((slope * w[:, None]) @ matrix).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(kl, ce)
        return kl_weight * kl + ce_weight * ce, kl, ce

    @staticmethod
    def backward(ctx: Any, slope: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * slope.to(gradient.dtype), *[None] * 6)


def share_floor(shares: Tensor, floor: float) -> Tensor:
    """Return the mean over layers and branches of how far a share [L, 3] is below the floor.

    In parts of the floor: 0 where every share reaches it, 1 for a branch that is dead.
    """
    return F.relu(1.0 - shares / floor).mean()
