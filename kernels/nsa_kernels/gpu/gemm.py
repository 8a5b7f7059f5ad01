"""Linear layers of up to 64 rows by matrix instructions of a warp group.

Here W is the wide operand: a program multiplies BLOCK_N rows of it, 64 or more, by all rows of x,
both from shared memory, so that nothing passes through registers on the way. Where that gives too
few programs, SPLITS of them share the columns of a tile; the last of them to arrive adds all sums,
in the order of the columns, and finishes the tile. So a result depends neither on who was last nor
on the other rows of x.

Legend: M rows of x, K inputs, N outputs (2I rows of W for swiglu: [gate; up]), D = head_dim.
"""

import functools
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

# Rows of x that one compiled kernel takes, padded: a warp group's instructions need 16.
GEMM_ROW_CLASSES = (16, 32, 64)
# Sizes at which the fastest kernel changes: elements of a weight that keeps all multiprocessors
# busy, outputs of a pair of MLP matrices and of a head; and the multiprocessors of an H200.
_LARGE_WEIGHT = 1 << 22
_WIDE_OUTPUTS, _HEAD_OUTPUTS = 16384, 1 << 16
_NUM_PROGRAMS = 132
# Tiles of a launch with splits: each has a counter.
MAX_SPLIT_TILES = 4096


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """Tile of the kernel: BLOCK_N rows of W, block_k columns a step.

    Warp-group instructions need 4 warps and 64 rows, or multiples; a tile of fewer gets those of a
    warp. splits: programs that share the columns of a tile. fold_norm: compute the norm inside, not
    in a kernel before.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    fold_norm: bool = False


def can_gemm(num_rows: int, dtype: torch.dtype) -> bool:
    """Whether `launch_gemm` takes so many rows of this dtype."""
    return num_rows <= GEMM_ROW_CLASSES[-1] and dtype in (torch.bfloat16, torch.float16)


def gemm_config(num_rows: int, num_out: int, num_in: int) -> GemmConfig | None:
    """The tile for M rows and a [num_out, num_in] weight; None where another kernel is faster.

    Measured on an H200: up to 10 % less time than the matrix library from 17 rows on, and for wide
    weights from two. The same for all rows of a class of `linear`.
    """
    if num_rows < 2 or num_rows > 32 or num_out * num_in < _LARGE_WEIGHT:
        return None
    is_wide, is_head = num_out >= _WIDE_OUTPUTS, num_out >= _HEAD_OUTPUTS
    if num_rows <= 8:
        is_faster = is_wide and not is_head and num_in >= 4096
    elif num_rows <= 16:
        is_faster = is_wide or (num_out > num_in and num_in >= 4096)
    else:
        is_faster = is_wide or num_in >= 4096
    if not is_faster:
        return None
    block_n = 64
    # A power of two, so that none has fewer steps.
    splits = triton.next_power_of_2(max(1, _NUM_PROGRAMS // triton.cdiv(num_out, block_n)))
    return GemmConfig(block_n=block_n, block_k=128, num_warps=4, num_stages=4, splits=splits)


def launch_gemm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: tuple[Tensor, float] | None,
    residual: Tensor | None,
    swiglu: bool,
    rotary: Rotary | None,
    out: Tensor,
    *,
    config: GemmConfig,
    launch_pdl: bool,
) -> None:
    """Write to `out` what `linear` returns, for `can_gemm`; it has checked the rest.

    Launches with splits must follow one another, on one stream: they share counters.
    Raises ValueError for sizes that it does not take, and splits of too many tiles.
    """
    if not can_gemm(x.shape[0], x.dtype):
        raise ValueError(
            f"x must be bf16 or fp16 of at most {GEMM_ROW_CLASSES[-1]} rows, got {x.dtype} of "
            f"{x.shape[0]}"
        )
    num_in, block_n = weight.shape[1], config.block_n
    num_tiles = count_tiles(weight.shape[0], block_n, swiglu=swiglu, rotary=rotary)
    block_m = next(size for size in GEMM_ROW_CLASSES if size >= x.shape[0])
    # As few splits as take no more steps each: none is empty.
    num_steps = triton.cdiv(num_in, config.block_k)
    splits = triton.cdiv(num_steps, triton.cdiv(num_steps, config.splits))
    partials = counters = None
    if splits > 1:
        if num_tiles > MAX_SPLIT_TILES:
            raise ValueError(f"{num_tiles} tiles are too many to split: {MAX_SPLIT_TILES} at most")
        # With the norm inside, one row more: sums of squares.
        shape = (splits, num_tiles, block_n + (norm is not None), block_m)
        partials = torch.empty(shape, dtype=torch.float32, device=x.device)
        counters = _make_counters(x.device)
    options = {"launch_pdl": True} if launch_pdl else {}
    _gemm_kernel[(num_tiles, splits)](
        x,
        weight,
        None if norm is None else norm[0],
        0.0 if norm is None else norm[1],
        x.stride(0),
        partials,
        counters,
        **tile_arguments(weight, bias, residual, swiglu, rotary, out),
        K=num_in,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=config.block_k,
        SPLITS=splits,
        PDL=launch_pdl,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
        **options,
    )


def _make_counters(device: torch.device) -> Tensor:
    """[MAX_SPLIT_TILES] int32, zero between kernels.

    Kept, so that no launch has to clear them: every kernel waits for the one in front before it
    counts, and leaves zeros. A graph that is captured before they exist has its own.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)
    return _kept_counters(device)


@functools.cache
def _kept_counters(device: torch.device) -> Tensor:
    return torch.zeros(MAX_SPLIT_TILES, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["num_rows", "num_out", "num_heads"])
def _gemm_kernel(
    x_ptr,
    weight_ptr,
    norm_ptr,
    eps,
    stride_x,
    partials_ptr,  # [SPLITS, tiles, BLOCK_N (+ 1 with norm), BLOCK_M], None without splits
    counters_ptr,  # [tiles or more], zeros
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
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
    STAGES: tl.constexpr,
):
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    SPLIT_STEPS: tl.constexpr = (STEPS + SPLITS - 1) // SPLITS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile, split = tl.program_id(0), tl.program_id(1)
    rows, exists, is_rotated = _tile_rows(tile, num_out, num_heads, HALF_DIM, SWIGLU, BLOCK_N)
    offs_m, offs_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    # Rows that do not exist, of W or x, are computed from ones that do, and not stored.
    w_rows = weight_ptr + tl.minimum(rows, num_out - 1).to(tl.int64) * K
    w_ptrs = w_rows[:, None] + offs_k[None, :]
    x_rows = x_ptr + tl.minimum(offs_m, num_rows - 1).to(tl.int64) * stride_x
    x_ptrs = x_rows[:, None] + offs_k[None, :]
    first_step = split * SPLIT_STEPS if SPLITS > 1 else 0
    end_step = first_step + SPLIT_STEPS
    if STEPS % SPLITS != 0:
        end_step = tl.minimum(end_step, STEPS)
    if PDL:
        tl.extra.cuda.gdc_wait()

    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    squares = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for step in tl.range(first_step, end_step, num_stages=STAGES):
        w = _load_step(w_ptrs, step, offs_k, K, BLOCK_K)
        x = _load_step(x_ptrs, step, offs_k, K, BLOCK_K)
        if norm_ptr is not None:
            norm = _load_step((norm_ptr + offs_k)[None, :], step, offs_k, K, BLOCK_K)
            x32 = x.to(tl.float32)
            squares += x32 * x32
            x = (x32 * norm.to(tl.float32)).to(x_ptr.dtype.element_ty)
        acc = tl.dot(w, tl.trans(x), acc)
    sums = tl.sum(squares, axis=1)

    is_last = True
    if SPLITS > 1:
        TILE: tl.constexpr = (BLOCK_N if norm_ptr is None else BLOCK_N + 1) * BLOCK_M
        stride = tl.num_programs(0).to(tl.int64) * TILE
        sum_ptrs = partials_ptr + tile.to(tl.int64) * TILE + BLOCK_N * BLOCK_M + offs_m
        offs = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + offs_m[None, :]
        tile_ptrs = partials_ptr + tile.to(tl.int64) * TILE + offs
        tl.store(tile_ptrs + split * stride, acc)
        if norm_ptr is not None:
            tl.store(sum_ptrs + split * stride, sums)
        # The barrier orders every thread's stores before the one atomic that releases them.
        tl.debug_barrier()
        is_last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == SPLITS - 1
    if is_last:
        if SPLITS > 1:
            tl.store(counters_ptr + tile, 0)
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            sums = tl.zeros([BLOCK_M], tl.float32)
            for other in tl.static_range(SPLITS):
                acc += tl.load(tile_ptrs + other * stride, cache_modifier=".cg")
                if norm_ptr is not None:
                    sums += tl.load(sum_ptrs + other * stride, cache_modifier=".cg")
        if norm_ptr is not None:
            acc *= tl.rsqrt(sums / K + eps)[None, :]
        cos, sin = 0.0, 0.0
        if HALF_DIM > 0:
            cos, sin = _load_rotary(
                rows, exists & is_rotated, cos_ptr, sin_ptr, positions_ptr, stride_table, num_rows,
                HALF_DIM, BLOCK_M,
            )  # fmt: skip
        _finish_tile(
            acc, rows, exists, is_rotated, cos, sin, bias_ptr, residual_ptr, out_ptr,
            stride_residual, num_rows, num_out, HALF_DIM, SWIGLU,
        )  # fmt: skip


@triton.jit
def _load_step(ptrs, step, offs_k, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load a step's columns, 0 beyond K."""
    if K % BLOCK_K == 0:
        return tl.load(ptrs + step * BLOCK_K)
    return tl.load(ptrs + step * BLOCK_K, mask=(step * BLOCK_K + offs_k < K)[None, :], other=0.0)
