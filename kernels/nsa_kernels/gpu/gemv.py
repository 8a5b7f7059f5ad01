"""Linear layers of one to four rows: every weight goes through registers once, and no further.

A warp owns whole rows of W and has several 16-byte loads of each in flight; its lanes share K, and
add up at the end. There is no shared memory, no barrier and no matrix instruction, so a program is
cheap to start, and under dependent launch the first weights are on their way before the kernel in
front has ended.

Rows of W come in pairs (a, b), what every fusion wants: gate and up of SwiGLU, the two halves of a
rotated head, and, where nothing is fused, the two halves of W.

Legend: M rows of x, K inputs, N outputs (2I rows of W for swiglu: [gate; up]), D = head_dim.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.linear_tile import Rotary

# Inputs that the lanes of a warp take at once, 16 bytes each.
LANES_K = 256
MAX_GEMV_ROWS = 4


@dataclass(frozen=True, slots=True)
class GemvConfig:
    """Tile of the kernel: pairs of rows of a program, a multiple of num_warps; unroll, loads of a
    row in flight together.

    early: ask for the first weights before waiting for the kernel in front.
    """

    pairs: int
    unroll: int
    num_warps: int
    early: bool = True


def can_gemv(num_rows: int, num_out: int, num_in: int, dtype: torch.dtype) -> bool:
    """Whether `launch_gemv` takes these sizes: whole steps of K, pairs of rows, 16-bit numbers."""
    return (
        num_rows <= MAX_GEMV_ROWS
        and num_in % LANES_K == 0
        and num_out % 2 == 0
        and dtype in (torch.bfloat16, torch.float16)
    )


def gemv_config(num_rows: int, num_out: int, num_in: int) -> GemvConfig | None:
    """The tile for M rows and a [num_out, num_in] weight; None where matrix units are faster.

    They are, on an H200, from two rows on, and where W has few rows, each long enough to hide their
    latency.
    """
    is_long = num_in > 4096 and num_out < 4096
    if num_rows > 1 or is_long or num_out > 32768 or num_in % (4 * LANES_K):
        return None
    return GemvConfig(pairs=1 if num_out < 8192 else 2, unroll=4, num_warps=1, early=False)


@triton.jit(do_not_specialize=["num_rows", "num_rotated"])
def _gemv_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    norm_ptr,
    residual_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    out_ptr,
    stride_x,
    stride_residual,
    stride_cos,
    num_rows,
    num_rotated,
    eps,
    NUM_PAIRS: tl.constexpr,
    NUM_IN: tl.constexpr,
    HALF_DIM: tl.constexpr,
    SWIGLU: tl.constexpr,
    ROWS: tl.constexpr,
    PAIRS: tl.constexpr,
    UNROLL: tl.constexpr,
    LANES: tl.constexpr,
    EARLY: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    if USE_PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    is_pair = pair < NUM_PAIRS
    # Programs at the end repeat the last pair, so that no load needs a mask.
    index = tl.minimum(pair, NUM_PAIRS - 1)
    row_a, row_b = index, index + NUM_PAIRS
    if positions_ptr is not None:
        is_rotated = index < num_rotated // 2
        head, place = index // HALF_DIM, index % HALF_DIM
        rest = index + num_rotated // 2
        row_a = tl.where(is_rotated, head * 2 * HALF_DIM + place, rest)
        row_b = tl.where(is_rotated, row_a + HALF_DIM, rest + NUM_PAIRS - num_rotated // 2)
    offs_k = tl.arange(0, UNROLL)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    a_ptrs = weight_ptr + row_a.to(tl.int64)[None, :, None] * NUM_IN + offs_k[:, None, :]
    b_ptrs = weight_ptr + row_b.to(tl.int64)[None, :, None] * NUM_IN + offs_k[:, None, :]
    if EARLY:
        a, b = tl.load(a_ptrs), tl.load(b_ptrs)
    if USE_PDL:
        tl.extra.cuda.gdc_wait()

    rows = tl.arange(0, ROWS)
    in_rows = rows < num_rows
    offs_x = rows[:, None, None] * stride_x + offs_k[None, :, :]
    sum_a = tl.zeros([ROWS, PAIRS, LANES], tl.float32)
    sum_b = tl.zeros([ROWS, PAIRS, LANES], tl.float32)
    squares = tl.zeros([ROWS, LANES], tl.float32)
    STEP: tl.constexpr = UNROLL * LANES
    for start in range(0, NUM_IN, STEP):
        if EARLY:
            a_now, b_now = a, b
            if start + STEP < NUM_IN:
                a, b = tl.load(a_ptrs + start + STEP), tl.load(b_ptrs + start + STEP)
        else:
            a_now, b_now = tl.load(a_ptrs + start), tl.load(b_ptrs + start)
        x = tl.load(x_ptr + offs_x + start, mask=in_rows[:, None, None], other=0.0).to(tl.float32)
        if norm_ptr is not None:
            squares += tl.sum(x * x, axis=1)
            x *= tl.load(norm_ptr + offs_k + start).to(tl.float32)[None, :, :]
        sum_a += tl.sum(a_now.to(tl.float32)[None, :, :, :] * x[:, :, None, :], axis=1)
        sum_b += tl.sum(b_now.to(tl.float32)[None, :, :, :] * x[:, :, None, :], axis=1)

    y_a, y_b = tl.sum(sum_a, axis=2), tl.sum(sum_b, axis=2)  # [ROWS, PAIRS]
    if norm_ptr is not None:
        scale = tl.rsqrt(tl.sum(squares, axis=1) / NUM_IN + eps)
        y_a *= scale[:, None]
        y_b *= scale[:, None]
    if bias_ptr is not None:
        y_a += tl.load(bias_ptr + row_a).to(tl.float32)[None, :]
        y_b += tl.load(bias_ptr + row_b).to(tl.float32)[None, :]
    mask = in_rows[:, None] & is_pair[None, :]
    dtype = out_ptr.dtype.element_ty
    if positions_ptr is not None:
        position = tl.load(positions_ptr + rows, mask=in_rows, other=0).to(tl.int64)
        angle = position[:, None] * stride_cos + place[None, :]
        rotated = mask & is_rotated[None, :]
        cos_a = tl.load(cos_ptr + angle, mask=rotated, other=1.0).to(tl.float32)
        cos_b = tl.load(cos_ptr + angle + HALF_DIM, mask=rotated, other=1.0).to(tl.float32)
        sin_a = tl.load(sin_ptr + angle, mask=rotated, other=0.0).to(tl.float32)
        sin_b = tl.load(sin_ptr + angle + HALF_DIM, mask=rotated, other=0.0).to(tl.float32)
        y_a, y_b = y_a * cos_a + y_b * sin_a, y_b * cos_b + y_a * sin_b
    if SWIGLU:
        y = y_a / (1.0 + tl.exp(-y_a)) * y_b
        if residual_ptr is not None:
            place_r = rows[:, None] * stride_residual + pair[None, :]
            y += tl.load(residual_ptr + place_r, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + rows[:, None] * NUM_PAIRS + pair[None, :], y.to(dtype), mask=mask)
    else:
        if residual_ptr is not None:
            place_r = residual_ptr + rows[:, None] * stride_residual
            y_a += tl.load(place_r + row_a[None, :], mask=mask, other=0.0).to(tl.float32)
            y_b += tl.load(place_r + row_b[None, :], mask=mask, other=0.0).to(tl.float32)
        place_o = out_ptr + rows[:, None] * (2 * NUM_PAIRS)
        tl.store(place_o + row_a[None, :], y_a.to(dtype), mask=mask)
        tl.store(place_o + row_b[None, :], y_b.to(dtype), mask=mask)


def launch_gemv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
    out: Tensor,
    *,
    config: GemvConfig,
    launch_pdl: bool,
) -> None:
    """Write to `out` what `linear` returns, for sizes that `can_gemv`; it has checked the rest."""
    num_rows, (num_out, num_in) = x.shape[0], weight.shape
    num_pairs = num_out // 2
    options = {"launch_pdl": True} if launch_pdl else {}
    _gemv_kernel[(triton.cdiv(num_pairs, config.pairs),)](
        x,
        weight,
        bias,
        None if norm is None else norm[0],
        residual,
        None if rotary is None else rotary.cos_table,
        None if rotary is None else rotary.sin_table,
        None if rotary is None else rotary.positions,
        out,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        0 if rotary is None else rotary.cos_table.stride(0),
        num_rows,
        0 if rotary is None else rotary.num_heads * rotary.head_dim,
        0.0 if norm is None else norm[1],
        NUM_PAIRS=num_pairs,
        NUM_IN=num_in,
        HALF_DIM=1 if rotary is None else rotary.head_dim // 2,
        SWIGLU=swiglu,
        ROWS=triton.next_power_of_2(num_rows),
        PAIRS=config.pairs,
        UNROLL=config.unroll,
        LANES=LANES_K,
        EARLY=config.early,
        USE_PDL=launch_pdl,
        num_warps=config.num_warps,
        **options,
    )
