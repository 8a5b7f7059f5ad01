"""Small operators of a transformer layer, one pass over memory each.

T tokens. Computed in fp32; where PyTorch's operators would round between two steps, so do these.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape

# Elements that a program of 4 warps handles at once: 16 bytes a thread and load, four times.
BLOCK = 2048


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    stride_x,
    stride_residual,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ADD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_D)
    mask = offs < HIDDEN
    # Asked for before the row, which another kernel may still be writing to the L2 cache.
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + token * stride_x + offs, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + token * stride_residual + offs, mask=mask, other=0.0)
        total = (x + residual.to(tl.float32)).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + token * HIDDEN + offs, total, mask=mask)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / HIDDEN + eps)
    out = (x * scale * weight).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * HIDDEN + offs, out, mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight: [T, hidden], [hidden] -> [T, hidden]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_rms_norm(x, None, weight, out, None, eps)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return rms_norm(s) and s = x + residual, rounded: [T, hidden] each."""
    check_shape("residual", residual, tuple(x.shape))
    out, total = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _launch_rms_norm(x, residual, weight, out, total, eps)
    return out, total


def _launch_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    out: Tensor,
    total: Tensor | None,
    eps: float,
) -> None:
    num_tokens, hidden = x.shape
    check_shape("weight", weight, (hidden,))
    if num_tokens == 0:
        return
    block = triton.next_power_of_2(hidden)
    _rms_norm_kernel[(num_tokens,)](
        x,
        residual,
        weight,
        out,
        total,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        eps,
        HIDDEN=hidden,
        BLOCK_D=block,
        ADD=residual is not None,
        num_warps=min(32, max(1, block // 512)),
    )


@triton.jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    stride_t,
    stride_h,
    stride_cos,
    stride_sin,
    num_heads,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs = tl.arange(0, BLOCK_D)
    in_half = offs < HALF
    row = token
    if positions_ptr is not None:
        row = tl.load(positions_ptr + token).to(tl.int64)
    cos_row, sin_row = cos_ptr + row * stride_cos + offs, sin_ptr + row * stride_sin + offs
    cos_low = tl.load(cos_row, mask=in_half, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos_row + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin_row, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin_row + HALF, mask=in_half, other=0.0).to(tl.float32)[None, :]
    x_rows = x_ptr + token * stride_t + heads[:, None] * stride_h + offs[None, :]
    mask = (heads < num_heads)[:, None] & in_half[None, :]
    dtype = x_ptr.dtype.element_ty
    low = tl.load(x_rows, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(x_rows + HALF, mask=mask, other=0.0).to(tl.float32)
    # PyTorch rounds x * cos, and adds the other product to that.
    new_low = (low * cos_low).to(dtype).to(tl.float32) + high * sin_low
    new_high = (high * cos_high).to(dtype).to(tl.float32) + low * sin_high
    tl.store(x_rows, new_low.to(dtype), mask=mask)
    tl.store(x_rows + HALF, new_high.to(dtype), mask=mask)


def apply_rotary_(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    """Rotate x [T, heads, D] in place, x * cos + roll(x, D/2) * sin, and return it.

    cos, sin: [T, D], the sign of the rotation in the sine ("NeoX" halves); or tables
    [max_positions, D], of which positions [T] (int32 or int64, on the device) are taken. x may be a
    view of a fused projection: the heads of queries and keys that lie side by side are rotated in
    one pass.
    """
    num_tokens, num_heads, dim = x.shape
    if positions is not None:
        check_shape("positions", positions, (num_tokens,))
    num_angles = num_tokens if positions is None else cos.shape[0]
    check_shape("cos", cos, (num_angles, dim))
    check_shape("sin", sin, (num_angles, dim))
    if dim % 2 or x.stride(2) != 1:
        raise ValueError(
            "x must have an even last dimension that is contiguous, got "
            f"{dim} elements with stride {x.stride(2)}"
        )
    if num_tokens == 0:
        return x
    block_d = triton.next_power_of_2(dim // 2)
    block_h = min(triton.next_power_of_2(num_heads), max(1, BLOCK // 2 // block_d))
    _rotary_kernel[(num_tokens, triton.cdiv(num_heads, block_h))](
        x,
        cos,
        sin,
        positions,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        num_heads,
        HALF=dim // 2,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return x


@triton.jit
def _swiglu_kernel(gate_up_ptr, out_ptr, stride_t, SIZE: tl.constexpr, BLOCK_I: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = offs < SIZE
    row = gate_up_ptr + token * stride_t + offs
    gate = tl.load(row, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(row + SIZE, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    silu = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + token * SIZE + offs, (silu * up).to(dtype), mask=mask)


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up of gate_up = [gate | up]: [T, 2 * I] -> [T, I]."""
    num_tokens, both = gate_up.shape
    if both % 2:
        raise ValueError(f"gate_up must have an even last dimension, got {both}")
    size = both // 2
    out = torch.empty((num_tokens, size), dtype=gate_up.dtype, device=gate_up.device)
    if num_tokens == 0:
        return out
    block = min(BLOCK, triton.next_power_of_2(size))
    _swiglu_kernel[(num_tokens, triton.cdiv(size, block))](
        gate_up,
        out,
        gate_up.stride(0),
        SIZE=size,
        BLOCK_I=block,
        num_warps=4,
    )
    return out
