"""Block scores of prefill chunks in a pass of their own, summed over the heads of a group.

`prefill_cmp` can leave scores behind for selection while it attends, but only head by head and
relative to a maximum: the log-sum-exp, which differs from head to head, is known after the last
key alone. Here it is known. The product with the keys and its exponential are taken once more, in
exchange a program adds up the heads in registers and writes one number a block instead of G, whose
write and read cost more than the product (paper, Eq. 8 to 10; `reference.block_scores`).

The product is transposed, entries x (token, head) pairs, and the pairs are ordered so that a thread
of a Hopper matrix instruction, which has columns 8 i + 2 c + {0, 1} for one c in 0..3, holds all
heads of a token: the sum needs no other thread.

Legend: T tokens of the step, R tokens of the sub-chunk, B rows, HQ query heads, H KV heads,
G = HQ // H, D width of keys, P pages of the longest row, E compressed entries a page, NU blocks, or
for max pooling compressed entries, that the workspace has room for. Window j is flat entry
e = j + l/d - 1.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.checks import check_shape
from nsa_kernels.gpu.common import (
    LOG2E,
    block_h,
    prefill_block_q,
    score_tile_entries,
    split_dim,
)
from nsa_kernels.gpu.prefill_cmp import NARROW_LIMIT, _load_tile
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec


@dataclass(frozen=True, slots=True)
class GroupScores:
    """Scores of R tokens for block selection, summed over the heads of each group; fp32.

    units: [R, H, NU]. Score map "overlap": the sum over a block's entries of their probability
        times the strides that window and block share. "max_pool": the probability of every entry.
    spill: [R, H, NU], what a block's entries add to the block before it; None when windows do not
        overlap (l = d) and for "max_pool".
    What begins at or after a token's visible entries, (position + 1) // d, may be unwritten, and so
    is all of a token that sees no more blocks than are selected.
    """

    units: Tensor
    spill: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreTuning:
    """What changes the speed of `prefill_scores` and not its result.

    row_split: programs that share a tile of queries. num_warps, num_stages: as of Triton.
    max_registers: limit for a thread, None = what the compiler likes.
    """

    row_split: int = 1
    num_warps: int = 8
    num_stages: int = 3
    max_registers: int | None = None


def can_score_pass(spec: NSASpec) -> bool:
    """Tell whether this pass and `select_group_blocks` have all that the dialect selects by.

    They know no tables wider than the selection (`dense_len`), nor scores relative to other windows
    (`lse_len`).
    """
    return not (spec.dense_len or spec.lse_len)


def prefers_score_pass(group_size: int, spec: NSASpec) -> bool:
    """Tell whether this pass is expected to be faster than scores left behind by `prefill_cmp`.

    Here every (query head, entry) pair costs a product of 2 D operations and an exponential, there
    every unit a write and a read of 2 bytes: of an entry for "max_pool", else of a block, so of E
    entries. In small groups the sum leaves as many bytes to write as there were.
    """
    entries_per_unit = 1 if spec.score_map == "max_pool" else spec.cmp_entries_per_page
    return group_size >= 4 * entries_per_unit


def default_tuning(
    head_dim: int, entries_per_page: int, dtype: torch.dtype, *, is_fp8: bool = False
) -> ScoreTuning:
    """Tiles of which a Hopper SM holds several: one's exponentials run under another's products."""
    if dtype == torch.float32:
        # Three parts of every operand go through registers.
        return ScoreTuning(row_split=4, num_stages=1)
    has_room = entries_per_page <= 64 and not is_fp8
    if not has_room:
        return ScoreTuning(num_stages=3 if head_dim <= 64 else 2)
    # Measured on an H200; without a limit both take 10 % longer.
    if head_dim <= 64:
        return ScoreTuning(num_warps=4, max_registers=128)
    return ScoreTuning(num_stages=2, max_registers=80 if head_dim <= 128 else None)


def prefill_scores(
    q: Tensor,
    cache: LayerCache,
    lse2: Tensor,
    tile_rows: Tensor,
    tile_starts: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    spec: NSASpec,
    *,
    softmax_scale: float,
    first_token: int,
    num_tokens: int,
    num_score_tiles: int,
    check: bool = False,
    tuning: ScoreTuning | None = None,
    fp32_precision: str = "tf32x3",
) -> GroupScores:
    """Score the blocks that the tokens [first_token, first_token + R) can select.

    lse2: [R, HQ] fp32, contiguous, of `prefill_cmp` over the same tokens. All else, also what the
    tiles are, as there. num_score_tiles: at least ceil(visible entries of any token / TE), TE =
    `score_tile_entries`; NU is so many tiles.

    Raises ValueError when lse2 has another shape or the scale is not positive.
    """
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    _, num_q_heads, head_dim = q.shape
    num_pages, num_kv_heads, entries_per_page, _ = cache.k_cmp.shape
    check_shape("lse2", lse2, (num_tokens, num_q_heads))
    group_size = num_q_heads // num_kv_heads
    is_fp8 = cache.k_scale is not None
    tuning = tuning or default_tuning(head_dim, entries_per_page, q.dtype, is_fp8=is_fp8)
    block_q, padded_group = prefill_block_q(group_size), block_h(group_size)
    row_split = min(tuning.row_split, block_q)
    is_overlap = spec.score_map == "overlap"
    num_units = num_score_tiles * score_tile_entries(entries_per_page)
    if is_overlap:
        num_units //= entries_per_page
    shape = (num_tokens, num_kv_heads, num_units)
    units = q.new_empty(shape, dtype=torch.float32)
    has_spill = is_overlap and spec.strides_per_window > 1
    spill = q.new_empty(shape, dtype=torch.float32) if has_spill else None
    if tile_starts.shape[0] == 0:
        return GroupScores(units, spill)
    low_d, high_d = split_dim(head_dim)
    _prefill_scores_kernel[(tile_starts.shape[0] * row_split * num_kv_heads,)](
        q,
        cache.k_cmp,
        cache.k_scale,
        lse2,
        tile_rows,
        tile_starts,
        cu_seqlens_q,
        seq_lens,
        page_table,
        units,
        spill,
        softmax_scale * LOG2E,
        first_token,
        first_token + num_tokens,
        num_units,
        num_pages,
        q.stride(0),
        q.stride(1),
        page_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        ENTRIES=entries_per_page,
        CMP_STRIDE=spec.cmp_stride,
        WINDOW_STRIDES=spec.strides_per_window,
        BLOCK_SIZE=spec.block_size,
        NUM_SELECTED=spec.num_selected_blocks,
        TILE_TOKENS=block_q,
        BLOCK_Q=block_q // row_split,
        BLOCK_H=padded_group,
        BLOCK_D=low_d,
        BLOCK_D2=high_d,
        # Whole blocks.
        BLOCK_N=max(64, entries_per_page),
        MAP_BLOCKS=is_overlap and entries_per_page > 1,
        WITH_SPILL=has_spill,
        CHECK=check,
        STAGES=tuning.num_stages,
        PRECISION=fp32_precision,
        WIDE=num_pages * num_kv_heads * entries_per_page >= NARROW_LIMIT,
        num_warps=tuning.num_warps,
        maxnreg=tuning.max_registers,
        debug=check,
    )
    return GroupScores(units, spill)


# What changes from step to step must not compile the kernel anew.
@triton.jit(
    do_not_specialize=["first_token", "end_token", "num_units", "num_pages", "stride_pb"],
    do_not_specialize_on_alignment=["tile_rows_ptr", "tile_starts_ptr"],
)
def _prefill_scores_kernel(
    q_ptr,
    k_ptr,
    k_scale_ptr,
    lse2_ptr,
    tile_rows_ptr,
    tile_starts_ptr,
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    page_table_ptr,
    units_ptr,
    spill_ptr,
    scale,
    first_token,
    end_token,
    num_units,
    num_pages,
    stride_qt,
    stride_qh,
    stride_pb,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    WINDOW_STRIDES: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MAP_BLOCKS: tl.constexpr,
    WITH_SPILL: tl.constexpr,
    CHECK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One program is a tile of queries, or a part of it, against all entries that it sees."""
    BLOCK_M: tl.constexpr = BLOCK_Q * BLOCK_H
    ROW_SPLIT: tl.constexpr = TILE_TOKENS // BLOCK_Q
    # Column = (token high, head high, token low, head low).
    HEAD_LOW: tl.constexpr = min(2, BLOCK_H)
    HEAD_HIGH: tl.constexpr = BLOCK_H // HEAD_LOW
    TOKEN_LOW: tl.constexpr = min(4, BLOCK_Q)
    TOKEN_HIGH: tl.constexpr = BLOCK_Q // TOKEN_LOW

    # The last tiles of a sequence see the most entries: they start first, so none ends alone.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = pid % NUM_KV_HEADS
    part = pid // NUM_KV_HEADS
    row = tl.load(tile_rows_ptr + part // ROW_SPLIT)
    start = tl.load(tile_starts_ptr + part // ROW_SPLIT) + part % ROW_SPLIT * BLOCK_Q
    row_end = tl.load(cu_seqlens_q_ptr + row + 1)
    end = tl.minimum(tl.minimum(row_end, end_token), start + BLOCK_Q)
    if end <= start:
        return
    first_position = tl.load(seq_lens_ptr + row) - row_end + start
    end_position = first_position + end - start
    # Where all blocks are selected, none needs a score.
    if end_position <= NUM_SELECTED * BLOCK_SIZE:
        return
    num_visible = end_position // CMP_STRIDE

    column = tl.arange(0, BLOCK_M)
    in_group = column % HEAD_LOW + column // (HEAD_LOW * TOKEN_LOW) % HEAD_HIGH * HEAD_LOW
    in_tile = column // HEAD_LOW % TOKEN_LOW
    in_tile += column // (HEAD_LOW * TOKEN_LOW * HEAD_HIGH) * TOKEN_LOW
    token = start + in_tile
    mask_m = token < end
    if BLOCK_H > GROUP_SIZE:
        mask_m = mask_m & (in_group < GROUP_SIZE)
    head = kv_head * GROUP_SIZE + in_group
    offs_d = tl.arange(0, BLOCK_D)
    q_rows = q_ptr + token.to(tl.int64) * stride_qt + head * stride_qh
    q = _load_tile(q_rows, offs_d, mask_m, HEAD_DIM, BLOCK_D, True)
    if BLOCK_D2 > 0:
        offs_d2 = BLOCK_D + tl.arange(0, BLOCK_D2)
        q2 = _load_tile(q_rows, offs_d2, mask_m, HEAD_DIM, BLOCK_D + BLOCK_D2, True)
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + kv_head)
    lse2_rows = (token - first_token) * (NUM_KV_HEADS * GROUP_SIZE) + head
    lse2 = tl.load(lse2_ptr + lse2_rows, mask=mask_m, other=float("inf"))
    # Nothing visible, no head: a probability of 0.
    lse2 = tl.where(lse2 == float("-inf"), float("inf"), lse2)

    offs_n = tl.arange(0, BLOCK_N)
    offs_t = tl.arange(0, BLOCK_Q)
    visible = (first_position + 1 + offs_t) // CMP_STRIDE
    # Rows of the workspace.
    out_row = (start - first_token + offs_t).to(tl.int64) * NUM_KV_HEADS + kv_head
    mask_t = (start + offs_t < end)[None, :]
    TILE_UNITS: tl.constexpr = BLOCK_N // ENTRIES if MAP_BLOCKS else BLOCK_N
    offs_u = tl.arange(0, TILE_UNITS)
    offs_out = out_row[None, :] * num_units + offs_u[:, None]
    if MAP_BLOCKS:
        # Strides that the window at a place of a page shares with the page's block, and with the
        # one before.
        place = tl.arange(0, ENTRIES)
        shared = (tl.minimum(place, WINDOW_STRIDES - 1) + 1).to(tl.float32)[None, :, None]
        before = tl.maximum(WINDOW_STRIDES - 1 - place, 0).to(tl.float32)[None, :, None]

    # A page's compressed keys of one head are contiguous, so an entry is a row of [rows, D].
    page_ptrs = page_table_ptr + row.to(tl.int64) * stride_pb + offs_n // ENTRIES
    slot = kv_head * ENTRIES + offs_n % ENTRIES
    # The pages of a step are loaded one step early: the keys' copies into shared memory, themselves
    # issued ahead of their use, then need not wait for an address.
    page = tl.load(page_ptrs, mask=offs_n < num_visible, other=0)
    for step in tl.range(0, tl.cdiv(num_visible, BLOCK_N), num_stages=STAGES):
        entry = step * BLOCK_N + offs_n
        mask_n = (entry >= WINDOW_STRIDES - 1) & (entry < num_visible)
        next_page = tl.load(
            page_ptrs + (step + 1) * (BLOCK_N // ENTRIES),
            mask=entry + BLOCK_N < num_visible,
            other=0,
        )
        if CHECK:
            tl.device_assert((page >= 0) & (page < num_pages) | ~mask_n, "page out of range")
        # Rows of the cache fit into 32 bits, though elements do not.
        page_row = (page.to(tl.int64) if WIDE else page) * (NUM_KV_HEADS * ENTRIES)
        k_rows = k_ptr + (page_row + slot).to(tl.int64) * HEAD_DIM
        k = _load_tile(k_rows, offs_d, mask_n, HEAD_DIM, BLOCK_D, True).to(q.dtype)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if BLOCK_D2 > 0:
            k2 = _load_tile(k_rows, offs_d2, mask_n, HEAD_DIM, BLOCK_D + BLOCK_D2, True)
            s = tl.dot(k2.to(q.dtype), tl.trans(q2), s, input_precision=PRECISION)
        page = next_page
        p = tl.exp2(s * scale - lse2[None, :])
        p = tl.reshape(p, [BLOCK_N, TOKEN_HIGH, HEAD_HIGH, TOKEN_LOW, HEAD_LOW])
        p = tl.reshape(tl.sum(tl.sum(p, axis=4), axis=2), [BLOCK_N, BLOCK_Q])
        # After the sum there is little left to mask. What is not visible may be anything.
        seen = (entry >= WINDOW_STRIDES - 1)[:, None] & (entry[:, None] < visible[None, :])
        p = tl.where(seen, p, 0.0)
        target = step * TILE_UNITS + offs_out
        if MAP_BLOCKS:
            by_block = tl.reshape(p, [TILE_UNITS, ENTRIES, BLOCK_Q])
            tl.store(units_ptr + target, tl.sum(by_block * shared, axis=1), mask=mask_t)
            if WITH_SPILL:
                tl.store(spill_ptr + target, tl.sum(by_block * before, axis=1), mask=mask_t)
        else:
            tl.store(units_ptr + target, p, mask=mask_t)
