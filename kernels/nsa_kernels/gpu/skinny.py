"""Linear layers of up to 64 rows by matrix instructions of a warp, x the narrow operand.

A program owns BLOCK_N rows of W and all of K. Its warps share K among them: warp s multiplies the
columns [s * SLICE_K, (s + 1) * SLICE_K) of each K step (a batched `tl.dot`, one batch a warp), so
that no warp reads what another needs, and the sums are added once, at the end. There are no
atomics: a result depends on its row of x alone, not on the rows beside it.

Legend: M rows of x, K inputs, N outputs (2I rows of W for swiglu: [gate; up]), D = head_dim.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.linear_tile import (
    Rotary,
    _finish_tile,
    _load_rotary,
    _tile_rows,
    count_tiles,
    tile_arguments,
)

# Up to so many rows, the norm is computed again by every program rather than by a kernel.
MAX_FOLDED_NORM_ROWS = 16
# Rows of x that one compiled kernel takes, padded: the narrow side of a matrix instruction.
ROW_CLASSES = (8, 16, 32, 64)
# Outputs of a program up to which it has the registers to hold cosines and sines all along.
MAX_EARLY_ROTARY = 512
# Sizes at which the fastest tile changes: a weight that keeps all multiprocessors busy (elements),
# and outputs of a pair of MLP matrices and of a head.
_LARGE_WEIGHT = 1 << 22
_WIDE_OUTPUTS, _HEAD_OUTPUTS = 16384, 1 << 16


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """Tile of the kernel: BLOCK_N rows of W, num_warps slices of slice_k columns a step.

    fold_norm: compute the norm inside, not in a kernel before.
    """

    block_n: int
    slice_k: int
    num_warps: int
    num_stages: int
    fold_norm: bool = True


def row_class(num_rows: int) -> int:
    """The padded number of rows that a skinny kernel computes for num_rows."""
    return next(size for size in ROW_CLASSES if size >= num_rows)


def skinny_config(
    num_rows: int, num_out: int, num_in: int, dtype: torch.dtype
) -> SkinnyConfig | None:
    """The tile for M rows and a [num_out, num_in] weight; None where PyTorch is faster."""
    rows = row_class(num_rows)
    fold_norm = rows <= MAX_FOLDED_NORM_ROWS
    if dtype == torch.float32:
        return SkinnyConfig(16, 16, 4, 2, fold_norm=fold_norm)
    # Half-precision sums of squares have no room for x * norm_weight beyond 65504.
    fold_norm = fold_norm and dtype != torch.float16
    # Measured on an H200, between layers of 1B and 8B models.
    is_large = num_out * num_in >= _LARGE_WEIGHT
    if num_out >= _HEAD_OUTPUTS and rows <= 32:
        tile = (32, 64, 4, 4) if rows <= 16 else (64, 64, 4, 3)
        return SkinnyConfig(*tile, fold_norm=False)
    is_small_square = num_out < 4096 and num_in < 4096 and num_out <= num_in
    if rows == 32 and is_small_square:
        return SkinnyConfig(16, 64, 4, 4, fold_norm=False)
    if rows > 16 and is_large:
        return None
    if rows > 16:
        return SkinnyConfig(16 if rows == 32 else 32, 64, 4, 3, fold_norm=False)
    if num_out >= _WIDE_OUTPUTS:
        if rows == 16 and num_in >= 4096:
            return None
        tile = (32, 64, 4, 4) if rows == 8 and num_in >= 4096 else (64, 64, 4, 3)
        return SkinnyConfig(*tile, fold_norm=fold_norm and num_in < 4096)
    if num_in >= 8192:
        tile = (16, 256, 4, 3) if rows == 8 or num_out < 4096 else (16, 128, 4, 4)
    elif num_in >= 4096 and is_large:
        tile = (32, 64, 4, 4) if rows == 8 else (64, 64, 4, 3)
    elif num_out > num_in and is_large:
        tile = (32, 64, 4, 4)
    elif rows == 8:
        tile = (16, 64, 4, 6)
    else:
        tile = (16, 256, 4, 3)
    return SkinnyConfig(*tile, fold_norm=fold_norm and rows == 8)


def launch_skinny(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
    out: Tensor,
    *,
    config: SkinnyConfig,
    launch_pdl: bool,
) -> None:
    """Write to `out` what `linear` returns; it has checked everything."""
    block_m, block_n = row_class(x.shape[0]), config.block_n
    options = {"launch_pdl": True} if launch_pdl else {}
    num_tiles = count_tiles(weight.shape[0], block_n, swiglu=swiglu, rotary=rotary)
    _skinny_kernel[(num_tiles,)](
        x,
        weight,
        None if norm is None else norm[0],
        0.0 if norm is None else norm[1],
        x.stride(0),
        **tile_arguments(weight, bias, residual, swiglu, rotary, out),
        K=weight.shape[1],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SLICE_K=config.slice_k,
        SLICES=config.num_warps,
        ROTARY_EARLY=rotary is not None
        and rotary.is_settled
        and block_m * block_n <= MAX_EARLY_ROTARY,
        PDL=launch_pdl,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **options,
    )


@triton.jit(do_not_specialize=["num_rows", "num_out", "num_heads"])
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    norm_ptr,
    eps,
    stride_x,
    bias_ptr,
    residual_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    out_ptr,
    stride_residual,
    stride_table,
    num_rows,
    num_out,
    num_heads,
    K: tl.constexpr,
    HALF_DIM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE_K: tl.constexpr,
    SLICES: tl.constexpr,
    ROTARY_EARLY: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_K: tl.constexpr = SLICES * SLICE_K
    rows, exists, is_rotated = _tile_rows(
        tl.program_id(0), num_out, num_heads, HALF_DIM, SWIGLU, BLOCK_N
    )
    # Rows that do not exist are computed from one that does, and not stored.
    w_rows = weight_ptr + tl.minimum(rows, num_out - 1).to(tl.int64) * K
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    # Two loads, one after the other: before the wait if allowed, else at the end.
    cos, sin = 0.0, 0.0
    if ROTARY_EARLY:
        cos, sin = _load_rotary(
            rows, exists & is_rotated, cos_ptr, sin_ptr, positions_ptr, stride_table, num_rows,
            HALF_DIM, BLOCK_M,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_wait()

    offs_m = tl.arange(0, BLOCK_M)
    mask_m = (offs_m < num_rows)[None, :, None]
    # [SLICES, SLICE_K]: columns of a K step, a warp each slice.
    offs_k = tl.arange(0, SLICES)[:, None] * SLICE_K + tl.arange(0, SLICE_K)[None, :]
    w_ptrs = w_rows[None, :, None] + offs_k[:, None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :, None] * stride_x + offs_k[:, None, :]
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    squares = tl.zeros([SLICES, BLOCK_M], tl.float32)
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    # 0. If the compiler knew, it would unroll short loops, and run out of registers.
    first_step = tl.program_id(1) * STEPS
    for step in tl.range(first_step, STEPS, num_stages=STAGES):
        first = step * BLOCK_K
        if K % BLOCK_K == 0:
            w = tl.load(w_ptrs + first)
            x = tl.load(x_ptrs + first, mask=mask_m, other=0.0)
        else:
            mask_k = (first + offs_k < K)[:, None, :]
            w = tl.load(w_ptrs + first, mask=mask_k, other=0.0)
            x = tl.load(x_ptrs + first, mask=mask_m & mask_k, other=0.0)
        if norm_ptr is not None:
            if K % BLOCK_K == 0:
                norm = tl.load(norm_ptr + first + offs_k)
            else:
                norm = tl.load(norm_ptr + first + offs_k, mask=first + offs_k < K, other=0.0)
            x32 = x.to(tl.float32)
            squares += tl.sum(x32 * x32, axis=2)
            x = (x32 * norm.to(tl.float32)[:, None, :]).to(x_ptr.dtype.element_ty)
        acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")

    y = tl.sum(acc, axis=0)
    if norm_ptr is not None:
        y *= tl.rsqrt(tl.sum(squares, axis=0) / K + eps)[None, :]
    if HALF_DIM > 0 and not ROTARY_EARLY:
        cos, sin = _load_rotary(
            rows, exists & is_rotated, cos_ptr, sin_ptr, positions_ptr, stride_table, num_rows,
            HALF_DIM, BLOCK_M,
        )  # fmt: skip
    _finish_tile(
        y, rows, exists, is_rotated, cos, sin, bias_ptr, residual_ptr, out_ptr, stride_residual,
        num_rows, num_out, HALF_DIM, SWIGLU,
    )  # fmt: skip
