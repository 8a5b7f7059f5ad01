"""Linear layers of few rows: y = x @ W^T with what surrounds it, at the speed of reading W.

A program owns BLOCK_N rows of W and all of K. Its warps share K among them: warp s multiplies the
columns [s * SLICE_K, (s + 1) * SLICE_K) of each K step (a batched `tl.dot`, one batch a warp), so
that no warp reads what another needs, and the sums are added once, at the end. There are no
atomics: a result depends on its row of x alone, not on the rows beside it.

With dependent launch every kernel lets the next one start at once and waits for the one before it,
so that its start costs nothing. A tile may also ask for its weights, which no kernel writes, to
come to L2 meanwhile (`SkinnyConfig.prefetch`); on an H200 that was slower in 16 bits.

Legend: M rows of x, K inputs, N outputs (2I rows of W for swiglu: [gate; up]), D = head_dim.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape
from nsa_kernels.gpu.gemm import GemmConfig, can_gemm, gemm_config, launch_gemm
from nsa_kernels.gpu.gemv import GemvConfig, can_gemv, gemv_config, launch_gemv
from nsa_kernels.gpu.linear_tile import _finish_tile, _load_rotary, _tile_rows
from nsa_kernels.gpu.plan import has_dependent_launch
from nsa_kernels.gpu.pointwise import apply_rotary_, rms_norm
from nsa_kernels.gpu.pointwise import swiglu as swiglu_rows

# Above, PyTorch's matrix product is faster: it reads x once for many rows of W.
MAX_SKINNY_ROWS = 64
# Up to so many rows, the norm is computed again by every program rather than by a kernel.
MAX_FOLDED_NORM_ROWS = 16
# Rows of x that one compiled kernel takes, padded: the narrow side of a matrix instruction.
ROW_CLASSES = (8, 16, 32, 64)
# Outputs of a program up to which it has the registers to hold cosines and sines all along.
MAX_EARLY_ROTARY = 512
# Weights that a program asks for before it waits: all programs that are resident together must
# not ask for more than a part of L2.
PREFETCH_BYTES = 64 << 10
# Sizes at which the fastest tile changes: a weight that keeps all multiprocessors busy (elements),
# and outputs of a pair of MLP matrices and of a head.
_LARGE_WEIGHT = 1 << 22
_WIDE_OUTPUTS, _HEAD_OUTPUTS = 16384, 1 << 16


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


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """Tile of the skinny kernel: BLOCK_N rows of W, num_warps slices of slice_k columns a step.

    fold_norm: compute the norm inside, not in a kernel before; with one split only. prefetch: ask
    for weights before waiting for the kernel in front. splits: programs that share the columns of
    a tile; a second kernel then adds their sums, in order.
    """

    block_n: int
    slice_k: int
    num_warps: int
    num_stages: int
    fold_norm: bool = True
    prefetch: bool = True
    splits: int = 1


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    rotary: Rotary | None = None,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    config: SkinnyConfig | GemvConfig | GemmConfig | None = None,
    launch_pdl: bool | None = None,
) -> Tensor:
    """Return x @ weight^T + bias, [M, N], of x [M, K] and weight [N, K], for any M.

    norm: (weight [K], eps), RMSNorm of x first. swiglu: weight is [gate; up], [2I, K], and the
    result silu(gate) * up, [M, I]. rotary: applied to the first outputs. residual: [M, N], added
    last. out_dtype: of the result, else that of x. out: where to write it, contiguous; it may be
    the residual itself, which saves a copy.
    Sums, bias, residual and rotation are fp32 and rounded once where one of our kernels runs
    (M <= MAX_SKINNY_ROWS); PyTorch rounds in between.
    There a row's result is bit-equal whatever the other rows are and for every M of one class:
    1, 2 to 8, 9 to 16, 17 to 32, 33 to 64. Above, and where `choose_config` finds the
    matrix library faster (some weights of more than 16 rows), it is what that makes of it.

    config, launch_pdl: for measuring; None: `choose_config` and `starts_early`. With dependent
    launch, weight, bias, norm weight and rotary tables must not be written by a kernel that may
    still be running.

    Raises ValueError when shapes or dtypes do not fit, or rotary meets swiglu or residual.
    """
    num_rows, num_out = _check(x, weight, bias, norm, residual, swiglu, rotary)
    dtype = x.dtype if out_dtype is None else out_dtype
    if out is not None:
        check_shape("out", out, (num_rows, num_out))
        if out.dtype != dtype or not out.is_contiguous():
            raise ValueError(f"out must be {dtype} and contiguous, got {out.dtype}")
    if num_rows == 0:
        return torch.empty((0, num_out), dtype=dtype, device=x.device) if out is None else out
    if config is None:
        if weight.is_contiguous() and x.stride(1) == 1:
            config = choose_config(num_rows, weight.shape[0], weight.shape[1], x.dtype)
        if config is None:
            return linear_by_torch(x, weight, bias, norm, residual, swiglu, rotary, dtype, out)
    if out is None:
        out = torch.empty((num_rows, num_out), dtype=dtype, device=x.device)
    if launch_pdl is None:
        launch_pdl = starts_early(num_rows, weight) and _can_launch_early(x.device)
    if isinstance(config, GemvConfig):
        launch_gemv(
            x, weight, bias, norm, residual, swiglu, rotary, out,
            config=config, launch_pdl=launch_pdl,
        )  # fmt: skip
        return out
    if isinstance(config, GemmConfig):
        x = x if norm is None else rms_norm(x, *norm)
        launch_gemm(
            x, weight, bias, residual, swiglu, rotary, out, config=config, launch_pdl=launch_pdl
        )
        return out
    if norm is not None and (not config.fold_norm or config.splits > 1):
        x, norm = rms_norm(x, *norm), None
    _launch(x, weight, bias, norm, residual, swiglu, rotary, out, config, launch_pdl)
    return out


def choose_config(
    num_rows: int, num_out: int, num_in: int, dtype: torch.dtype
) -> SkinnyConfig | GemvConfig | GemmConfig | None:
    """The fastest kernel for M rows and a [num_out, num_in] weight; None for the matrix library.

    Measured on an H200 with `kernels/bench/linear.py --tune2`, layers of 1B and 8B models.
    """
    config: SkinnyConfig | GemvConfig | GemmConfig | None = None
    if can_gemv(num_rows, num_out, num_in, dtype):
        config = gemv_config(num_rows, num_out, num_in)
    if config is None and can_gemm(num_rows, dtype):
        config = gemm_config(num_rows, num_out, num_in)
    if config is None and num_rows <= MAX_SKINNY_ROWS:
        config = skinny_config(num_rows, num_out, num_in, dtype)
    return config


def starts_early(num_rows: int, weight: Tensor) -> bool:
    """Whether a linear layer starts before the kernel in front of it has ended.

    It then takes registers and shared memory from that one: between four linears of a layer that
    is faster only where both sides of the matrices are large, and rows share them (H200).
    """
    return num_rows > 1 and min(weight.shape) >= 4096


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
    # Measured on an H200, between layers of 1B and 8B models. Weights that come to L2 early are in
    # the way of those that are needed now wherever a kernel has several waves of programs.
    is_large = num_out * num_in >= _LARGE_WEIGHT
    if num_out >= _HEAD_OUTPUTS and rows <= 32:
        tile = (32, 64, 4, 4) if rows <= 16 else (64, 64, 4, 3)
        return SkinnyConfig(*tile, fold_norm=False, prefetch=False)
    if rows > 16 and is_large:
        return None
    if rows > 16:
        return SkinnyConfig(16 if rows == 32 else 32, 64, 4, 3, fold_norm=False)
    if num_out >= _WIDE_OUTPUTS:
        if rows == 16 and num_in >= 4096:
            return None
        tile = (32, 64, 4, 4) if rows == 8 else (64, 64, 4, 3)
        return SkinnyConfig(*tile, fold_norm=fold_norm and num_in < 4096, prefetch=False)
    if num_in >= 8192:
        tile = (16, 128, 8, 3) if rows == 8 else (16, 128, 4, 4)
    elif num_in >= 4096 and is_large:
        tile = (32, 64, 4, 4) if rows == 8 else (64, 64, 4, 3)
    elif num_out > num_in and is_large:
        tile = (64, 64, 4, 3) if rows == 8 else (16, 128, 4, 4)
    else:
        tile = (16, 256, 2, 4) if rows == 8 else (16, 128, 4, 4)
    return SkinnyConfig(*tile, fold_norm=fold_norm and rows == 8, prefetch=False)


@functools.cache
def _can_launch_early(device: torch.device) -> bool:
    return has_dependent_launch(device)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
) -> tuple[int, int]:
    """Return (M, outputs), or raise ValueError naming what does not fit."""
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x must be [M, K] and weight [N, K], got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"x and weight must have one dtype, got {x.dtype} and {weight.dtype}")
    num_rows, (num_out, num_in) = x.shape[0], weight.shape
    if bias is not None:
        check_shape("bias", bias, (num_out,))
    if norm is not None:
        check_shape("norm weight", norm[0], (num_in,))
    if swiglu:
        if num_out % 2:
            raise ValueError(f"swiglu needs a weight of an even number of rows, got {num_out}")
        num_out //= 2
    if residual is not None:
        check_shape("residual", residual, (num_rows, num_out))
        if residual.stride(1) != 1:
            raise ValueError("residual must have a contiguous last dimension")
    if rotary is not None:
        if swiglu or residual is not None:
            raise ValueError("rotary goes with neither swiglu nor residual")
        check_shape("positions", rotary.positions, (num_rows,))
        check_shape("sin_table", rotary.sin_table, tuple(rotary.cos_table.shape))
        if rotary.cos_table.shape[1] != rotary.head_dim or rotary.head_dim % 2:
            raise ValueError(
                f"rotary tables must be [positions, head_dim] with an even head_dim, got "
                f"{tuple(rotary.cos_table.shape)} and head_dim {rotary.head_dim}"
            )
        if rotary.cos_table.stride() != rotary.sin_table.stride() or (
            rotary.cos_table.stride(1) != 1
        ):
            raise ValueError("rotary tables must have equal strides, the last of them 1")
        if rotary.num_heads * rotary.head_dim > num_out:
            raise ValueError(
                f"rotary covers {rotary.num_heads} heads of {rotary.head_dim}, more than the "
                f"{num_out} outputs"
            )
    return num_rows, num_out


def linear_by_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The same by PyTorch's matrix product and the kernels of `pointwise`."""
    if norm is not None:
        x = rms_norm(x, *norm)
    if residual is not None and bias is None and not swiglu and residual.dtype == x.dtype == dtype:
        return torch.addmm(residual, x, weight.t(), out=out)
    is_plain = bias is None and residual is None and rotary is None and not swiglu
    if is_plain and x.is_cuda and dtype == torch.float32 != x.dtype:
        # Not rounded to 16 bits in between.
        product = torch.mm(x, weight.t(), out_dtype=dtype)
        return product if out is None else out.copy_(product)
    result = F.linear(x, weight, bias)
    if swiglu:
        result = swiglu_rows(result)
    if rotary is not None:
        width = rotary.num_heads * rotary.head_dim
        heads = result[:, :width].unflatten(1, (rotary.num_heads, rotary.head_dim))
        apply_rotary_(heads, rotary.cos_table, rotary.sin_table, rotary.positions)
    if residual is not None:
        result = result + residual
    return result.to(dtype) if out is None else out.copy_(result)


def _launch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
    out: Tensor,
    config: SkinnyConfig,
    launch_pdl: bool,
) -> None:
    num_out, num_in = weight.shape
    block_n, half_n = config.block_n, config.block_n // 2
    num_programs = triton.cdiv(num_out, block_n)
    half_dim, num_heads = 0, 0
    if rotary is not None:
        half_dim, num_heads = rotary.head_dim // 2, rotary.num_heads
        rest = num_out - num_heads * rotary.head_dim
        num_programs = num_heads * triton.cdiv(half_dim, half_n) + triton.cdiv(rest, block_n)
    elif swiglu:
        num_programs = triton.cdiv(out.shape[1], half_n)
    num_steps = triton.cdiv(num_in, config.num_warps * config.slice_k)
    split_steps = triton.cdiv(num_steps, config.splits)
    row_bytes = norm_bytes = 0
    if launch_pdl and config.prefetch:
        norm_bytes = num_in * weight.element_size() // (32 * config.num_warps)
        row_bytes = _prefetched_row_bytes(num_in, weight.element_size(), config, split_steps)
    block_m = row_class(x.shape[0])
    partials = None
    if config.splits > 1:
        shape = (config.splits, num_programs, block_n, block_m)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    around = (
        bias,
        residual,
        None if rotary is None else rotary.cos_table,
        None if rotary is None else rotary.sin_table,
        None if rotary is None else rotary.positions,
        out,
        0 if residual is None else residual.stride(0),
        0 if rotary is None else rotary.cos_table.stride(0),
        x.shape[0],
        num_out,
        num_heads,
    )
    early = {"launch_pdl": True} if launch_pdl else {}
    _skinny_kernel[(num_programs, config.splits)](
        x,
        weight,
        None if norm is None else norm[0],
        0.0 if norm is None else norm[1],
        x.stride(0),
        partials,
        *around,
        K=num_in,
        HALF_DIM=half_dim,
        SWIGLU=swiglu,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SLICE_K=config.slice_k,
        SLICES=config.num_warps,
        SPLIT_STEPS=split_steps,
        ROW_BYTES=row_bytes,
        NORM_BYTES=norm_bytes if norm_bytes % 16 == 0 else 0,
        ROTARY_EARLY=rotary is not None
        and rotary.is_settled
        and partials is None
        and block_m * block_n <= MAX_EARLY_ROTARY,
        PDL=launch_pdl,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **early,
    )
    if partials is not None:
        _add_splits_kernel[(num_programs,)](
            partials,
            *around,
            SPLITS=config.splits,
            HALF_DIM=half_dim,
            SWIGLU=swiglu,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            PDL=launch_pdl,
            num_warps=4,
            **early,
        )


def _prefetched_row_bytes(
    num_in: int, element_size: int, config: SkinnyConfig, split_steps: int
) -> int:
    """Bytes that a program prefetches of each of its rows: 16, or a multiple, a thread, or 0."""
    unit = 16 * max(1, 32 * config.num_warps // config.block_n)
    # Rows and threads start on 16 bytes, or nothing is prefetched.
    if num_in * element_size % 16 or config.block_n > 32 * config.num_warps:
        return 0
    # No split reads beyond the row, where for the last row nothing might be.
    last = num_in - (config.splits - 1) * split_steps * config.num_warps * config.slice_k
    return min(max(last, 0) * element_size, PREFETCH_BYTES // config.block_n) // unit * unit


@triton.jit
def _ask_for_l2(addresses, num_bytes):
    """Start to copy num_bytes (a multiple of 16) at each address (a multiple of 16) to L2."""
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
        "=r,l,r",
        [addresses, num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit(do_not_specialize=["num_rows", "num_out", "num_heads"])
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    norm_ptr,
    eps,
    stride_x,
    partials_ptr,
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
    SPLIT_STEPS: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    NORM_BYTES: tl.constexpr,
    ROTARY_EARLY: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_K: tl.constexpr = SLICES * SLICE_K
    tile = tl.program_id(0)
    rows, exists, is_rotated = _tile_rows(tile, num_out, num_heads, HALF_DIM, SWIGLU, BLOCK_N)
    # Rows that do not exist are computed from one that does, and not stored.
    w_rows = weight_ptr + tl.minimum(rows, num_out - 1).to(tl.int64) * K
    first_step = tl.program_id(1) * SPLIT_STEPS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if ROW_BYTES > 0:
            # Every thread a part of a row. Weights are nobody's output.
            PARTS: tl.constexpr = 32 * SLICES // BLOCK_N
            PART_BYTES: tl.constexpr = ROW_BYTES // PARTS
            begin = (w_rows + first_step * BLOCK_K).to(tl.int64)
            begin = begin[:, None] + tl.arange(0, PARTS)[None, :] * PART_BYTES
            _ask_for_l2(begin, tl.full(begin.shape, PART_BYTES, tl.int32))
        if norm_ptr is not None and NORM_BYTES > 0:
            begin = norm_ptr.to(tl.int64) + tl.arange(0, 32 * SLICES) * NORM_BYTES
            _ask_for_l2(begin, tl.full(begin.shape, NORM_BYTES, tl.int32))
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
    end_step = tl.minimum(first_step + SPLIT_STEPS, STEPS) if SPLIT_STEPS < STEPS else STEPS
    for step in tl.range(first_step, end_step, num_stages=STAGES):
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
    if partials_ptr is not None:
        tl.store(_tile_of_split(partials_ptr, tl.program_id(1), BLOCK_N, BLOCK_M), y)
    else:
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


@triton.jit(do_not_specialize=["num_rows", "num_out", "num_heads"])
def _add_splits_kernel(
    partials_ptr,
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
    SPLITS: tl.constexpr,
    HALF_DIM: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    rows, exists, is_rotated = _tile_rows(
        tl.program_id(0), num_out, num_heads, HALF_DIM, SWIGLU, BLOCK_N
    )
    cos, sin = 0.0, 0.0
    if HALF_DIM > 0:
        cos, sin = _load_rotary(
            rows, exists & is_rotated, cos_ptr, sin_ptr, positions_ptr, stride_table, num_rows,
            HALF_DIM, BLOCK_M,
        )  # fmt: skip
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(_tile_of_split(partials_ptr, split, BLOCK_N, BLOCK_M))
    _finish_tile(
        y, rows, exists, is_rotated, cos, sin, bias_ptr, residual_ptr, out_ptr, stride_residual,
        num_rows, num_out, HALF_DIM, SWIGLU,
    )  # fmt: skip


@triton.jit
def _tile_of_split(partials_ptr, split, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Addresses of this program's sums in a split: [BLOCK_N, BLOCK_M]."""
    tile = (split * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
    offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    return partials_ptr + tile * (BLOCK_N * BLOCK_M) + offs
