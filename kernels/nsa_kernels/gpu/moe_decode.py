"""Experts of few rows, at the speed of reading each expert's weights once; the sum over experts.

A program owns BLOCK_N rows of one expert's weight and all of K, and multiplies them with the rows
of x that go to this expert; its warps share K as in `linear.py`. Of up to 8 rows it finds them
among all expert ids itself; of more it reads them from a list sorted by expert. Sums have a fixed
order and no atomics: a row's result does not depend on the others.

T rows, k experts a row, E experts of width I. A pair is a row and one of its experts, t * k + r.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.linear import MAX_SKINNY_ROWS
from nsa_kernels.gpu.moe_route import sort_pairs
from nsa_kernels.gpu.skinny import row_class

MAX_FEW_ROWS = MAX_SKINNY_ROWS

# Rows up to which a program finds its own among all pairs.
_UNSORTED_ROWS = 8
# Elements that a program of the sum handles.
_SUM_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """Tile: block_n rows of a weight, num_warps slices of slice_k columns a step.

    block_m: rows of x at a time. Where more go to one expert, its weights are read again, from L2.
    is_wide: the warps share rows of the weight instead, the wide operand of one matrix instruction,
    and each step has slice_k columns in all.
    """

    block_m: int
    block_n: int
    slice_k: int
    num_warps: int
    num_stages: int
    is_wide: bool = False


def few_rows_class(num_rows: int) -> int:
    """Number of rows that the kernel for `num_rows` is compiled for: 1, 8, 16, 32 or 64."""
    return 1 if num_rows == 1 else row_class(num_rows)


def expert_tile(num_rows: int, dtype: torch.dtype) -> ExpertTile:
    """The tile for T rows; of 8 rows no expert gets more than 8, of 64 hardly ever more than 16."""
    block_m = 8 if few_rows_class(num_rows) <= 8 else 16
    if dtype == torch.float32:
        return ExpertTile(block_m, 16, 16, 4, 2)
    # As of linear layers of these sizes on an H200 (`linear.choose_config`).
    if block_m == 8:
        return ExpertTile(8, 32, 64, 4, 4)
    return ExpertTile(16, 64, 128, 4, 4, is_wide=True)


@triton.jit
def _wide_product(
    w_rows,
    x_rows,
    exists,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """[BLOCK_N, BLOCK_M] fp32: rows of a weight times rows of x, by their addresses."""
    offs_k = tl.arange(0, BLOCK_K)
    w_ptrs = w_rows[:, None] + offs_k[None, :]
    x_ptrs = x_rows[None, :] + offs_k[:, None]
    y = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for step in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
        at = step * BLOCK_K
        if K % BLOCK_K == 0:
            w = tl.load(w_ptrs + at)
            x = tl.load(x_ptrs + at, mask=exists[None, :], other=0.0)
        else:
            inside = at + offs_k < K
            w = tl.load(w_ptrs + at, mask=inside[None, :], other=0.0)
            x = tl.load(x_ptrs + at, mask=exists[None, :] & inside[:, None], other=0.0)
        y = tl.dot(w, x, y, input_precision="ieee")
    return y


@triton.jit(do_not_specialize=["num_pairs"])
def _few_rows_kernel(
    x_ptr,
    weight_ptr,
    ids_ptr,
    pairs_ptr,
    ends_ptr,
    out_ptr,
    num_pairs,
    K: tl.constexpr,
    NUM_OUT: tl.constexpr,
    ROW_PAIRS: tl.constexpr,
    SWIGLU: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLICE_K: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[pair] = weight[expert of pair] @ x[pair // ROW_PAIRS], with SwiGLU if asked.

    Axis 1 of the grid: experts, with pairs_ptr and ends_ptr of `sort_pairs`; or pairs, of which the
    first of each expert works for all.
    """
    HALF_N: tl.constexpr = BLOCK_N // 2
    BLOCK_K: tl.constexpr = SLICES * SLICE_K
    tile, slot = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if pairs_ptr is not None:
        expert = slot
        start = tl.load(ends_ptr + tl.maximum(slot - 1, 0))
        start = tl.where(slot > 0, start, 0)
        count = tl.load(ends_ptr + slot) - start
    else:
        every = tl.arange(0, PAIRS)
        expert = tl.load(ids_ptr + slot)
        ids = tl.load(ids_ptr + every, mask=every < num_pairs, other=-1)
        is_mine = (ids == expert) & (expert >= 0)
        is_first = tl.min(tl.where(is_mine, every, PAIRS), axis=0) == slot
        rank = tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
        count = tl.where(is_first, tl.sum(is_mine.to(tl.int32), axis=0), 0)

    offs = tl.arange(0, BLOCK_N)
    if SWIGLU:
        # Gate and up of one output are in the two halves of the tile.
        cols = tile * HALF_N + offs % HALF_N
        rows = tl.minimum(cols, NUM_OUT - 1) + offs // HALF_N * NUM_OUT
        w_first = expert.to(tl.int64) * (2 * NUM_OUT)
    else:
        cols = tile * BLOCK_N + offs
        rows = tl.minimum(cols, NUM_OUT - 1)
        w_first = expert.to(tl.int64) * NUM_OUT
    w_rows = weight_ptr + (w_first + rows) * K
    # [SLICES, SLICE_K]: columns of a K step, a warp each slice.
    offs_k = tl.arange(0, SLICES)[:, None] * SLICE_K + tl.arange(0, SLICE_K)[None, :]
    w_ptrs = w_rows[None, :, None] + offs_k[:, None, :]
    offs_m = tl.arange(0, BLOCK_M)
    for first_m in range(0, count, BLOCK_M):
        exists = first_m + offs_m < count
        if pairs_ptr is not None:
            pair = tl.load(pairs_ptr + start + first_m + offs_m, mask=exists, other=0)
        else:
            is_ranked = is_mine[:, None] & (rank[:, None] == first_m + offs_m[None, :])
            pair = tl.sum(tl.where(is_ranked, every[:, None], 0), axis=0)
        x_rows = x_ptr + (pair // ROW_PAIRS).to(tl.int64) * K
        if WIDE:
            y = _wide_product(w_rows, x_rows, exists, K, BLOCK_N, BLOCK_M, SLICE_K, STAGES)
        else:
            x_ptrs = x_rows[None, :, None] + offs_k[:, None, :]
            mask_m = exists[None, :, None]
            acc = tl.zeros([SLICES, BLOCK_N, BLOCK_M], tl.float32)
            for step in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
                at = step * BLOCK_K
                if K % BLOCK_K == 0:
                    w = tl.load(w_ptrs + at)
                    x = tl.load(x_ptrs + at, mask=mask_m, other=0.0)
                else:
                    mask_k = (at + offs_k < K)[:, None, :]
                    w = tl.load(w_ptrs + at, mask=mask_k, other=0.0)
                    x = tl.load(x_ptrs + at, mask=mask_m & mask_k, other=0.0)
                acc = tl.dot(w, tl.permute(x, (0, 2, 1)), acc, input_precision="ieee")
            y = tl.sum(acc, axis=0)
        if SWIGLU:
            gate, up = tl.split(tl.permute(tl.reshape(y, [2, HALF_N, BLOCK_M]), (1, 2, 0)))
            y = gate / (1.0 + tl.exp(-gate)) * up
            out_cols = tile * HALF_N + tl.arange(0, HALF_N)
        else:
            out_cols = cols
        out_ptrs = out_ptr + pair.to(tl.int64)[None, :] * NUM_OUT + out_cols[:, None]
        mask = (out_cols < NUM_OUT)[:, None] & exists[None, :]
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


def experts_of_few(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    tiles: tuple[ExpertTile, ExpertTile] | None = None,
    launch_pdl: bool,
) -> Tensor:
    """Return expert(x) of every pair, [T * k, hidden] fp32; nothing is written for id -1.

    x: [T, hidden], at most MAX_FEW_ROWS rows; other arguments as of `moe.routed_experts`. tiles: of
    gate_up and of down; None: by table.
    """
    num_rows, hidden = x.shape
    width, num_pairs = down.shape[2], expert_ids.numel()
    if tiles is None:
        tiles = (expert_tile(num_rows, x.dtype),) * 2
    activations = torch.empty((num_pairs, width), dtype=x.dtype, device=x.device)
    parts = torch.empty((num_pairs, hidden), dtype=torch.float32, device=x.device)
    is_sorted = few_rows_class(num_rows) > _UNSORTED_ROWS
    pairs = sort_pairs(expert_ids, len(down)) if is_sorted else None
    row_pairs = expert_ids.shape[1]
    _launch(x, gate_up, expert_ids, pairs, activations, row_pairs, True, tiles[0], launch_pdl)
    _launch(activations, down, expert_ids, pairs, parts, 1, False, tiles[1], launch_pdl)
    return parts


def _launch(
    x: Tensor,
    weight: Tensor,
    expert_ids: Tensor,
    sorted_pairs: tuple[Tensor, Tensor] | None,
    out: Tensor,
    row_pairs: int,
    swiglu: bool,
    tile: ExpertTile,
    launch_pdl: bool,
) -> None:
    num_rows, top_k = expert_ids.shape
    per_tile = tile.block_n // 2 if swiglu else tile.block_n
    early = {"launch_pdl": True} if launch_pdl else {}
    grid = (
        triton.cdiv(out.shape[1], per_tile),
        num_rows * top_k if sorted_pairs is None else len(weight),
    )
    _few_rows_kernel[grid](
        x,
        weight,
        expert_ids,
        *((None, None) if sorted_pairs is None else sorted_pairs),
        out,
        num_rows * top_k,
        K=weight.shape[2],
        NUM_OUT=out.shape[1],
        ROW_PAIRS=row_pairs,
        SWIGLU=swiglu,
        # By the class, not by the rows: a server compiles for classes.
        PAIRS=triton.next_power_of_2(few_rows_class(num_rows) * top_k)
        if sorted_pairs is None
        else 1,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        SLICE_K=tile.slice_k,
        SLICES=tile.num_warps,
        STAGES=tile.num_stages,
        WIDE=tile.is_wide,
        PDL=launch_pdl,
        num_warps=tile.num_warps,
        **early,
    )


@triton.jit
def _sum_experts_kernel(
    parts_ptr,
    ids_ptr,
    weights_ptr,
    residual_ptr,
    out_ptr,
    HIDDEN: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < HIDDEN
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(TOP_K):
        pair = row * TOP_K + rank
        is_used = tl.load(ids_ptr + pair) >= 0
        weight = tl.load(weights_ptr + pair)
        part = tl.load(parts_ptr + pair * HIDDEN + offs, mask=mask & is_used, other=0.0)
        total += weight * part.to(tl.float32)
    at = row * HIDDEN + offs
    total += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def sum_experts(
    parts: Tensor,
    expert_ids: Tensor,
    weights: Tensor,
    *,
    residual: Tensor,
    out: Tensor,
    launch_pdl: bool,
) -> Tensor:
    """Write residual[t] + sum_r weights[t, r] * parts[t * k + r] to `out`, [T, hidden].

    parts: [T * k, hidden], of which pairs of expert -1 are not read. The sum is in the order of r,
    fp32. residual and out are contiguous and may be the same.
    """
    num_rows, hidden = out.shape
    block = min(_SUM_BLOCK, triton.next_power_of_2(hidden))
    early = {"launch_pdl": True} if launch_pdl else {}
    _sum_experts_kernel[(num_rows, triton.cdiv(hidden, block))](
        parts,
        expert_ids,
        weights,
        residual,
        out,
        HIDDEN=hidden,
        TOP_K=expert_ids.shape[1],
        BLOCK=block,
        PDL=launch_pdl,
        num_warps=4,
        **early,
    )
    return out
