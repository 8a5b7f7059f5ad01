"""Linear layers in 8 bits: y = x @ W^T of e4m3 numbers, with an fp32 scale for each row of both.

Few rows run at the speed of reading W, in the manner of `skinny.py`: a program owns BLOCK_N rows of
W and all of K, which its warps share. More rows are PyTorch's scaled product. Both multiply the
same 8-bit numbers and add in fp32, so a token gets the same result up to the order of sums,
whatever step it is in.

Legend: M rows of x, K inputs, N outputs (2I rows of W for swiglu: [gate; up]), D = head_dim.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape
from nsa_kernels.gpu.linear import MAX_SKINNY_ROWS
from nsa_kernels.gpu.linear_tile import (
    Rotary,
    _finish_tile,
    _load_rotary,
    _tile_rows,
    count_tiles,
    tile_arguments,
)
from nsa_kernels.gpu.plan import has_dependent_launch
from nsa_kernels.gpu.pointwise import apply_rotary_
from nsa_kernels.gpu.pointwise import swiglu as swiglu_rows
from nsa_kernels.gpu.quantize import E4M3, quantize_rows
from nsa_kernels.gpu.skinny import row_class

# Sides of W are multiples of it: what the matrix instructions of 8 bits take.
FP8_MULTIPLE = 16
# Bytes of W that a program asks for before it waits for the kernel in front.
_PREFETCH_BYTES = 64 << 10
_NUM_WARPS = 4


def linear_fp8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual: Tensor | None = None,
    swiglu: bool = False,
    rotary: Rotary | None = None,
) -> Tensor:
    """Return x @ (weight * weight_scale)^T + bias in the dtype of x: [M, N], for any M.

    x: [M, K], quantized by row on the way. weight: [N, K] e4m3, weight_scale: [N] fp32. The rest
    as for `linear.linear`. A row's result does not depend on the rows beside it.

    Raises ValueError when weight is not e4m3, not contiguous or not of multiples of 16, or a shape
    does not fit.
    """
    num_out, num_in = weight.shape
    check_shape("x", x, (len(x), num_in))
    check_shape("weight_scale", weight_scale, (num_out,))
    if weight.dtype != E4M3 or not weight.is_contiguous():
        raise ValueError(f"weight must be contiguous and {E4M3}, got {weight.dtype}")
    if num_out % FP8_MULTIPLE or num_in % FP8_MULTIPLE:
        raise ValueError(
            f"the sides of weight must be multiples of {FP8_MULTIPLE}, got {tuple(weight.shape)}"
        )
    width = num_out // 2 if swiglu else num_out
    if residual is not None:
        check_shape("residual", residual, (len(x), width))
    if len(x) == 0:
        return x.new_empty(0, width)
    launch_pdl = has_dependent_launch(x.device)
    x8, x_scale = quantize_rows(x, norm, launch_pdl=launch_pdl)
    if len(x) <= MAX_SKINNY_ROWS:
        out = x.new_empty(len(x), width)
        scales = (x_scale, weight_scale)
        _launch(x8, weight, scales, bias, residual, swiglu, rotary, out, launch_pdl)
        return out
    out = scaled_mm(x8, weight, x_scale, weight_scale, bias, dtype=x.dtype)
    if swiglu:
        out = swiglu_rows(out)
    if rotary is not None:
        rotated = rotary.num_heads * rotary.head_dim
        apply_rotary_(
            out[:, :rotated].unflatten(1, (rotary.num_heads, rotary.head_dim)),
            rotary.cos_table,
            rotary.sin_table,
            rotary.positions,
        )
    return out if residual is None else out.add_(residual)


def scaled_mm(
    x: Tensor,
    weight: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Return x weight^T + bias, [M, N] of `dtype`, of e4m3 x [M, K] and weight [N, K].

    x_scale: [M], weight_scale: [N], fp32, by row. Sums are fp32: fast accumulation loses bits over
    thousands of inputs.
    """
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale[:, None],
        scale_b=weight_scale[None, :],
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=False,
    )


def _launch(
    x: Tensor,
    weight: Tensor,
    scales: tuple[Tensor, Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
    out: Tensor,
    launch_pdl: bool,
) -> None:
    num_out, num_in = weight.shape
    block_m = row_class(len(x))
    block_n, slice_k, num_stages = _tile(block_m, num_out, num_in)
    num_tiles = count_tiles(num_out, block_n, swiglu=swiglu, rotary=rotary)
    # Threads ask for 16 bytes, or a multiple, of a row each.
    unit = 16 * (32 * _NUM_WARPS // block_n)
    early = {"launch_pdl": True} if launch_pdl else {}
    _linear_fp8_kernel[(num_tiles,)](
        x,
        weight,
        *scales,
        **tile_arguments(weight, bias, residual, swiglu, rotary, out),
        K=num_in,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SLICE_K=slice_k,
        SLICES=_NUM_WARPS,
        ROW_BYTES=min(num_in, _PREFETCH_BYTES // block_n) // unit * unit,
        PDL=launch_pdl,
        STAGES=num_stages,
        num_warps=_NUM_WARPS,
        **early,
    )


def _tile(block_m: int, num_out: int, num_in: int) -> tuple[int, int, int]:
    """Return (BLOCK_N, SLICE_K, stages): as many bytes in flight as `linear` has in 16 bits."""
    if block_m <= 16:
        block_n = 32 if num_out >= 16384 else 16
        return block_n, min(4096 // block_n, triton.next_power_of_2(num_in)), 4
    # Every program reads all of x, too: so wide tiles where there are many.
    block_n = 64 if num_out >= 64 * 132 else 32
    return block_n, 128 if block_m == 32 else 64, 3


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
def _linear_fp8_kernel(
    x_ptr,
    weight_ptr,
    x_scale_ptr,
    weight_scale_ptr,
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
    ROW_BYTES: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCK_K: tl.constexpr = SLICES * SLICE_K
    rows, exists, is_rotated = _tile_rows(
        tl.program_id(0), num_out, num_heads, HALF_DIM, SWIGLU, BLOCK_N
    )
    # Rows that do not exist are computed from one that does, and not stored.
    safe_rows = tl.minimum(rows, num_out - 1)
    w_rows = weight_ptr + safe_rows.to(tl.int64) * K
    # Weights and their scales are nobody's output: they are asked for before the wait.
    weight_scale = tl.load(weight_scale_ptr + safe_rows)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if ROW_BYTES > 0:
            PARTS: tl.constexpr = 32 * SLICES // BLOCK_N
            PART_BYTES: tl.constexpr = ROW_BYTES // PARTS
            begin = w_rows.to(tl.int64)[:, None] + tl.arange(0, PARTS)[None, :] * PART_BYTES
            _ask_for_l2(begin, tl.full(begin.shape, PART_BYTES, tl.int32))
        tl.extra.cuda.gdc_wait()

    offs_m = tl.arange(0, BLOCK_M)
    mask_m = (offs_m < num_rows)[None, :, None]
    # [SLICES, SLICE_K]: columns of a K step, a warp each slice.
    offs_k = tl.arange(0, SLICES)[:, None] * SLICE_K + tl.arange(0, SLICE_K)[None, :]
    w_ptrs = w_rows[None, :, None] + offs_k[:, None, :]
    x_ptrs = x_ptr + offs_m.to(tl.int64)[None, :, None] * K + offs_k[:, None, :]
    acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
    for step in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
        first = step * BLOCK_K
        if K % BLOCK_K == 0:
            w = tl.load(w_ptrs + first)
            x = tl.load(x_ptrs + first, mask=mask_m, other=0.0)
        else:
            mask_k = (first + offs_k < K)[:, None, :]
            w = tl.load(w_ptrs + first, mask=mask_k, other=0.0)
            x = tl.load(x_ptrs + first, mask=mask_m & mask_k, other=0.0)
        # Exact in 16 bits, where one instruction converts two numbers.
        w, x = w.to(tl.float16), x.to(tl.float16)
        acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc)

    x_scale = tl.load(x_scale_ptr + offs_m, mask=offs_m < num_rows, other=0.0)
    y = tl.sum(acc, axis=0) * (weight_scale[:, None] * x_scale[None, :])
    cos, sin = 0.0, 0.0
    if HALF_DIM > 0:
        cos, sin = _load_rotary(
            rows, exists & is_rotated, cos_ptr, sin_ptr, positions_ptr, stride_table, num_rows,
            HALF_DIM, BLOCK_M,
        )  # fmt: skip
    _finish_tile(
        y, rows, exists, is_rotated, cos, sin, bias_ptr, residual_ptr, out_ptr, stride_residual,
        num_rows, num_out, HALF_DIM, SWIGLU,
    )  # fmt: skip
