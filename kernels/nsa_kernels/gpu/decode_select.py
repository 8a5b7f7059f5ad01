"""Block selection of decode rows: block scores from the score workspace, and an exact top-n.

Constants and keys are those of `select`. The splits of the log-sum-exp are merged on the way to the
scores, and the pages of the chosen blocks are looked up, too.

Decode wants latency, several warps for a row. Keys and blocks make one 64-bit number, so no two are
equal and ties need no care. The n best lie in the n groups with the best maxima; those groups, and
then what is in them, are ranked by counting for each how many are larger: no loop, and a number of
barriers that depends on no score. The rank is the place of the block in the output.

A row too long for one program is cut into chunks of blocks. Each chunk keeps its best, and the
program that arrives last ranks these.

Legend: Nd decode rows, the first of B in the page table, P pages of the longest row, HQ query
heads, H KV heads, S blocks to select.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.select import (
    MAX_INT,
    MIN_KEYS,
    block_keys,
    load_lse2,
    max_pool_scores,
    merge_lse2,
)

# With units up to this size those beyond the row are read, not to wait for its length first.
EARLY_BYTES = 1 << 20
# Elements compared with all others at once.
RANK_STEP = tl.constexpr(128)


def decode_select(
    units: Tensor,
    spill: Tensor | None,
    tile_max: Tensor,
    lse2_part: Tensor,
    seq_lens: Tensor,
    page_table: Tensor,
    block_indices: Tensor,
    block_pages: Tensor,
    counters: Tensor,
    constants: dict[str, int | bool],
    *,
    num_pages: int,
    shape_rows: int | None = None,
    check: bool = False,
    launch_pdl: bool = False,
    start_next: bool = False,
    num_warps: int = 4,
    early_bytes: int = EARLY_BYTES,
) -> Tensor | None:
    """Select the blocks of decode rows: a program per chunk of blocks, the last one merges.

    lse2_part: [Nd, HQ, splits] fp32. seq_lens: [B], page_table: [B, P] int32; written before the
    kernel in front began. block_indices, block_pages: [Nd, H, width] int32, written. counters:
    [Nd * H] int32 zeros, and zeros afterwards. constants: of `select_constants`, as units were
    written. shape_rows: rows to be cut for, None = Nd. launch_pdl: start while the kernel in front
    ends; start_next: let the next one do so.
    Tuning: num_warps; early_bytes, up to which size units are read before the row's length is.

    Returns the kernel's own workspace, if it has one: to be kept while it may run.
    """
    num_rows, num_kv_heads, _ = block_indices.shape
    num_selected = int(constants["NUM_SELECTED"])
    num_splits, num_chunks = lse2_part.shape[2], int(constants["MAX_CHUNKS"])
    num_free = num_selected - int(constants["NUM_INIT"]) - int(constants["NUM_LOCAL"])
    num_picks = num_selected // 2 if constants["LEGACY"] else num_free
    slots = int(triton.next_power_of_2(max(num_picks, 1)))
    candidates = None
    if num_chunks > 1:
        size = num_chunks * slots * (2 if constants["LEGACY"] else 1)
        candidates = units.new_empty((num_rows, num_kv_heads, size), dtype=torch.int64)
    is_early = num_chunks == 1 and not launch_pdl
    row_bytes = units.numel() // num_rows * units.element_size()
    is_early = is_early and row_bytes * (shape_rows or num_rows) <= early_bytes
    _decode_select_kernel[(num_chunks, num_kv_heads, num_rows)](
        units,
        spill,
        tile_max,
        lse2_part,
        num_splits,
        seq_lens,
        page_table,
        page_table.stride(0),
        num_pages,
        block_indices,
        block_pages,
        candidates,
        counters,
        units.shape[2],
        **constants,
        NUM_PICKS=num_picks,
        SLOTS=slots,
        BLOCK_SPLITS=triton.next_power_of_2(num_splits),
        EARLY=is_early,
        CHECK=check,
        PDL=launch_pdl,
        START_NEXT=start_next,
        num_warps=num_warps,
        debug=check,
        **({"launch_pdl": True} if launch_pdl else {}),
    )
    return candidates


@triton.jit
def _decode_scores(
    units_ptr,
    spill_ptr,
    tile_max_ptr,
    lse2_ptr,
    num_splits,
    first_tile,
    end_tile,
    num_tiles,
    num_visible,
    GROUP_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WINDOW_STRIDES: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Scores [TILES, TILE_BLOCKS] of the blocks from `first_tile` on, like `select._block_scores`.

    All loads of a step are issued before the first is waited for, the small ones in front. Tiles
    before `end_tile` are read though they may not have been written: what is void in them stays
    with blocks that no rule scores, apart from the spill.
    """
    WITH_SPILL: tl.constexpr = WINDOW_STRIDES > 1
    tile = first_tile + tl.arange(0, TILES)
    offs = tl.arange(0, TILE_BLOCKS)
    is_tile = (tile < end_tile)[:, None]
    is_next = (tile + 1 < end_tile)[:, None]
    spills = ((tile + 1) * (TILE_BLOCKS * ENTRIES) < num_visible)[:, None]
    scores = tl.zeros([TILES, TILE_BLOCKS], tl.float32)
    spilled = tl.zeros([TILES], tl.float32)
    for first_head in range(0, GROUP_SIZE, HEADS):
        head = first_head + tl.arange(0, HEADS)
        is_head = head < GROUP_SIZE
        at = tile[:, None] + head[None, :] * num_tiles
        mask, next_mask = is_tile, is_next
        if GROUP_SIZE % HEADS != 0:
            mask = mask & is_head[None, :]
            next_mask = next_mask & is_head[None, :]
        lse2_part = load_lse2(lse2_ptr, head, is_head, num_splits, BLOCK_SPLITS)
        tile_max = tl.load(tile_max_ptr + at, mask=mask, other=float("-inf"))
        if WITH_SPILL:
            spill = tl.load(spill_ptr + at + 1, mask=next_mask, other=0.0)
            next_max = tl.load(tile_max_ptr + at + 1, mask=next_mask, other=float("-inf"))
        ptrs = units_ptr + at[:, :, None] * TILE_BLOCKS + offs[None, None, :]
        units = tl.load(ptrs, mask=mask[:, :, None], other=0.0)
        lse2 = merge_lse2(lse2_part)[None, :]
        if WITH_SPILL:
            spill = tl.where(spills, spill * tl.exp2(next_max - lse2), 0.0)
            spilled += tl.sum(spill, axis=1)
        scores += tl.sum(units * tl.exp2(tile_max - lse2)[:, :, None], axis=1)
    if WITH_SPILL:
        scores += tl.where((offs == TILE_BLOCKS - 1)[None, :], spilled[:, None], 0.0)
    return scores


@triton.jit
def _pack(keys, block):
    """One int64 a key: larger for a larger key, then for a lower block; negative if the key is."""
    return (keys.to(tl.int64) << 32) | (block ^ MAX_INT).to(tl.int64)


@triton.jit
def _unpack(values):
    """Keys and blocks of packed values."""
    return (values >> 32).to(tl.int32), values.to(tl.int32) ^ MAX_INT


@triton.jit
def _count_larger(some, values):
    """For each of [N] values, how many of `some` [M] are larger."""
    NUM: tl.constexpr = values.shape[0]
    LANES: tl.constexpr = 32 if NUM > 32 else NUM
    # One value a lane and row, and `some` shared out to the warps: so a thread needs few of both,
    # and counts for itself until the warps add up.
    columns = tl.reshape(values, [NUM // LANES, 1, LANES])
    larger = (some[None, :, None] > columns).to(tl.int32)
    return tl.reshape(tl.sum(larger, axis=1), [NUM])


@triton.jit
def _rank(values):
    """For each of [N] different values, the number of larger ones."""
    NUM: tl.constexpr = values.shape[0]
    if NUM <= 2 * RANK_STEP:
        rank = _count_larger(values, values)
    else:
        rank = tl.zeros([NUM], tl.int32)
        for first in range(0, NUM, RANK_STEP):
            some = tl.gather(values, first + tl.arange(0, RANK_STEP), axis=0)
            rank += _count_larger(some, values)
    return rank


@triton.jit
def _spread(values):
    """[N] values in whatever order over the threads suits their next use, not their last."""
    return tl.gather(values, tl.arange(0, values.shape[0]), axis=0)


@triton.jit
def _finalists(values, SLOTS: tl.constexpr):
    """Few of [N] different values, with the SLOTS largest among them."""
    NUM: tl.constexpr = values.shape[0]
    GROUPS: tl.constexpr = MIN_KEYS if MIN_KEYS >= 2 * SLOTS else 2 * SLOTS
    if NUM <= GROUPS:
        return _spread(values)
    else:
        # They are in the SLOTS groups whose own largest are largest.
        SIZE: tl.constexpr = NUM // GROUPS
        rank = _rank(_spread(tl.max(tl.reshape(values, [GROUPS, SIZE]), axis=1)))
        group = tl.where(
            rank[:, None] == tl.arange(0, SLOTS)[None, :], tl.arange(0, GROUPS)[:, None], 0
        )
        at = tl.sum(group, axis=0)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
        values = tl.gather(values, tl.reshape(at, [SLOTS * SIZE]), axis=0)
        return values if SLOTS * SIZE <= GROUPS else _finalists(values, SLOTS)


@triton.jit
def _load_page(page_table_ptr, block, mask, num_pages, CHECK: tl.constexpr):
    page = tl.load(page_table_ptr + block, mask=mask, other=0)
    if CHECK:
        tl.device_assert((page >= 0) & (page < num_pages), "page id outside the cache")
    return page


@triton.jit
def _keep_best(values, candidates_ptr, SLOTS: tl.constexpr):
    """Store the SLOTS largest values, from the largest down."""
    values = _finalists(values, SLOTS)
    rank = _rank(values)
    tl.store(candidates_ptr + rank, values, mask=rank < SLOTS)


@triton.jit
def _write_best(
    values,
    first,
    indices_ptr,
    pages_ptr,
    page_table_ptr,
    num_pages,
    NUM_PICKS: tl.constexpr,
    SLOTS: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Write the blocks of the NUM_PICKS largest values, negative ones excepted, from `first` on."""
    values = _finalists(values, SLOTS)
    _, block = _unpack(values)
    # Looked up for all finalists, while they are ranked.
    page = _load_page(page_table_ptr, block, values >= 0, num_pages, CHECK)
    rank = _rank(values)
    mask = (values >= 0) & (rank < NUM_PICKS)
    tl.store(indices_ptr + first + rank, block, mask=mask)
    tl.store(pages_ptr + first + rank, page, mask=mask)


@triton.jit
def _write_selection(
    values,
    num_blocks,
    indices_ptr,
    pages_ptr,
    page_table_ptr,
    num_pages,
    NUM_SELECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_PICKS: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    LEGACY: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Write what is chosen of all candidates of a row with more than NUM_SELECTED blocks."""
    offs = tl.arange(0, BLOCK_S)
    if LEGACY:
        # Forced blocks are among the candidates. The past always fills its half.
        first_present = (num_blocks - 1) // NUM_SELECTED * NUM_SELECTED
        keys, block = _unpack(values)
        is_present = block >= first_present
        _write_best(
            _pack(tl.where(is_present, -1, keys), block), 0,
            indices_ptr, pages_ptr, page_table_ptr, num_pages, NUM_PICKS, SLOTS, CHECK,
        )  # fmt: skip
        _write_best(
            _pack(tl.where(is_present, keys, -1), block), NUM_PICKS,
            indices_ptr, pages_ptr, page_table_ptr, num_pages, NUM_PICKS, SLOTS, CHECK,
        )  # fmt: skip
        mask = (offs >= NUM_PICKS + num_blocks - first_present) & (offs < NUM_SELECTED)
        tl.store(indices_ptr + offs, -1, mask=mask)
        tl.store(pages_ptr + offs, 0, mask=mask)
    else:
        # The free blocks always fill their places; the forced ones follow.
        rest = offs - NUM_PICKS
        forced = tl.where(rest < NUM_INIT, rest, num_blocks - NUM_LOCAL + rest - NUM_INIT)
        mask = (rest >= 0) & (offs < NUM_SELECTED)
        page = _load_page(page_table_ptr, forced, mask, num_pages, CHECK)
        if NUM_PICKS > 0:
            _write_best(
                values, 0,
                indices_ptr, pages_ptr, page_table_ptr, num_pages, NUM_PICKS, SLOTS, CHECK,
            )  # fmt: skip
        tl.store(indices_ptr + offs, forced, mask=mask)
        tl.store(pages_ptr + offs, page, mask=mask)


@triton.jit(do_not_specialize=["num_splits", "num_tiles", "num_pages", "stride_pb"])
def _decode_select_kernel(
    units_ptr,
    spill_ptr,
    tile_max_ptr,
    lse2_ptr,
    num_splits,
    seq_lens_ptr,
    page_table_ptr,
    stride_pb,
    num_pages,
    indices_ptr,
    pages_ptr,
    candidates_ptr,
    counters_ptr,
    num_tiles,
    GROUP_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WINDOW_STRIDES: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DENSE_LEN: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    NUM_PICKS: tl.constexpr,
    SLOTS: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    MAX_POOL: tl.constexpr,
    LEGACY: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
    CHECK: tl.constexpr,
    PDL: tl.constexpr,
    START_NEXT: tl.constexpr,
):
    """One program is one chunk of the blocks of a row and KV head."""
    NUM_KEYS: tl.constexpr = TILES * TILE_BLOCKS
    TILE_UNITS: tl.constexpr = TILE_BLOCKS * ENTRIES if MAX_POOL else TILE_BLOCKS
    chunk = tl.program_id(0)
    batch = tl.program_id(2).to(tl.int64)
    row = batch * tl.num_programs(1) + tl.program_id(1)
    # The kernel in front does not write it, and has itself waited for those that might.
    position = tl.load(seq_lens_ptr + batch) - 1
    num_blocks = (position + BLOCK_SIZE) // BLOCK_SIZE
    # The programs of chunks that the row has; a short row still has one, which writes it.
    num_chunks = tl.maximum(tl.cdiv(num_blocks, NUM_KEYS), 1)
    if MAX_CHUNKS > 1 and chunk >= num_chunks:
        return
    if PDL:
        tl.extra.cuda.gdc_wait()
    # Not before: the next kernel may read what the one in front has written.
    if START_NEXT:
        tl.extra.cuda.gdc_launch_dependents()
    indices_ptr += row * WIDTH
    pages_ptr += row * WIDTH
    page_table_ptr += batch * stride_pb
    tiles = row * GROUP_SIZE * num_tiles
    units_ptr += tiles * TILE_UNITS
    tile_max_ptr += tiles
    lse2_ptr += row * GROUP_SIZE * num_splits
    num_visible = (position + 1) // CMP_STRIDE
    if MAX_POOL:
        scores = max_pool_scores(
            units_ptr, tile_max_ptr, lse2_ptr, num_splits,
            chunk * TILES + tl.arange(0, TILES), num_tiles, num_visible,
            GROUP_SIZE, TILE_BLOCKS, ENTRIES, WINDOW_STRIDES, BLOCK_SPLITS,
        )  # fmt: skip
    else:
        end_tile = num_tiles if EARLY else tl.cdiv(num_visible, TILE_BLOCKS * ENTRIES)
        scores = _decode_scores(
            units_ptr, spill_ptr if spill_ptr is None else spill_ptr + tiles,
            tile_max_ptr, lse2_ptr, num_splits,
            chunk * TILES, end_tile, num_tiles, num_visible,
            GROUP_SIZE, HEADS, TILES, TILE_BLOCKS, ENTRIES, WINDOW_STRIDES, BLOCK_SPLITS,
        )  # fmt: skip
    if (num_blocks <= NUM_SELECTED) | (position + 1 < DENSE_LEN):
        if chunk == 0:
            offs = tl.arange(0, BLOCK_W)
            block = tl.where(offs < num_blocks, offs, -1)
            page = _load_page(page_table_ptr, block, offs < num_blocks, num_pages, CHECK)
            tl.store(indices_ptr + offs, block, mask=offs < WIDTH)
            tl.store(pages_ptr + offs, page, mask=offs < WIDTH)
        return
    keys, block = block_keys(scores, chunk, num_blocks, NUM_INIT, NUM_LOCAL, LEGACY)
    values = tl.reshape(_pack(keys, block), [NUM_KEYS])
    if MAX_CHUNKS > 1:
        PICKED: tl.constexpr = 2 * SLOTS if LEGACY else SLOTS
        candidates_ptr += row * (MAX_CHUNKS * PICKED)
        best_ptr = candidates_ptr + chunk * PICKED
        if LEGACY:
            keys, block = _unpack(values)
            is_present = block >= (num_blocks - 1) // NUM_SELECTED * NUM_SELECTED
            _keep_best(_pack(tl.where(is_present, -1, keys), block), best_ptr, SLOTS)
            _keep_best(_pack(tl.where(is_present, keys, -1), block), best_ptr + SLOTS, SLOTS)
        else:
            _keep_best(values, best_ptr, SLOTS)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + row, 1, sem="acq_rel")
        if arrived != num_chunks - 1:
            return
        tl.store(counters_ptr + row, 0)
        offs = tl.arange(0, MAX_CHUNKS * PICKED)
        # No value of its own for what no chunk wrote: blocks that do not exist.
        values = tl.load(
            candidates_ptr + offs,
            mask=offs < num_chunks * PICKED,
            other=_pack(tl.full(offs.shape, -1, tl.int32), MAX_CHUNKS * NUM_KEYS + offs),
        )
    _write_selection(
        values, num_blocks, indices_ptr, pages_ptr, page_table_ptr, num_pages,
        NUM_SELECTED, BLOCK_S, NUM_PICKS, SLOTS, NUM_INIT, NUM_LOCAL, LEGACY, CHECK,
    )  # fmt: skip
    if WIDTH > NUM_SELECTED:
        rest = tl.arange(0, BLOCK_W)
        is_rest = (rest >= NUM_SELECTED) & (rest < WIDTH)
        tl.store(indices_ptr + rest, -1, mask=is_rest)
        tl.store(pages_ptr + rest, 0, mask=is_rest)
