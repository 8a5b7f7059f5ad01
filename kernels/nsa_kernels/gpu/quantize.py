"""Rows in 8 bits: e4m3 with an fp32 scale each, for matrix products in 8 bits.

T rows, K columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0


@triton.jit
def _quantize_kernel(
    x_ptr,
    norm_ptr,
    out_ptr,
    scale_ptr,
    stride_x,
    eps,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    MAX: tl.constexpr,
    PDL: tl.constexpr,
):
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_K)
    mask = offs < K
    x = tl.load(x_ptr + row * stride_x + offs, mask=mask, other=0.0)
    dtype = x.dtype
    x = x.to(tl.float32)
    if norm_ptr is not None:
        weight = tl.load(norm_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x *= tl.rsqrt(tl.sum(x * x, axis=0) / K + eps)
        # What a norm on its own would hand on.
        x = (x * weight).to(dtype).to(tl.float32)
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-12) / MAX
    tl.store(scale_ptr + row, scale)
    # A quotient that rounding carries beyond the largest number is that number.
    x = tl.minimum(tl.maximum(x / scale, -MAX), MAX)
    tl.store(out_ptr + row * K + offs, x.to(tl.float8e4nv), mask=mask)


def quantize_rows(
    x: Tensor, norm: tuple[Tensor, float] | None = None, *, launch_pdl: bool = False
) -> tuple[Tensor, Tensor]:
    """Return x [T, K] as e4m3 [T, K] and scales [T] fp32: x ~ e4m3 * scale, by row.

    norm: (weight [K], eps) of an RMSNorm that comes first. A row's largest number becomes 448.
    launch_pdl: start before the kernel in front has ended, and wait for it on the device.
    """
    num_rows, num_columns = x.shape
    if x.stride(1) != 1:
        raise ValueError(f"x must have a contiguous last dimension, got stride {x.stride(1)}")
    if norm is not None:
        check_shape("norm weight", norm[0], (num_columns,))
    out = torch.empty((num_rows, num_columns), dtype=E4M3, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    if num_rows:
        block = triton.next_power_of_2(num_columns)
        _quantize_kernel[(num_rows,)](
            x,
            None if norm is None else norm[0],
            out,
            scales,
            x.stride(0),
            0.0 if norm is None else norm[1],
            K=num_columns,
            BLOCK_K=block,
            MAX=E4M3_MAX,
            PDL=launch_pdl,
            num_warps=min(32, max(1, block // 512)),
            **({"launch_pdl": True} if launch_pdl else {}),
        )
    return out, scales
