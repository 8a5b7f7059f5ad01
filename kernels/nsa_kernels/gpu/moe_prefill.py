"""Experts of many rows: grouped matrix products over pairs that are sorted by expert.

The number of tiles is a bound by shapes alone; a program finds its expert in the prefix sums that
are on the device, and ends where there is no tile for it.

T rows, k experts a row, E experts of width I, pairs t * k + r.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.pointwise import swiglu

# Pairs from which tiles are 128 rows: an expert of an even share then fills one or more.
_TALL_PAIRS_PER_EXPERT = 96


@dataclass(frozen=True, slots=True)
class GroupedTile:
    """Tile: block_m pairs by block_n outputs (of each of gate and up), block_k inputs a step."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def grouped_tiles(
    num_pairs: int, num_experts: int, dtype: torch.dtype
) -> tuple[GroupedTile, GroupedTile]:
    """The tiles of gate_up and of down: one pair of them for chunks, one for long prompts."""
    if dtype == torch.float32:
        return (GroupedTile(64, 32, 32, 4, 2),) * 2
    if num_pairs < _TALL_PAIRS_PER_EXPERT * num_experts:
        return GroupedTile(64, 64, 64, 4, 4), GroupedTile(64, 128, 64, 4, 4)
    return GroupedTile(128, 128, 64, 8, 4), GroupedTile(128, 256, 64, 8, 4)


@triton.jit
def _tile_of(
    tile, ends_ptr, NUM_EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Return (expert, first place, end of the expert's places); NUM_EXPERTS: there is no tile."""
    experts = tl.arange(0, BLOCK_E)
    exists = experts < NUM_EXPERTS
    ends = tl.load(ends_ptr + experts, mask=exists, other=0)
    starts = tl.load(ends_ptr + experts - 1, mask=exists & (experts > 0), other=0)
    num_tiles = tl.where(exists, (ends - starts + BLOCK_M - 1) // BLOCK_M, 0)
    last_tiles = tl.cumsum(num_tiles, axis=0)
    expert = tl.sum((exists & (last_tiles <= tile)).to(tl.int32), axis=0)
    is_mine = experts == expert
    start = tl.sum(tl.where(is_mine, starts, 0), axis=0)
    end = tl.sum(tl.where(is_mine, ends, 0), axis=0)
    number = tile - tl.sum(tl.where(is_mine, last_tiles - num_tiles, 0), axis=0)
    return expert, start + number * BLOCK_M, end


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_gate_up_kernel(
    x_ptr,
    weight_ptr,
    pairs_ptr,
    ends_ptr,
    out_ptr,
    num_rows,
    K: tl.constexpr,
    NUM_OUT: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[place] = silu(gate x) * (up x), x the row of the pair at the place."""
    TILES_N: tl.constexpr = (NUM_OUT + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    expert, first, end = _tile_of(pid // TILES_N, ends_ptr, NUM_EXPERTS, BLOCK_E, BLOCK_M)
    if expert >= NUM_EXPERTS:
        return
    places = first + tl.arange(0, BLOCK_M)
    exists = places < end
    pair = tl.load(pairs_ptr + places, mask=exists, other=0)
    cols = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (pair // TOP_K).to(tl.int64)[:, None] * K + offs_k[None, :]
    w_ptr = weight_ptr + expert.to(tl.int64) * (2 * NUM_OUT * K)
    # Columns that do not exist are computed from one that does, and not stored.
    gate_ptrs = w_ptr + tl.minimum(cols, NUM_OUT - 1)[None, :] * K + offs_k[:, None]
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
        at = step * BLOCK_K
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + at)
            w_gate = tl.load(gate_ptrs + at)
            w_up = tl.load(gate_ptrs + at + NUM_OUT * K)
        else:
            inside = at + offs_k < K
            x = tl.load(x_ptrs + at, mask=inside[None, :], other=0.0)
            w_gate = tl.load(gate_ptrs + at, mask=inside[:, None], other=0.0)
            w_up = tl.load(gate_ptrs + at + NUM_OUT * K, mask=inside[:, None], other=0.0)
        gate = tl.dot(x, w_gate, gate, input_precision="ieee")
        up = tl.dot(x, w_up, up, input_precision="ieee")
    y = gate / (1.0 + tl.exp(-gate)) * up
    out_ptrs = out_ptr + places.to(tl.int64)[:, None] * NUM_OUT + cols[None, :]
    mask = exists[:, None] & (cols < NUM_OUT)[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _grouped_down_kernel(
    x_ptr,
    weight_ptr,
    pairs_ptr,
    ends_ptr,
    out_ptr,
    num_rows,
    K: tl.constexpr,
    NUM_OUT: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """out[pair at the place] = weight x[place]."""
    TILES_N: tl.constexpr = (NUM_OUT + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    expert, first, end = _tile_of(pid // TILES_N, ends_ptr, NUM_EXPERTS, BLOCK_E, BLOCK_M)
    if expert >= NUM_EXPERTS:
        return
    places = first + tl.arange(0, BLOCK_M)
    exists = places < end
    pair = tl.load(pairs_ptr + places, mask=exists, other=0)
    cols = pid % TILES_N * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = tl.minimum(places, num_rows - 1).to(tl.int64)
    x_ptrs = x_ptr + x_rows[:, None] * K + offs_k[None, :]
    w_ptr = weight_ptr + expert.to(tl.int64) * (NUM_OUT * K)
    w_ptrs = w_ptr + tl.minimum(cols, NUM_OUT - 1)[None, :] * K + offs_k[:, None]
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(0, (K + BLOCK_K - 1) // BLOCK_K, num_stages=STAGES):
        at = step * BLOCK_K
        if K % BLOCK_K == 0:
            x = tl.load(x_ptrs + at)
            w = tl.load(w_ptrs + at)
        else:
            inside = at + offs_k < K
            x = tl.load(x_ptrs + at, mask=inside[None, :], other=0.0)
            w = tl.load(w_ptrs + at, mask=inside[:, None], other=0.0)
        y = tl.dot(x, w, y, input_precision="ieee")
    out_ptrs = out_ptr + pair.to(tl.int64)[:, None] * NUM_OUT + cols[None, :]
    mask = exists[:, None] & (cols < NUM_OUT)[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)


def experts_of_many(
    x: Tensor,
    pairs: Tensor,
    ends: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    tiles: tuple[GroupedTile, GroupedTile] | None = None,
) -> Tensor:
    """Return expert(x) of every pair, [T * k, hidden] in x's dtype; nothing for id -1.

    x: [T, hidden]. pairs, ends: of `moe_route.sort_pairs`; other arguments as of
    `moe.routed_experts`. tiles: of gate_up and of down; None: by table.
    """
    num_experts, _, hidden = gate_up.shape
    num_pairs, width = len(pairs), down.shape[2]
    if tiles is None:
        tiles = grouped_tiles(num_pairs, num_experts, x.dtype)
    activations = torch.empty((num_pairs, width), dtype=x.dtype, device=x.device)
    parts = torch.empty((num_pairs, hidden), dtype=x.dtype, device=x.device)
    common = {"NUM_EXPERTS": num_experts, "BLOCK_E": triton.next_power_of_2(num_experts)}
    _grouped_gate_up_kernel[_grid(num_pairs, num_experts, width, tiles[0])](
        x,
        gate_up,
        pairs,
        ends,
        activations,
        num_pairs,
        K=hidden,
        NUM_OUT=width,
        TOP_K=num_pairs // len(x),
        **common,
        **_sizes(tiles[0]),
    )
    _grouped_down_kernel[_grid(num_pairs, num_experts, hidden, tiles[1])](
        activations,
        down,
        pairs,
        ends,
        parts,
        num_pairs,
        K=width,
        NUM_OUT=hidden,
        **common,
        **_sizes(tiles[1]),
    )
    return parts


def _grid(num_pairs: int, num_experts: int, num_out: int, tile: GroupedTile) -> tuple[int]:
    """Enough programs for any split of the pairs among experts."""
    most_tiles = num_pairs // tile.block_m + min(num_experts, num_pairs)
    return (most_tiles * triton.cdiv(num_out, tile.block_n),)


def _sizes(tile: GroupedTile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "STAGES": tile.num_stages,
        "num_warps": tile.num_warps,
    }


def experts_by_torch(
    x: Tensor, pairs: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """Return what `experts_of_many` does, by PyTorch's grouped matrix product.

    bf16 only, hidden and I multiples of 8; every pair must have an expert.
    """
    num_pairs = len(pairs)
    rows = x.index_select(0, pairs // (num_pairs // len(x)))
    both = torch._grouped_mm(rows, gate_up.transpose(1, 2), offs=ends)
    sorted_parts = torch._grouped_mm(swiglu(both), down.transpose(1, 2), offs=ends)
    return torch.empty_like(rows).index_copy_(0, pairs.long(), sorted_parts)
