"""What the kernels of linear layers share: which rows of W a program owns, and what follows them.

Legend: M rows of x, N outputs (2I rows of W for swiglu: [gate; up]), D = head_dim, HALF_DIM D / 2
where outputs are rotated, else 0.
"""

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotate the first num_heads * head_dim outputs by tables [positions, D].

    cos_table, sin_table: [max_positions, D], the sign of the rotation in the sine, as
    `pointwise.apply_rotary_` has them. positions: [M] int32 or int64, on the device, each within
    the tables. is_settled: the positions were written before the kernel in front of this one
    began, and that kernel was itself launched when the one that wrote them had ended, as those of
    a step's first kernel are for all its layers: they are then read without waiting.
    """

    cos_table: Tensor
    sin_table: Tensor
    positions: Tensor
    num_heads: int
    head_dim: int
    is_settled: bool = False


def count_tiles(num_weights: int, block_n: int, *, swiglu: bool, rotary: Rotary | None) -> int:
    """Programs that own all rows of a [num_weights, K] matrix, as `_tile_rows` shares them out."""
    if rotary is not None:
        half_tiles = triton.cdiv(rotary.head_dim // 2, block_n // 2)
        rest = num_weights - rotary.num_heads * rotary.head_dim
        return int(rotary.num_heads * half_tiles + triton.cdiv(rest, block_n))
    if swiglu:
        return int(triton.cdiv(num_weights // 2, block_n // 2))
    return int(triton.cdiv(num_weights, block_n))


def tile_arguments(
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
    out: Tensor,
) -> dict[str, Any]:
    """What every kernel takes for `_tile_rows`, `_load_rotary` and `_finish_tile`, by name."""
    return {
        "bias_ptr": bias,
        "residual_ptr": residual,
        "cos_ptr": None if rotary is None else rotary.cos_table,
        "sin_ptr": None if rotary is None else rotary.sin_table,
        "positions_ptr": None if rotary is None else rotary.positions,
        "out_ptr": out,
        "stride_residual": 0 if residual is None else residual.stride(0),
        "stride_table": 0 if rotary is None else rotary.cos_table.stride(0),
        "num_rows": out.shape[0],
        "num_out": weight.shape[0],
        "num_heads": 0 if rotary is None else rotary.num_heads,
        "HALF_DIM": 0 if rotary is None else rotary.head_dim // 2,
        "SWIGLU": swiglu,
    }


@triton.jit
def _tile_rows(
    pid,
    num_out,
    num_heads,
    HALF_DIM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Return a program's rows of W, [BLOCK_N], which of them exist, and whether it rotates.

    Where two outputs belong together, gate and up or the halves of a head, the first of each pair
    are in the first half of the tile and the second in the second.
    """
    HALF_N: tl.constexpr = BLOCK_N // 2
    offs = tl.arange(0, BLOCK_N)
    is_rotated = False
    if SWIGLU:
        rows = pid * HALF_N + offs % HALF_N
        exists = rows < num_out // 2
        rows += offs // HALF_N * (num_out // 2)
    elif HALF_DIM > 0:
        TILES: tl.constexpr = (HALF_DIM + HALF_N - 1) // HALF_N
        is_rotated = pid < num_heads * TILES
        in_half = pid % TILES * HALF_N + offs % HALF_N
        rotated = pid // TILES * (2 * HALF_DIM) + in_half + offs // HALF_N * HALF_DIM
        plain = num_heads * (2 * HALF_DIM) + (pid - num_heads * TILES) * BLOCK_N + offs
        rows = tl.where(is_rotated, rotated, plain)
        exists = tl.where(is_rotated, in_half < HALF_DIM, plain < num_out)
    else:
        rows = pid * BLOCK_N + offs
        exists = rows < num_out
    return rows, exists, is_rotated


@triton.jit
def _split_pairs(tile):
    """[2 * n, ...] -> two of [n, ...]; `tile` is [BLOCK_N, BLOCK_M]."""
    HALF_N: tl.constexpr = tile.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(tile, [2, HALF_N, tile.shape[1]]), (1, 2, 0)))


@triton.jit
def _load_rotary(
    rows,
    is_rotated,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    stride_table,
    num_rows,
    HALF_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Load the cosines and sines of a tile, [BLOCK_N, BLOCK_M] fp32; 0 where nothing rotates."""
    offs_m = tl.arange(0, BLOCK_M)
    mask = is_rotated[:, None] & (offs_m < num_rows)[None, :]
    # As many loads as outputs: a row's position is then where its cosine is wanted.
    position_ptrs = positions_ptr + offs_m[None, :] + tl.zeros(rows.shape, tl.int32)[:, None]
    position = tl.load(position_ptrs, mask=mask, other=0).to(tl.int64)
    at = position * stride_table + (rows % (2 * HALF_DIM))[:, None]
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return cos, tl.load(sin_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _finish_tile(
    y,
    rows,
    exists,
    is_rotated,
    cos,
    sin,
    bias_ptr,
    residual_ptr,
    out_ptr,
    stride_residual,
    num_rows,
    num_out,
    HALF_DIM: tl.constexpr,
    SWIGLU: tl.constexpr,
):
    """Store a tile of products, [BLOCK_N, BLOCK_M] fp32, with what comes after them."""
    HALF_N: tl.constexpr = y.shape[0] // 2
    offs_m = tl.arange(0, y.shape[1]).to(tl.int64)
    width = num_out
    if bias_ptr is not None:
        y += tl.load(bias_ptr + rows, mask=exists, other=0.0).to(tl.float32)[:, None]
    if SWIGLU:
        gate, up = _split_pairs(y)
        y = gate / (1.0 + tl.exp(-gate)) * up
        width = num_out // 2
        rows = tl.program_id(0) * HALF_N + tl.arange(0, HALF_N)
        exists = rows < width
    elif HALF_DIM > 0:
        # The second half of the tile holds the partners of the first.
        low, high = _split_pairs(y)
        partner = tl.reshape(tl.permute(tl.join(high, low), (2, 0, 1)), y.shape)
        y = tl.where(is_rotated, y * cos + partner * sin, y)
    mask = exists[:, None] & (offs_m < num_rows)[None, :]
    if residual_ptr is not None:
        at = offs_m[None, :] * stride_residual + rows[:, None]
        y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + offs_m[None, :] * width + rows[:, None]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
