"""Prefill attention over the compressed keys of paged sequences, with block-score units.

One program is a tile of queries, (token, head) pairs of one KV head, or a part of the tile, against
all of their visible compressed entries. A flash-attention loop that also leaves behind what
selection needs: the probabilities of every score tile, mapped to blocks, relative to the tile's own
maximum, because the final log-sum-exp is not known yet (paper, Eq. 8 to 10;
`reference.block_scores`).

Legend: T tokens of the step, R tokens of the sub-chunk, B rows, HQ query heads, H KV heads,
G = HQ // H, D width of keys, Dv of values, P pages of the longest row, E compressed entries a page,
NT score tiles, TE entries of a score tile, TB = TE // E its blocks. Window j is flat entry
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
    score_unit_dtype,
    split_dim,
)
from nsa_kernels.metadata import LayerCache
from nsa_kernels.spec import NSASpec

# Shared memory for a program's operands: Hopper's 227 KB less what layout conversions use.
PIPELINE_BYTES = 208 << 10

# The same for each of two programs on an SM.
PAIR_BYTES = 106 << 10

# Rows of the cache, and elements of one program's workspace, that 32-bit offsets reach.
NARROW_LIMIT = 1 << 31


@dataclass(frozen=True, slots=True)
class CmpScores:
    """Compression attention of R tokens, and what block selection reads; log-sum-exps are base 2.

    o_cmp: [R, HQ, Dv] in q's dtype, 0 where no entry is visible; None without output.
    lse2: [R, HQ] fp32, log2 of the sum of exp2(s2), s2 = (q k_cmp) * softmax_scale * log2(e);
        -inf where no entry is visible.
    units: [R, HQ, NT, TB] for score map "overlap": the sum over the tile's entries of
        exp2(s2 - tile_max) * (strides that the window shares with the block);
        [R, HQ, NT, TE] for "max_pool": exp2(s2 - tile_max) of every entry, 0 where not visible.
        fp16, or fp32 for fp32 inputs.
    spill: [R, HQ, NT] in the dtype of units: what the tile adds to the block just before it; None
        when windows do not overlap (l = d) and for "max_pool".
    tile_max: [R, HQ, NT] fp32, -inf where the tile holds no visible entry: its units are then void.
    The last three are None without scores. A tile that begins at or after a token's visible
    entries, (position + 1) // d, may be unwritten.
    """

    o_cmp: Tensor | None
    lse2: Tensor
    units: Tensor | None
    spill: Tensor | None
    tile_max: Tensor | None


def prefill_cmp(
    q: Tensor,
    cache: LayerCache,
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
    with_output: bool = True,
    with_scores: bool = True,
    out: Tensor | None = None,
    check: bool = False,
    row_split: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    block_n: int | None = None,
    max_registers: int | None = None,
    fp32_precision: str = "tf32x3",
) -> CmpScores:
    """Attend from the tokens [first_token, first_token + R) to the compressed entries before them.

    q: [T, HQ, D], last stride 1. tile_rows, tile_starts: int32, the prefill tiles of these R =
    `num_tokens` tokens: tile i is the tokens tile_starts[i] .. + prefill_block_q(G) - 1 of row
    tile_rows[i], cut at the row's end. cu_seqlens_q: [B + 1], seq_lens: [B], page_table: [B, P],
    all int32. num_score_tiles: at least ceil(visible entries of any token / TE).
    with_output, with_scores: what is wanted beside lse2, if anything. out: [T, HQ, Dv], contiguous;
    o_cmp is written into its rows [first_token, first_token + R) instead of into a new tensor.
    check: assert on the device that every page id is one of the cache's.
    Tuning: row_split, programs that share a tile of queries; num_warps and num_stages of one.
    16-bit inputs with scores take two programs of 4 warps and 2 stages where an SM holds two of
    them without spills, one hiding the other's stores and softmax; else one of 8 warps. block_n,
    entries of a loop step, without scores alone: with them it is TE. max_registers of a thread.
    fp32_precision, how `tl.dot` multiplies fp32: three tf32 products keep about 22 bits, and "ieee"
    has no tensor cores and spills registers.

    Raises ValueError when out has another shape, the scale is not positive or block_n does not fit.
    """
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    _, num_q_heads, head_dim = q.shape
    num_pages, num_kv_heads, entries_per_page, v_head_dim = cache.v_cmp.shape
    group_size = num_q_heads // num_kv_heads
    tile_entries = score_tile_entries(entries_per_page)
    if block_n is not None:
        if with_scores or block_n < 16 or block_n % entries_per_page:
            raise ValueError(
                f"block_n must be a multiple of a page's {entries_per_page} entries from 16 on, "
                f"and None with scores; got {block_n}"
            )
        tile_entries = block_n
    block_q, padded_group = prefill_block_q(group_size), block_h(group_size)
    maps_blocks = with_scores and spec.score_map == "overlap" and entries_per_page > 1
    has_spill = spec.score_map == "overlap" and spec.strides_per_window > 1
    unit_dtype = score_unit_dtype(q.dtype)
    o_cmp = units = spill = tile_max = None
    lse2 = q.new_empty((num_tokens, num_q_heads), dtype=torch.float32)
    if with_output:
        if out is not None:
            check_shape("out", out, (q.shape[0], num_q_heads, v_head_dim))
            o_cmp = out[first_token : first_token + num_tokens]
        else:
            o_cmp = q.new_empty((num_tokens, num_q_heads, v_head_dim))
    if with_scores:
        tiles = (num_tokens, num_q_heads, num_score_tiles)
        units = q.new_empty((*tiles, _units_per_tile(spec)), dtype=unit_dtype)
        tile_max = q.new_empty(tiles, dtype=torch.float32)
        if has_spill:
            spill = q.new_empty(tiles, dtype=unit_dtype)
    scores = CmpScores(o_cmp, lse2, units, spill, tile_max)
    if tile_starts.shape[0] == 0:
        return scores

    low_d, high_d = split_dim(head_dim)
    block_dv = max(16, triton.next_power_of_2(v_head_dim))
    # Columns of the product that maps entries to blocks.
    block_u = max(16, tile_entries // entries_per_page) if maps_blocks else tile_entries
    query_bytes = block_q * padded_group * (low_d + high_d) * q.element_size()
    weight_bytes = tile_entries * block_u * maps_blocks * q.element_size()
    stage_bytes = tile_entries * (low_d + high_d + block_dv * with_output) * q.element_size()
    is_fp32 = q.dtype == torch.float32
    half_bytes = query_bytes // 2 + weight_bytes + 2 * stage_bytes
    # Without scores to store or FP8 to convert, a tile stays whole: half the reads of keys and of
    # values, from L2. Outputs wider than 128 spill in 4 warps.
    is_pair = (with_scores or cache.k_scale is not None) and not is_fp32 and block_q > 1
    is_pair = is_pair and block_dv <= 128 and half_bytes <= PAIR_BYTES
    if row_split is None:
        # fp32 operands go through registers, in three parts each: fewer rows, fewer spills.
        row_split = 4 if is_fp32 else 2 if is_pair else 1
    row_split = min(row_split, block_q)
    if num_warps is None:
        num_warps = 4 if is_pair else 8
    is_capped = not (with_scores or is_pair or is_fp32) and 64 < max(head_dim, v_head_dim) <= 128
    if is_capped and num_stages is None and max_registers is None:
        # Two programs an SM: 11 to 20 % faster on an H200 than one with three stages.
        num_stages, max_registers = 2, 128
    if num_stages is None:
        fixed_bytes = query_bytes // row_split + weight_bytes
        num_stages = 2 if is_pair else max(1, min(3, (PIPELINE_BYTES - fixed_bytes) // stage_bytes))
    tile_elements = block_q * num_q_heads * num_score_tiles * _units_per_tile(spec)
    num_rows = num_pages * num_kv_heads * entries_per_page
    grid = (tile_starts.shape[0] * row_split * num_kv_heads,)
    _prefill_cmp_kernel[grid](
        q,
        cache.k_cmp,
        cache.v_cmp,
        cache.k_scale,
        cache.v_scale,
        tile_rows,
        tile_starts,
        cu_seqlens_q,
        seq_lens,
        page_table,
        o_cmp,
        lse2,
        units,
        spill,
        tile_max,
        softmax_scale * LOG2E,
        first_token,
        first_token + num_tokens,
        num_score_tiles,
        num_pages,
        q.stride(0),
        q.stride(1),
        page_table.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=group_size,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        ENTRIES=entries_per_page,
        CMP_STRIDE=spec.cmp_stride,
        WINDOW_STRIDES=spec.strides_per_window,
        TILE_TOKENS=block_q,
        BLOCK_Q=block_q // row_split,
        BLOCK_H=padded_group,
        BLOCK_D=low_d,
        BLOCK_D2=high_d,
        BLOCK_DV=block_dv,
        BLOCK_N=tile_entries,
        BLOCK_U=block_u,
        MAP_BLOCKS=maps_blocks,
        WITH_SPILL=has_spill,
        WITH_OUTPUT=with_output,
        WITH_SCORES=with_scores,
        CHECK=check,
        STAGES=num_stages,
        PRECISION=fp32_precision,
        WIDE=max(tile_elements, num_rows) >= NARROW_LIMIT,
        num_warps=num_warps,
        maxnreg=max_registers,
        debug=check,
    )
    return scores


def _units_per_tile(spec: NSASpec) -> int:
    """Score units of one tile: its blocks, or its entries where blocks take a maximum."""
    tile_entries = score_tile_entries(spec.cmp_entries_per_page)
    if spec.score_map == "max_pool":
        return tile_entries
    return tile_entries // spec.cmp_entries_per_page


@triton.jit
def _load_tile(ptrs, offs_d, mask_n, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Load [N, BLOCK] at row pointers `ptrs` [N]; rows outside mask_n and columns >= DIM are 0."""
    ptrs = ptrs[:, None] + offs_d[None, :]
    if MASKED:
        if BLOCK > DIM:
            return tl.load(ptrs, mask=mask_n[:, None] & (offs_d < DIM)[None, :], other=0.0)
        return tl.load(ptrs, mask=mask_n[:, None], other=0.0)
    if BLOCK > DIM:
        return tl.load(ptrs, mask=(offs_d < DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _spill(p, offs_e, WINDOW_STRIDES: tl.constexpr):
    """Strides that entries `offs_e` of a tile share with the block before it, times p [M, N]."""
    if WINDOW_STRIDES == 2:
        # One entry: a sum of integers, from which the compiler drops the other columns.
        bits = tl.where((offs_e == 0)[None, :], p.to(tl.int32, bitcast=True), 0)
        return tl.sum(bits, axis=1).to(tl.float32, bitcast=True)
    shared = tl.maximum(WINDOW_STRIDES - 1 - offs_e, 0)
    return tl.sum(p * shared.to(tl.float32)[None, :], axis=1)


# What changes from step to step must not compile the kernel anew.
@triton.jit(
    do_not_specialize=[
        "first_token",
        "end_token",
        "num_score_tiles",
        "num_pages",
        "stride_pb",
    ],
    do_not_specialize_on_alignment=["tile_rows_ptr", "tile_starts_ptr"],
)
def _prefill_cmp_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_scale_ptr,
    v_scale_ptr,
    tile_rows_ptr,
    tile_starts_ptr,
    cu_seqlens_q_ptr,
    seq_lens_ptr,
    page_table_ptr,
    o_ptr,
    lse2_ptr,
    units_ptr,
    spill_ptr,
    tile_max_ptr,
    scale,
    first_token,
    end_token,
    num_score_tiles,
    num_pages,
    stride_qt,
    stride_qh,
    stride_pb,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    ENTRIES: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    WINDOW_STRIDES: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_D2: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    MAP_BLOCKS: tl.constexpr,
    WITH_SPILL: tl.constexpr,
    WITH_OUTPUT: tl.constexpr,
    WITH_SCORES: tl.constexpr,
    CHECK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
):
    BLOCK_M: tl.constexpr = BLOCK_Q * BLOCK_H
    HAS_HEAD: tl.constexpr = WINDOW_STRIDES > 1
    ROW_SPLIT: tl.constexpr = TILE_TOKENS // BLOCK_Q

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
    # Entries that the first and the last token of the tile see.
    num_common = (first_position + 1) // CMP_STRIDE
    num_visible = (first_position + end - start) // CMP_STRIDE

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    token = start + offs_m // BLOCK_H
    head = offs_m % BLOCK_H
    mask_m = token < end
    if BLOCK_H > GROUP_SIZE:
        mask_m = mask_m & (head < GROUP_SIZE)
    head = kv_head * GROUP_SIZE + head
    q_rows = q_ptr + token.to(tl.int64) * stride_qt + head * stride_qh
    q = _load_tile(q_rows, offs_d, mask_m, HEAD_DIM, BLOCK_D, True)
    if BLOCK_D2 > 0:
        offs_d2 = BLOCK_D + tl.arange(0, BLOCK_D2)
        q2 = _load_tile(q_rows, offs_d2, mask_m, HEAD_DIM, BLOCK_D + BLOCK_D2, True)
    if k_scale_ptr is not None:
        scale *= tl.load(k_scale_ptr + kv_head)
    # Rows of the output: the tile's first in 64 bits, the others from there in 32 if those do.
    NUM_HEADS: tl.constexpr = NUM_KV_HEADS * GROUP_SIZE
    out_row = (start - first_token).to(tl.int64) * NUM_HEADS + kv_head * GROUP_SIZE
    offs_row = offs_m // BLOCK_H * NUM_HEADS + offs_m % BLOCK_H
    if WIDE:
        offs_row = offs_row.to(tl.int64)
    visible = (first_position + 1 + offs_m // BLOCK_H) // CMP_STRIDE

    # A page's compressed keys of one head are contiguous, so an entry is a row of [rows, D].
    page_ptrs = page_table_ptr + row.to(tl.int64) * stride_pb + offs_n // ENTRIES
    slot = kv_head * ENTRIES + offs_n % ENTRIES
    offs_dv = tl.arange(0, BLOCK_DV)
    TILE_PAGES: tl.constexpr = BLOCK_N // ENTRIES
    TILE_UNITS: tl.constexpr = TILE_PAGES if MAP_BLOCKS else BLOCK_N
    offs_u = tl.arange(0, BLOCK_U)
    if WITH_SCORES:
        UNIT_DTYPE: tl.constexpr = units_ptr.dtype.element_ty
        offs_tile = offs_row * num_score_tiles
        offs_units = (offs_tile * TILE_UNITS)[:, None] + offs_u[None, :]
    if MAP_BLOCKS:
        # Column j counts the strides that an entry shares with the tile's block j. Small integers:
        # exact in any dtype.
        past = offs_n[:, None] - offs_u[None, :] * ENTRIES
        shared = tl.minimum(past, ENTRIES - 1) - tl.maximum(past - (WINDOW_STRIDES - 1), 0) + 1
        # bf16 also beside fp16 keys: it keeps probabilities that fp16 flushes to 0.
        P_DTYPE: tl.constexpr = tl.float32 if q.dtype == tl.float32 else tl.bfloat16
        weights = tl.maximum(shared, 0).to(tl.float32).to(P_DTYPE)

    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)

    # Steps whose entries all rows see need no mask: those before `full_end`, but for the one with
    # the entries before the first window.
    full_end = num_common // BLOCK_N
    # The pages of a step are loaded one step early: the keys' copies into shared memory, themselves
    # issued ahead of their use, then need not wait for an address.
    page = tl.load(page_ptrs, mask=offs_n < num_visible, other=0)
    for step in tl.range(0, tl.cdiv(num_visible, BLOCK_N), num_stages=STAGES):
        entry = step * BLOCK_N + offs_n
        mask_n = (entry >= WINDOW_STRIDES - 1) & (entry < num_visible)
        next_page = tl.load(
            page_ptrs + (step + 1) * TILE_PAGES, mask=entry + BLOCK_N < num_visible, other=0
        )
        if CHECK:
            tl.device_assert((page >= 0) & (page < num_pages) | ~mask_n, "page out of range")
        # Rows of the cache fit into 32 bits, though elements do not.
        page_row = (page.to(tl.int64) if WIDE else page) * (NUM_KV_HEADS * ENTRIES)
        key_row = (page_row + slot).to(tl.int64)
        k_rows = k_ptr + key_row * HEAD_DIM
        k = _load_tile(k_rows, offs_d, mask_n, HEAD_DIM, BLOCK_D, True).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if BLOCK_D2 > 0:
            k2 = _load_tile(k_rows, offs_d2, mask_n, HEAD_DIM, BLOCK_D + BLOCK_D2, True)
            k2 = k2.to(q.dtype)
            s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
        if (step >= full_end) | (step < HAS_HEAD):
            seen = mask_n[None, :] & (entry[None, :] < visible[:, None])
            s = tl.where(seen, s, float("-inf"))
        # The scale is positive, so it commutes with the maximum and joins the subtraction.
        m_tile = tl.max(s, axis=1) * scale
        m_new = tl.maximum(m_i, m_tile)
        m_ref = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s * scale - m_ref[:, None])
        alpha = tl.exp2(m_i - m_ref)
        l_i = l_i * alpha + tl.sum(p, axis=1)
        m_i = m_new
        page = next_page
        # This order lets the product with V run while the units are stored.
        units = p
        if WITH_SCORES and MAP_BLOCKS:
            units = tl.dot(p.to(P_DTYPE), weights, input_precision=PRECISION)
        if WITH_OUTPUT:
            v_rows = v_ptr + key_row * V_HEAD_DIM
            v = _load_tile(v_rows, offs_dv, mask_n, V_HEAD_DIM, BLOCK_DV, True).to(q.dtype)
            acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        if WITH_SCORES:
            # Relative to the tile's own maximum: beside an attention sink, what the running
            # maximum leaves of the others would vanish in fp16.
            rescale = tl.exp2(tl.minimum(m_ref - m_tile, 126.0))
            first_tile = out_row * num_score_tiles + step
            tl.store(tile_max_ptr + first_tile + offs_tile, m_tile, mask=mask_m)
            if WITH_SPILL:
                spill = _spill(p, offs_n, WINDOW_STRIDES) * rescale
                tl.store(spill_ptr + first_tile + offs_tile, spill.to(UNIT_DTYPE), mask=mask_m)
            units *= rescale[:, None]
            mask_u = tl.broadcast_to(mask_m[:, None], units.shape)
            if TILE_UNITS < BLOCK_U:
                mask_u = mask_u & (offs_u < TILE_UNITS)[None, :]
            units_ptrs = units_ptr + first_tile * TILE_UNITS + offs_units
            tl.store(units_ptrs, units.to(UNIT_DTYPE), mask=mask_u)

    lse2 = tl.where(l_i > 0, m_i + tl.log2(tl.where(l_i > 0, l_i, 1.0)), float("-inf"))
    tl.store(lse2_ptr + out_row + offs_row, lse2, mask=mask_m)
    if WITH_OUTPUT:
        acc = acc / tl.where(l_i > 0, l_i, 1.0)[:, None]
        if v_scale_ptr is not None:
            acc *= tl.load(v_scale_ptr + kv_head)
        tl.store(
            o_ptr + out_row * V_HEAD_DIM + (offs_row * V_HEAD_DIM)[:, None] + offs_dv[None, :],
            acc.to(o_ptr.dtype.element_ty),
            mask=mask_m[:, None] & (offs_dv < V_HEAD_DIM)[None, :],
        )
