"""Searches and sums over the vocabulary, in two levels.

Every sum has one fixed order, whatever the number of rows and threads, so that a row's result does
not depend on its neighbours. Shapes: R rows, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

# 64 floats are four cache lines.
_CHUNK_SIZE = 64


def by_chunk(rows: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
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


def first_argmax(rows: Tensor) -> Tensor:
    """Return the lowest index of each row's maximum, [R]; a NaN counts as the maximum.

    On CPU this is ten times as fast as `argmax` of the whole row, which is not vectorised.
    """
    chunks = by_chunk(rows, torch.amax).argmax(-1)
    columns, _ = _chunk_columns(chunks, rows.shape[1])
    within = rows.gather(1, columns).argmax(-1, keepdim=True)
    return columns.gather(1, within)[:, 0]


def draw_by_index(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the distribution function in the order of token ids: [R, V] -> [R].

    weights: float32, not negative, not normalised. uniforms: float64 [R] in [0, 1).
    """
    cumulative = by_chunk(weights, torch.sum).double().cumsum(-1)  # [R, chunks]
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
