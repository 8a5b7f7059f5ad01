"""Decode, first kernel: append, and compression attention split over the context.

A program is one split of the compressed keys of one row and KV head. The one that owns the newest
entry first writes the token, and the compressed entry that it completes, to the cache. Selection
is a kernel of its own (`decode_select`): at the end of this one it would keep its registers
from every program, for the sake of the few that select.

Legend: Nd decode rows (the tokens 0 .. Nd-1), HQ query heads, H KV heads, G = HQ // H, D width of
keys, Dv of values, P pages of the longest row, E compressed entries a page, S selected blocks,
l = cmp_len, d = cmp_stride. Window j is flat entry e = j + l/d - 1.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.common import LOG2E, to_fp8
from nsa_kernels.gpu.decode_select import decode_select
from nsa_kernels.gpu.select import CHUNK_BLOCKS, select_constants
from nsa_kernels.metadata import BranchKV, LayerCache
from nsa_kernels.spec import NSASpec

# Compressed entries of a loop step. Small, for short steps: what limits a program is the latency of
# a step, and three programs share an SM.
TILE_ENTRIES = 32
# Splits of a row and KV head: enough programs to fill the device, but their partial results are
# read again by decode_slc, and no program should have more tiles than the last of these.
PROGRAMS_PER_SM = 3
MAX_SPLITS = 32
MAX_TILES_PER_SPLIT = 256
# Rows times KV heads up to which selection cuts a row into chunks of so many blocks.
MANY_ROWS, FEW_ROWS_CHUNK = 16, 256
# Bytes of keys and values on their way to a program, of which two or three share an SM.
STAGE_BYTES = 100 << 10


@dataclass(frozen=True, slots=True)
class CmpPartials:
    """Compression attention of decode rows in splits, and the selected blocks.

    o_part: [Nd, HQ, splits, Dv] fp32, normalised within the split; None without output.
    lse2_part: [Nd, HQ, splits] fp32, log2 of the split's sum of exp2(s2), where
        s2 = (q k_cmp) * softmax_scale * log2(e); -inf for an empty split, whose o_part is void.
    block_indices: [Nd, H, width] int32, in no particular order (the same in every run), filled up
        with -1; width is `block_table_width`, S where no row is dense. block_pages: the same, their
        pages, 0 for -1. Both None without selection.
    scratch: what selection reads and writes on the way. Kept, so that a kernel that begins before
        selection has ended is not given the same memory.
    """

    o_part: Tensor | None
    lse2_part: Tensor
    block_indices: Tensor | None
    block_pages: Tensor | None
    scratch: tuple[Tensor | None, ...] = ()


def num_cmp_splits(num_rows: int, num_kv_heads: int, num_tiles: int, num_sms: int) -> int:
    """Splits of the compressed keys: a function of shapes alone, so that graphs can replay it."""
    wanted = PROGRAMS_PER_SM * num_sms // max(1, num_rows * num_kv_heads)
    least = triton.cdiv(num_tiles, MAX_TILES_PER_SPLIT)
    return int(max(1, min(num_tiles, max(least, min(wanted, MAX_SPLITS)))))


def decode_cmp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerCache,
    seq_lens: Tensor,
    page_table: Tensor,
    spec: NSASpec,
    *,
    softmax_scale: float,
    counters: Tensor,
    num_sms: int,
    shape: tuple[int, int] | None = None,
    branch_kv: BranchKV | None = None,
    swa_page_table: Tensor | None = None,
    lse2_select: Tensor | None = None,
    with_output: bool = True,
    with_selection: bool = True,
    fuse_append: bool = True,
    check: bool = False,
    splits: int | None = None,
    tile_entries: int | None = None,
    num_warps: int | None = None,
    num_stages: int | None = None,
    max_registers: int | None = None,
    heads_per_step: int = 16,
    launch_pdl: bool = False,
    start_next: bool = False,
) -> CmpPartials:
    """Append the tokens of the decode rows, attend to the compressed entries, select the blocks.

    q: [Nd, HQ, D], k: [Nd, H, D], v: [Nd, H, Dv], last stride 1, in the dtype of the cache, or of
    any where that is FP8.
    seq_lens: [B] int32, tokens with this step's; 0 for a padding row, which touches no cache and
    selects nothing. page_table: [B, P] int32. The decode rows are the first of B.
    branch_kv, swa_page_table [B, P] int32: where branches have K/V of their own.
    lse2_select: [Nd, HQ, any] fp32, what scores are relative to instead of this kernel's own
    lse2_part: that of the coarse windows (`decode_lse`).
    with_output, with_selection: whether the branch's output and the selection are wanted.
    fuse_append: append, and compress with the mean; False if that has been done.
    counters: [Nd * H] int32 zeros, and zeros afterwards.
    shape: rows and pages to be cut for, at least Nd and P; None = those. Not the result, but what
    is compiled depends on it.
    check: assert on the device that page ids are inside the cache.
    Tuning: tile_entries, compressed entries of a loop step, a power of two and at least 2 * E;
    heads_per_step, heads whose scores the selection loads together.
    launch_pdl: start while the kernel in front ends. start_next: let the one after these do so,
    and selection. Every kernel waits on the device for those before it.

    Raises ValueError when softmax_scale is not positive or tensors of separate K/V are missing.
    """
    if not softmax_scale > 0:
        raise ValueError(f"softmax_scale must be positive, got {softmax_scale}")
    num_rows, num_q_heads, head_dim = q.shape
    num_pages, num_kv_heads, entries, v_head_dim = cache.v_cmp.shape
    group_size = num_q_heads // num_kv_heads
    is_separate = cache.k_swa is not None
    if is_separate and fuse_append and (branch_kv is None or swa_page_table is None):
        raise ValueError(
            "a cache with K/V of its own for every branch needs branch_kv and swa_page_table to "
            "append to"
        )
    is_fp32 = q.dtype == torch.float32
    if tile_entries is None:
        tile_entries = max(TILE_ENTRIES, 2 * entries)
    shape_rows, shape_pages = shape or (num_rows, page_table.shape[1])
    num_tiles = triton.cdiv(shape_pages * entries, tile_entries)
    if splits is None:
        splits = num_cmp_splits(shape_rows, num_kv_heads, num_tiles, num_sms)
    if not (with_output or with_selection):
        splits = 1
    block_h = max(16, triton.next_power_of_2(group_size))
    block_d = max(16, triton.next_power_of_2(head_dim))
    block_dv = max(16, triton.next_power_of_2(v_head_dim))
    if num_warps is None:
        num_warps = 8 if is_fp32 or block_h > 64 or tile_entries > 64 else 4
    if num_stages is None:
        width = block_d + block_dv if with_output else block_d
        buffers = STAGE_BYTES // (tile_entries * width * cache.k_cmp.element_size())
        num_stages = 1 + max(1, min(2, buffers))

    has_spill = spec.score_map == "overlap" and spec.strides_per_window > 1
    is_max_pool = spec.score_map == "max_pool"
    tile_units = tile_entries if is_max_pool else tile_entries // entries
    o_part = units = spill = tile_max = indices = pages = None
    lse2_part = q.new_empty((num_rows, num_q_heads, splits), dtype=torch.float32)
    if with_output:
        o_part = q.new_empty((num_rows, num_q_heads, splits, v_head_dim), dtype=torch.float32)
    if with_selection:
        tiles = (num_rows, num_q_heads, num_tiles)
        units = q.new_empty((*tiles, tile_units), dtype=torch.float32)
        tile_max = q.new_empty(tiles, dtype=torch.float32)
        spill = q.new_empty(tiles, dtype=torch.float32) if has_spill else None
        indices = q.new_empty((num_rows, num_kv_heads, spec.block_table_width), dtype=torch.int32)
        pages = torch.empty_like(indices)
    partials = CmpPartials(o_part, lse2_part, indices, pages)
    # Few rows leave multiprocessors to spare: then more and smaller chunks.
    chunk_blocks = CHUNK_BLOCKS if shape_rows * num_kv_heads > MANY_ROWS else FEW_ROWS_CHUNK
    if num_rows == 0:
        return partials

    k_swa, v_swa, k_raw, v_raw = k, v, k, v
    if branch_kv is not None:
        k_swa, v_swa = branch_kv.k_swa, branch_kv.v_swa
        k_raw, v_raw = branch_kv.k_cmp, branch_kv.v_cmp
    _decode_cmp_kernel[(num_kv_heads, splits, num_rows)](
        q,
        k,
        v,
        k_swa,
        v_swa,
        k_raw,
        v_raw,
        cache.k,
        cache.v,
        cache.k_cmp,
        cache.v_cmp,
        cache.k_scale,
        cache.v_scale,
        cache.k_swa,
        cache.v_swa,
        cache.k_tail,
        cache.v_tail,
        seq_lens,
        page_table,
        swa_page_table,
        o_part,
        lse2_part,
        units,
        spill,
        tile_max,
        softmax_scale * LOG2E,
        num_tiles,
        num_pages,
        cache.k_swa.shape[0] if cache.k_swa is not None else 0,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        k_swa.stride(0),
        k_swa.stride(1),
        v_swa.stride(0),
        v_swa.stride(1),
        k_raw.stride(0),
        k_raw.stride(1),
        v_raw.stride(0),
        v_raw.stride(1),
        page_table.stride(0),
        swa_page_table.stride(0) if swa_page_table is not None else 0,
        GROUP_SIZE=group_size,
        TILE_BLOCKS=tile_entries // entries,
        ENTRIES=entries,
        WINDOW_STRIDES=spec.strides_per_window,
        CMP_STRIDE=spec.cmp_stride,
        BLOCK_SIZE=spec.block_size,
        MAX_POOL=is_max_pool,
        HEAD_DIM=head_dim,
        V_HEAD_DIM=v_head_dim,
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BLOCK_U=max(16, triton.next_power_of_2(tile_units + has_spill)),
        NUM_UNSCORED=0 if with_output else max(spec.dense_len - 1, 0),
        SEPARATE=is_separate,
        FUSE_APPEND=fuse_append,
        WITH_OUTPUT=with_output,
        WITH_SCORES=with_selection,
        CHECK=check,
        PDL=launch_pdl,
        START_NEXT=start_next and not launch_pdl,
        STAGES=num_stages,
        num_warps=num_warps,
        maxnreg=max_registers,
        debug=check,
        **({"launch_pdl": True} if launch_pdl else {}),
    )
    if with_selection:
        assert units is not None and tile_max is not None
        assert indices is not None and pages is not None
        candidates = decode_select(
            units,
            spill,
            tile_max,
            lse2_part if lse2_select is None else lse2_select,
            seq_lens,
            page_table,
            indices,
            pages,
            counters,
            select_constants(
                spec,
                group_size,
                num_tiles,
                tile_entries=tile_entries,
                chunk_blocks=chunk_blocks,
                heads_per_step=heads_per_step,
            ),
            num_pages=num_pages,
            shape_rows=shape_rows,
            check=check,
            launch_pdl=launch_pdl or start_next,
            start_next=start_next,
        )
        partials = replace(partials, scratch=(units, spill, tile_max, candidates, lse2_select))
    return partials


@triton.jit
def _copy_row(source_ptr, target_ptr, scale_ptr, DIM: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    targets = target_ptr + offs
    x = tl.load(source_ptr + offs, mask=offs < DIM)
    if scale_ptr is not None:
        x = to_fp8(x, tl.load(scale_ptr))
    tl.store(targets, x, mask=offs < DIM)


@triton.jit
def _append_token(
    k_ptr,
    v_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_scale_ptr,
    v_scale_ptr,
    slot,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
):
    """Copy a token's key and value, of one head, to slot `slot` (int64) of that head.

    k_scale_ptr, v_scale_ptr: of that head, None where the cache is not FP8.
    """
    _copy_row(k_ptr, k_cache_ptr + slot * HEAD_DIM, k_scale_ptr, HEAD_DIM, BLOCK_D)
    _copy_row(v_ptr, v_cache_ptr + slot * V_HEAD_DIM, v_scale_ptr, V_HEAD_DIM, BLOCK_DV)


@triton.jit
def _window_mean(
    new_ptr,
    cache_ptr,
    scale_ptr,
    pages_ptr,
    position,
    kv_head,
    num_kv_heads,
    target_ptr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HELD: tl.constexpr,
    CMP_LEN: tl.constexpr,
):
    """Store the mean of the CMP_LEN rows that end with `position`, whose own row is at new_ptr.

    cache_ptr: a page of it has HELD rows, of the last tokens of the page at pages_ptr.
    In FP8 the mean of what is stored of them, all in units of the head's one scale.
    """
    ROWS: tl.constexpr = 16
    offs_d = tl.arange(0, BLOCK)
    mask_d = offs_d < DIM
    total = tl.load(new_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        total = to_fp8(total, tl.load(scale_ptr)).to(tl.float32)
    for first in range(0, CMP_LEN - 1, ROWS):
        offs = first + tl.arange(0, ROWS)
        mask = offs < CMP_LEN - 1
        token = position - (CMP_LEN - 1) + offs
        page = tl.load(pages_ptr + token // BLOCK_SIZE, mask=mask, other=0).to(tl.int64)
        row = (page * num_kv_heads + kv_head) * HELD + token % HELD
        x = tl.load(
            cache_ptr + row[:, None] * DIM + offs_d[None, :],
            mask=mask[:, None] & mask_d[None, :],
            other=0.0,
        )
        total += tl.sum(x.to(tl.float32), axis=0)
    mean = total / CMP_LEN
    tl.store(target_ptr + offs_d, mean.to(target_ptr.dtype.element_ty), mask=mask_d)


# What changes from step to step must not compile the kernel anew.
@triton.jit(
    do_not_specialize=[
        "num_tiles",
        "num_pages",
        "num_swa_pages",
        "stride_pb",
        "stride_spb",
    ]
)
def _decode_cmp_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_swa_ptr,
    v_swa_ptr,
    k_raw_ptr,
    v_raw_ptr,
    k_cache_ptr,
    v_cache_ptr,
    k_cmp_ptr,
    v_cmp_ptr,
    k_scale_ptr,
    v_scale_ptr,
    k_swa_cache_ptr,
    v_swa_cache_ptr,
    k_tail_ptr,
    v_tail_ptr,
    seq_lens_ptr,
    page_table_ptr,
    swa_page_table_ptr,
    o_part_ptr,
    lse2_part_ptr,
    units_ptr,
    spill_ptr,
    tile_max_ptr,
    scale,
    num_tiles,
    num_pages,
    num_swa_pages,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kst,
    stride_ksh,
    stride_vst,
    stride_vsh,
    stride_krt,
    stride_krh,
    stride_vrt,
    stride_vrh,
    stride_pb,
    stride_spb,
    GROUP_SIZE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WINDOW_STRIDES: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_POOL: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    V_HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_U: tl.constexpr,
    NUM_UNSCORED: tl.constexpr,
    SEPARATE: tl.constexpr,
    FUSE_APPEND: tl.constexpr,
    WITH_OUTPUT: tl.constexpr,
    WITH_SCORES: tl.constexpr,
    CHECK: tl.constexpr,
    PDL: tl.constexpr,
    START_NEXT: tl.constexpr,
    STAGES: tl.constexpr,
):
    TILE_E: tl.constexpr = TILE_BLOCKS * ENTRIES
    CMP_LEN: tl.constexpr = WINDOW_STRIDES * CMP_STRIDE
    # Tokens of a page that older tokens of a window are read from.
    HELD: tl.constexpr = CMP_LEN if SEPARATE else BLOCK_SIZE
    TILE_UNITS: tl.constexpr = TILE_E if MAX_POOL else TILE_BLOCKS
    # One entry a block: its probability is the unit.
    MAP_BLOCKS: tl.constexpr = WITH_SCORES and ENTRIES > 1 and not MAX_POOL
    # Windows that overlap need l <= block_size, so there are then several entries a block.
    WITH_SPILL: tl.constexpr = WINDOW_STRIDES > 1 and not MAX_POOL

    # KV heads vary fastest: programs that run side by side read pages end to end.
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    num_kv_heads = tl.num_programs(0)
    num_splits = tl.num_programs(1)
    row_pages_ptr = page_table_ptr + batch * stride_pb
    if k_scale_ptr is not None:
        k_scale_ptr += kv_head
        v_scale_ptr += kv_head
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    seq_len = tl.load(seq_lens_ptr + batch)
    position = seq_len - 1
    num_visible = seq_len // CMP_STRIDE
    row_tiles = tl.where(num_visible >= WINDOW_STRIDES, tl.cdiv(num_visible, TILE_E), 0)
    if NUM_UNSCORED > 0:
        # A dense row needs no scores.
        row_tiles = tl.where(seq_len > NUM_UNSCORED, row_tiles, 0)
    tiles_per_split = tl.cdiv(row_tiles, num_splits)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, row_tiles)

    if FUSE_APPEND:
        # The split with the newest entry appends; split 0 while there is none.
        owner = tl.maximum(row_tiles - 1, 0) // tl.maximum(tiles_per_split, 1)
        if (split == owner) & (seq_len > 0):
            k_row = k_ptr + batch * stride_kt + kv_head * stride_kh
            v_row = v_ptr + batch * stride_vt + kv_head * stride_vh
            page = tl.load(row_pages_ptr + position // BLOCK_SIZE).to(tl.int64)
            if CHECK:
                tl.device_assert((page >= 0) & (page < num_pages), "page id outside the cache")
            slot = (page * num_kv_heads + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
            _append_token(
                k_row, v_row, k_cache_ptr, v_cache_ptr, k_scale_ptr, v_scale_ptr, slot,
                HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            k_old_ptr, v_old_ptr, old_pages_ptr = k_cache_ptr, v_cache_ptr, row_pages_ptr
            if SEPARATE:
                old_pages_ptr = swa_page_table_ptr + batch * stride_spb
                swa_page = tl.load(old_pages_ptr + position // BLOCK_SIZE).to(tl.int64)
                if CHECK:
                    tl.device_assert(
                        (swa_page >= 0) & (swa_page < num_swa_pages), "page id outside the cache"
                    )
                slot = (swa_page * num_kv_heads + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
                _append_token(
                    k_swa_ptr + batch * stride_kst + kv_head * stride_ksh,
                    v_swa_ptr + batch * stride_vst + kv_head * stride_vsh,
                    k_swa_cache_ptr, v_swa_cache_ptr, None, None, slot,
                    HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
                k_row = k_raw_ptr + batch * stride_krt + kv_head * stride_krh
                v_row = v_raw_ptr + batch * stride_vrt + kv_head * stride_vrh
                slot = (swa_page * num_kv_heads + kv_head) * CMP_LEN + position % CMP_LEN
                _append_token(
                    k_row, v_row, k_tail_ptr, v_tail_ptr, None, None, slot,
                    HEAD_DIM, V_HEAD_DIM, BLOCK_D, BLOCK_DV,
                )  # fmt: skip
                k_old_ptr, v_old_ptr = k_tail_ptr, v_tail_ptr
            if (seq_len >= CMP_LEN) & (seq_len % CMP_STRIDE == 0):
                # A window closes. Its entry lies in the page of its last token.
                entry = (page * num_kv_heads + kv_head) * ENTRIES + (num_visible - 1) % ENTRIES
                _window_mean(
                    k_row, k_old_ptr, k_scale_ptr, old_pages_ptr, position, kv_head, num_kv_heads,
                    k_cmp_ptr + entry * HEAD_DIM, HEAD_DIM, BLOCK_D, BLOCK_SIZE, HELD, CMP_LEN,
                )  # fmt: skip
                _window_mean(
                    v_row, v_old_ptr, v_scale_ptr, old_pages_ptr, position, kv_head, num_kv_heads,
                    v_cmp_ptr + entry * V_HEAD_DIM, V_HEAD_DIM, BLOCK_DV, BLOCK_SIZE, HELD, CMP_LEN,
                )  # fmt: skip
                # This program reads the entry below, with other threads.
                tl.debug_barrier()

    if WITH_OUTPUT or WITH_SCORES:
        offs_h = tl.arange(0, BLOCK_H)
        offs_d = tl.arange(0, BLOCK_D)
        offs_dv = tl.arange(0, BLOCK_DV)
        offs_e = tl.arange(0, TILE_E)
        mask_h = offs_h < GROUP_SIZE
        q_row = q_ptr + batch * stride_qt + kv_head * GROUP_SIZE * stride_qh
        q = tl.load(
            q_row + offs_h[:, None] * stride_qh + offs_d[None, :],
            mask=mask_h[:, None] & (offs_d < HEAD_DIM)[None, :],
            other=0.0,
        )
        if k_scale_ptr is not None:
            scale *= tl.load(k_scale_ptr)
        # First query head of the group; everything per head counts from here.
        head_row = (batch * num_kv_heads + kv_head) * GROUP_SIZE
        tile_row = head_row * num_tiles
        if MAP_BLOCKS:
            # Column j counts the strides that an entry shares with the tile's block j; the column
            # after the last block is the block before the tile. Small integers are exact.
            offs_u = tl.arange(0, BLOCK_U)
            block = tl.where(offs_u < TILE_BLOCKS, offs_u, -1)
            past = offs_e[:, None] - block[None, :] * ENTRIES
            shared = tl.minimum(past, ENTRIES - 1) - tl.maximum(past - (WINDOW_STRIDES - 1), 0) + 1
            shared = tl.where((offs_u <= TILE_BLOCKS)[None, :], tl.maximum(shared, 0), 0)
            IS_FP32: tl.constexpr = q.dtype == tl.float32
            weights = shared.to(tl.float32 if IS_FP32 else tl.bfloat16)
        else:
            offs_u = offs_e

        m_i = tl.full([BLOCK_H], float("-inf"), tl.float32)
        # Summed over entries only at the end, which saves a reduction between warps a step.
        l_part = tl.zeros([BLOCK_H, TILE_E], tl.float32)
        acc = tl.zeros([BLOCK_H, BLOCK_DV], tl.float32)
        # Pages are loaded a step early: the copies of keys, issued ahead of their use, would
        # otherwise wait for an address first.
        entry = first_tile * TILE_E + offs_e
        page = tl.load(row_pages_ptr + entry // ENTRIES, mask=entry < num_visible, other=0)
        for tile in tl.range(first_tile, end_tile, num_stages=STAGES):
            entry = tile * TILE_E + offs_e
            is_visible = (entry >= WINDOW_STRIDES - 1) & (entry < num_visible)
            if CHECK:
                is_page = (page >= 0) & (page < num_pages)
                tl.device_assert(is_page, "page id outside the cache", mask=is_visible)
            row = (page.to(tl.int64) * num_kv_heads + kv_head) * ENTRIES + offs_e % ENTRIES
            entry += TILE_E
            page = tl.load(row_pages_ptr + entry // ENTRIES, mask=entry < num_visible, other=0)
            mask_k = is_visible[:, None]
            if BLOCK_D > HEAD_DIM:
                mask_k = mask_k & (offs_d < HEAD_DIM)[None, :]
            k_ptrs = k_cmp_ptr + row[:, None] * HEAD_DIM + offs_d[None, :]
            k = tl.load(k_ptrs, mask=mask_k, other=0.0).to(q.dtype)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(is_visible[None, :], s, float("-inf"))
            # Every tile of the loop has a visible entry, so the maximum is finite.
            m_new = tl.maximum(m_i, tl.max(s, axis=1))
            p = tl.exp2(s - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
            l_part = l_part * alpha[:, None] + p
            m_i = m_new
            if WITH_SCORES:
                units = p
                if MAP_BLOCKS:
                    if IS_FP32:
                        units = tl.dot(p, weights, input_precision="ieee")
                    else:
                        # Two bf16 halves carry 16 bits of p through the tensor cores.
                        high = p.to(tl.bfloat16)
                        low = (p - high.to(tl.float32)).to(tl.bfloat16)
                        units = tl.dot(low, weights, tl.dot(high, weights))
                at = tile_row + offs_h * num_tiles + tile
                unit_ptrs = units_ptr + at[:, None] * TILE_UNITS + offs_u[None, :]
                tl.store(unit_ptrs, units, mask=mask_h[:, None] & (offs_u < TILE_UNITS)[None, :])
                if WITH_SPILL:
                    spill_ptrs = spill_ptr + at[:, None] + (offs_u - TILE_BLOCKS)[None, :]
                    is_spill = mask_h[:, None] & (offs_u == TILE_BLOCKS)[None, :]
                    tl.store(spill_ptrs, units, mask=is_spill)
                tl.store(tile_max_ptr + at, m_new, mask=mask_h)
            if WITH_OUTPUT:
                mask_v = is_visible[:, None]
                if BLOCK_DV > V_HEAD_DIM:
                    mask_v = mask_v & (offs_dv < V_HEAD_DIM)[None, :]
                v_ptrs = v_cmp_ptr + row[:, None] * V_HEAD_DIM + offs_dv[None, :]
                v = tl.load(v_ptrs, mask=mask_v, other=0.0).to(q.dtype)
                acc *= alpha[:, None]
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")

        if START_NEXT:
            # Not before: programs that only wait would take the place of others of this kernel.
            tl.extra.cuda.gdc_launch_dependents()
        part = (head_row + offs_h) * num_splits + split
        if end_tile > first_tile:
            l_i = tl.sum(l_part, axis=1)
            tl.store(lse2_part_ptr + part, m_i + tl.log2(l_i), mask=mask_h)
            if WITH_OUTPUT:
                o_ptrs = o_part_ptr + part[:, None] * V_HEAD_DIM + offs_dv[None, :]
                mask_o = mask_h[:, None] & (offs_dv < V_HEAD_DIM)[None, :]
                if v_scale_ptr is not None:
                    acc *= tl.load(v_scale_ptr)
                tl.store(o_ptrs, acc / l_i[:, None], mask=mask_o)
        else:
            tl.store(lse2_part_ptr + part, float("-inf"), mask=mask_h)
