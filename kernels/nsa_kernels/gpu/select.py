"""Block selection: group-summed block scores from the score workspace, and an exact top-n.

The compression kernels leave, for each query head and score tile, probabilities relative to a
maximum of the tile's own ("units"); with the final log-sum-exp they become block scores here
(paper, Eq. 8 to 11; `reference.block_scores` and `reference.select_blocks`).

Scores become int32 keys, their bits (never negative, so they order like the score), and -1 for what
is no candidate. Constants, keys and the max-pooled scores are for decode too, whose top-n is
another one (`decode_select`).

Scores that are sums already have a selection of their own (`select_groups`).

Prefill wants throughput, a warp for a row. Key and block make one 64-bit number, so that no two are
equal and ties need no care; the largest is taken n times. The reductions are of tensors as they are
computed: over a reshaped one, in a single warp, Triton 3.6.0 was seen to leave a lane bit out.

Legend: R prefill tokens (rows of the workspace), HQ query heads, H KV heads, G = HQ // H, S blocks
to select, E compressed entries a page, NT score tiles of TB blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.common import score_tile_entries
from nsa_kernels.gpu.prefill_cmp import CmpScores
from nsa_kernels.spec import NSASpec

# Blocks, and for max pooling entries, that a program scores at once.
CHUNK_BLOCKS = 1024
CHUNK_ENTRIES = 2048
# Bits of +inf: above the key of every finite score.
FORCED_KEY = tl.constexpr(0x7F800000)
MAX_INT = tl.constexpr(0x7FFFFFFF)
# Fewest keys of a program.
MIN_KEYS = tl.constexpr(128)


def select_constants(
    spec: NSASpec,
    group_size: int,
    num_tiles: int,
    *,
    tile_entries: int,
    chunk_blocks: int,
    heads_per_step: int,
) -> dict[str, int | bool]:
    """Constants of the selection over at most `num_tiles` score tiles, as the kernels name them.

    chunk_blocks: at most this many blocks at once; heads_per_step: heads whose units are in flight
    together.
    """
    entries, is_max_pool = spec.cmp_entries_per_page, spec.score_map == "max_pool"
    tile_blocks = tile_entries // entries
    if is_max_pool:
        chunk_blocks = min(chunk_blocks, CHUNK_ENTRIES // entries)
    padded = triton.next_power_of_2(spec.num_selected_blocks)
    chunk_blocks = max(triton.next_power_of_2(chunk_blocks), MIN_KEYS.value, tile_blocks, padded)
    most_blocks = max(triton.next_power_of_2(num_tiles) * tile_blocks, MIN_KEYS.value)
    tiles = min(chunk_blocks, most_blocks) // tile_blocks
    return {
        "GROUP_SIZE": group_size,
        "HEADS": triton.next_power_of_2(min(heads_per_step, group_size)),
        "TILES": tiles,
        "TILE_BLOCKS": tile_blocks,
        "MAX_CHUNKS": triton.next_power_of_2(triton.cdiv(num_tiles, tiles)),
        "ENTRIES": entries,
        "WINDOW_STRIDES": spec.strides_per_window,
        "CMP_STRIDE": spec.cmp_stride,
        "BLOCK_SIZE": spec.block_size,
        "NUM_SELECTED": spec.num_selected_blocks,
        "BLOCK_S": padded,
        "DENSE_LEN": spec.dense_len,
        "WIDTH": spec.block_table_width,
        "BLOCK_W": triton.next_power_of_2(spec.block_table_width),
        "NUM_INIT": spec.num_init_blocks,
        "NUM_LOCAL": spec.num_local_blocks,
        "MAX_POOL": is_max_pool,
        "LEGACY": spec.selection == "fla_legacy",
    }


def select_blocks(
    scores: CmpScores,
    positions: Tensor,
    spec: NSASpec,
    *,
    num_kv_heads: int,
    out: Tensor | None = None,
    chunk_blocks: int = CHUNK_BLOCKS,
    heads_per_step: int = 4,
    num_warps: int = 1,
) -> Tensor:
    """Select the blocks of R prefill tokens at `positions` [R] int32: -> [R, H, width] int32.

    width: `spec.block_table_width`, S where no query is dense. A row lists its free blocks by
    score, then the forced ones; -1 where there are fewer than width.
    out: where to write them, contiguous. Tuning: chunk_blocks, heads_per_step (heads whose units
    are loaded together), num_warps.

    Raises ValueError when the scores were not asked for.
    """
    units, tile_max = scores.units, scores.tile_max
    if units is None or tile_max is None:
        raise ValueError("selection needs the score units of prefill_cmp(with_scores=True)")
    num_tokens, num_q_heads, num_tiles = tile_max.shape
    constants = select_constants(
        spec,
        num_q_heads // num_kv_heads,
        num_tiles,
        tile_entries=score_tile_entries(spec.cmp_entries_per_page),
        chunk_blocks=chunk_blocks,
        heads_per_step=heads_per_step,
    )
    rows = (num_tokens, num_kv_heads)
    if out is None:
        out = units.new_empty((*rows, spec.block_table_width), dtype=torch.int32)
    candidates = new_candidates(units, rows, constants)
    if num_tokens:
        _prefill_select_kernel[rows](
            units,
            scores.spill,
            tile_max,
            scores.lse2,
            positions,
            out,
            candidates,
            num_tiles,
            **constants,
            num_warps=num_warps,
        )
    return out


def new_candidates(like: Tensor, rows: tuple[int, int], constants: dict[str, int | bool]) -> Tensor:
    """Workspace for the winners of every chunk; empty if there is one chunk."""
    num_chunks = constants["MAX_CHUNKS"]
    size = num_chunks * constants["BLOCK_S"] if num_chunks > 1 else 0
    return like.new_empty((*rows, size), dtype=torch.int64)


@triton.jit
def load_lse2(lse2_ptr, head, mask, num_splits, BLOCK_SPLITS: tl.constexpr):
    """Parts [heads, splits] of the log-sum-exp2 of `head`."""
    offs = tl.arange(0, BLOCK_SPLITS)
    return tl.load(
        lse2_ptr + head[:, None] * num_splits + offs[None, :],
        mask=mask[:, None] & (offs < num_splits)[None, :],
        other=float("-inf"),
    )


@triton.jit
def merge_lse2(part):
    """Log-sum-exp2 over the splits of [heads, splits]: -> [heads]; any number if all are -inf."""
    top = tl.max(part, axis=1)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp2(part - top[:, None]), axis=1)
    return top + tl.log2(tl.where(total > 0.0, total, 1.0))


@triton.jit
def _tile_weight(tile_max_ptr, tile, mask, lse2):
    """Factor that makes the units of tiles probabilities."""
    tile_max = tl.load(tile_max_ptr + tile, mask=mask, other=0.0)
    return tl.where(mask, tl.exp2(tile_max - lse2), 0.0)


@triton.jit
def _block_scores(
    units_ptr,
    spill_ptr,
    tile_max_ptr,
    lse2_ptr,
    first_tile,
    num_tiles,
    num_visible,
    GROUP_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WINDOW_STRIDES: tl.constexpr,
    MAX_POOL: tl.constexpr,
):
    """Scores [TILES, TILE_BLOCKS] of the blocks from `first_tile` on.

    The pointers are those of the group's first head. Only tiles that begin before `num_visible`
    entries were written.
    """
    TILE_ENTRIES: tl.constexpr = TILE_BLOCKS * ENTRIES
    WITH_SPILL: tl.constexpr = WINDOW_STRIDES > 1
    tile = first_tile + tl.arange(0, TILES)
    offs = tl.arange(0, TILE_BLOCKS)
    if MAX_POOL:
        return max_pool_scores(
            units_ptr, tile_max_ptr, lse2_ptr, 1, tile, num_tiles, num_visible,
            GROUP_SIZE, TILE_BLOCKS, ENTRIES, WINDOW_STRIDES, BLOCK_SPLITS=1,
        )  # fmt: skip
    else:
        written = tile * TILE_ENTRIES < num_visible
        spills = (tile + 1) * TILE_ENTRIES < num_visible
        scores = tl.zeros([TILES, TILE_BLOCKS], tl.float32)
        # What a tile adds to the block before it belongs to the last block of the tile before.
        spilled = tl.zeros([TILES], tl.float32)
        for first_head in range(0, GROUP_SIZE, HEADS):
            head = first_head + tl.arange(0, HEADS)
            is_head = head < GROUP_SIZE
            lse2 = tl.load(lse2_ptr + head, mask=is_head, other=float("-inf"))[None, :]
            # Heads in the middle: each thread has all of them and sums without its neighbours.
            at = tile[:, None] + head[None, :] * num_tiles
            mask = written[:, None] & is_head[None, :]
            ptrs = units_ptr + at[:, :, None] * TILE_BLOCKS + offs[None, None, :]
            units = tl.load(ptrs, mask=mask[:, :, None], other=0.0).to(tl.float32)
            weight = _tile_weight(tile_max_ptr, at, mask, lse2)
            scores += tl.sum(units * weight[:, :, None], axis=1)
            if WITH_SPILL:
                mask = spills[:, None] & is_head[None, :]
                spill = tl.load(spill_ptr + at + 1, mask=mask, other=0.0).to(tl.float32)
                spilled += tl.sum(spill * _tile_weight(tile_max_ptr, at + 1, mask, lse2), axis=1)
        if WITH_SPILL:
            scores += tl.where((offs == TILE_BLOCKS - 1)[None, :], spilled[:, None], 0.0)
        return scores


@triton.jit
def max_pool_scores(
    units_ptr,
    tile_max_ptr,
    lse2_ptr,
    num_splits,
    tile,
    num_tiles,
    num_visible,
    GROUP_SIZE: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WINDOW_STRIDES: tl.constexpr,
    BLOCK_SPLITS: tl.constexpr,
):
    """Best window of each block, summed over the heads: [tiles, TILE_BLOCKS].

    A window that spans two blocks often is the best of both. Its two sums must be equal to the last
    bit, or the tie would not go to the lower block: both are taken head by head in the same order.
    """
    TILE_ENTRIES: tl.constexpr = TILE_BLOCKS * ENTRIES
    # Windows that begin in a block and end in the next are filed under the next.
    NUM_NEXT: tl.constexpr = WINDOW_STRIDES - 1
    COLUMNS: tl.constexpr = 2 * ENTRIES if NUM_NEXT > 0 else ENTRIES
    column = tl.arange(0, COLUMNS)
    block = tile[:, None] * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)[None, :]
    entry = block[:, :, None] * ENTRIES + column[None, None, :]
    mask = (entry < num_visible) & (column < ENTRIES + NUM_NEXT)[None, None, :]
    scores = tl.zeros(entry.shape, tl.float32)
    for one in range(GROUP_SIZE):
        if BLOCK_SPLITS == 1:
            lse2 = tl.load(lse2_ptr + one)
        else:
            head = one + tl.arange(0, 1)
            part = load_lse2(lse2_ptr, head, head >= 0, num_splits, BLOCK_SPLITS)
            lse2 = tl.sum(merge_lse2(part), axis=0)
        at = one * num_tiles * TILE_ENTRIES + entry
        units = tl.load(units_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tile_max = tl.load(tile_max_ptr + at // TILE_ENTRIES, mask=mask, other=0.0)
        # The log-sum-exp of coarse windows may be far below the maximum of the others: the bound
        # keeps sums finite.
        weight = tl.exp2(tl.minimum(tile_max - lse2, 100.0))
        scores += units * tl.where(mask, weight, 0.0)
    return tl.max(scores, axis=2)


@triton.jit
def values_of(keys, block):
    """One number for a key and its block, ordered by key, then by the lower block; -1 for none."""
    value = (keys.to(tl.int64) << 32) | (block ^ MAX_INT).to(tl.int64)
    return tl.where(keys >= 0, value, -1)


@triton.jit
def _block_of(value):
    """Block of a value, -1 for none."""
    return tl.where(value >= 0, value.to(tl.int32) ^ MAX_INT, -1)


@triton.jit
def _keep_top(values, target_ptr, COUNT: tl.constexpr, AS_BLOCKS: tl.constexpr):
    """Write the COUNT largest of values [rows, columns], largest first, -1 if there are fewer."""
    for place in range(COUNT):
        best = tl.max(tl.max(values, axis=1), axis=0)
        tl.store(target_ptr + place, _block_of(best) if AS_BLOCKS else best)
        values = tl.where(values == best, -1, values)


@triton.jit
def pick_values(
    values,
    end,
    num_blocks,
    target_ptr,
    NUM_SELECTED: tl.constexpr,
    NUM_FORCED: tl.constexpr,
    LEGACY: tl.constexpr,
    AS_BLOCKS: tl.constexpr,
):
    """Write what the rule of the dialect chooses among values [rows, columns].

    They are of blocks before `end`.
    """
    if LEGACY:
        # Its two halves come from the blocks before and in the last NUM_SELECTED.
        half: tl.constexpr = NUM_SELECTED // 2
        border = (num_blocks - 1) // NUM_SELECTED * NUM_SELECTED
        is_present = _block_of(values) >= border
        _keep_top(tl.where(is_present, -1, values), target_ptr, half, AS_BLOCKS)
        if end > border:
            _keep_top(tl.where(is_present, values, -1), target_ptr + half, half, AS_BLOCKS)
        else:
            for place in range(half):
                tl.store(target_ptr + half + place, -1)
    else:
        _keep_top(values, target_ptr, NUM_SELECTED - NUM_FORCED, AS_BLOCKS)


@triton.jit
def block_keys(
    scores,
    chunk,
    num_blocks,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """Keys and numbers of the blocks of a chunk, from their scores [TILES, TILE_BLOCKS]."""
    TILES: tl.constexpr = scores.shape[0]
    TILE_BLOCKS: tl.constexpr = scores.shape[1]
    block = tl.arange(0, TILES)[:, None] * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)[None, :]
    block += chunk * (TILES * TILE_BLOCKS)
    return score_keys(scores, block, num_blocks, NUM_INIT, NUM_LOCAL, LEGACY), block


@triton.jit
def score_keys(
    scores,
    block,
    num_blocks,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """Keys of the blocks numbered `block` from their scores, both of one shape."""
    # The maximum also makes NaN 0, whose bits might be a negative key.
    keys = tl.maximum(scores, 0.0).to(tl.int32, bitcast=True)
    if LEGACY:
        is_free = (block >= NUM_INIT) & (block < num_blocks - NUM_LOCAL)
        keys = tl.where(is_free, keys, FORCED_KEY)
        keys = tl.where(block < num_blocks, keys, -1)
    else:
        # One unsigned comparison for both ends of what is free.
        num_free = num_blocks - (NUM_INIT + NUM_LOCAL)
        is_free = (block - NUM_INIT).to(tl.uint32, bitcast=True) < num_free.to(tl.uint32)
        keys = tl.where(is_free, keys, -1)
    return keys


@triton.jit
def _chunk_values(
    units_ptr,
    spill_ptr,
    tile_max_ptr,
    lse2_ptr,
    chunk,
    num_tiles,
    position,
    GROUP_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    TILES: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    ENTRIES: tl.constexpr,
    WINDOW_STRIDES: tl.constexpr,
    CMP_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    MAX_POOL: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """Values of the candidates in one chunk of TILES tiles: [TILES, TILE_BLOCKS].

    Forced blocks are no candidates, but the rule of LEGACY counts them with the others.
    """
    num_blocks = (position + BLOCK_SIZE) // BLOCK_SIZE
    scores = _block_scores(
        units_ptr, spill_ptr, tile_max_ptr, lse2_ptr,
        chunk * TILES, num_tiles, (position + 1) // CMP_STRIDE,
        GROUP_SIZE, HEADS, TILES, TILE_BLOCKS, ENTRIES, WINDOW_STRIDES, MAX_POOL,
    )  # fmt: skip
    keys, block = block_keys(scores, chunk, num_blocks, NUM_INIT, NUM_LOCAL, LEGACY)
    return values_of(keys, block)


@triton.jit
def merged_values(
    candidates_ptr,
    num_chunks,
    MAX_CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_PICKED: tl.constexpr,
):
    """What all chunks of a row picked: [MAX_CHUNKS, BLOCK_S]."""
    chunk, place = tl.arange(0, MAX_CHUNKS)[:, None], tl.arange(0, BLOCK_S)[None, :]
    mask = (chunk < num_chunks) & (place < NUM_PICKED)
    return tl.load(candidates_ptr + chunk * BLOCK_S + place, mask=mask, other=-1)


@triton.jit
def store_forced(
    num_blocks,
    indices_ptr,
    NUM_SELECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
):
    """Write the initial and the local blocks behind the free ones."""
    rest = tl.arange(0, BLOCK_S) - (NUM_SELECTED - NUM_INIT - NUM_LOCAL)
    block = tl.where(rest < NUM_INIT, rest, num_blocks - NUM_LOCAL + rest - NUM_INIT)
    mask = (rest >= 0) & (rest < NUM_INIT + NUM_LOCAL)
    tl.store(indices_ptr + tl.arange(0, BLOCK_S), block, mask=mask)


@triton.jit
def store_all_blocks(
    num_blocks,
    indices_ptr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Write the blocks 0 .. num_blocks - 1, at most WIDTH, and fill up with -1."""
    offs = tl.arange(0, BLOCK_W)
    block = tl.where(offs < num_blocks, offs, -1)
    mask = offs < WIDTH
    tl.store(indices_ptr + offs, block, mask=mask)


@triton.jit
def select_row(
    units_ptr,
    spill_ptr,
    tile_max_ptr,
    lse2_ptr,
    num_tiles,
    position,
    candidates_ptr,
    indices_ptr,
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
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    MAX_POOL: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """Select for one query and KV head, chunk after chunk. Position -1 selects nothing."""
    num_blocks = (position + BLOCK_SIZE) // BLOCK_SIZE
    if (num_blocks <= NUM_SELECTED) | (position + 1 < DENSE_LEN):
        store_all_blocks(num_blocks, indices_ptr, WIDTH, BLOCK_W)
    else:
        NUM_FORCED: tl.constexpr = NUM_INIT + NUM_LOCAL
        NUM_PICKED: tl.constexpr = NUM_SELECTED if LEGACY else NUM_SELECTED - NUM_FORCED
        if MAX_CHUNKS == 1:
            values = _chunk_values(
                units_ptr, spill_ptr, tile_max_ptr, lse2_ptr, 0, num_tiles, position,
                GROUP_SIZE, HEADS, TILES, TILE_BLOCKS, ENTRIES, WINDOW_STRIDES, CMP_STRIDE,
                BLOCK_SIZE, NUM_INIT, NUM_LOCAL, MAX_POOL, LEGACY,
            )  # fmt: skip
        else:
            num_chunks = tl.cdiv(num_blocks, TILES * TILE_BLOCKS)
            for chunk in range(num_chunks):
                part = _chunk_values(
                    units_ptr, spill_ptr, tile_max_ptr, lse2_ptr, chunk, num_tiles, position,
                    GROUP_SIZE, HEADS, TILES, TILE_BLOCKS, ENTRIES, WINDOW_STRIDES, CMP_STRIDE,
                    BLOCK_SIZE, NUM_INIT, NUM_LOCAL, MAX_POOL, LEGACY,
                )  # fmt: skip
                pick_values(
                    part, (chunk + 1) * (TILES * TILE_BLOCKS), num_blocks,
                    candidates_ptr + chunk * BLOCK_S,
                    NUM_SELECTED, NUM_FORCED, LEGACY, AS_BLOCKS=False,
                )  # fmt: skip
            # Other threads read what these wrote.
            tl.debug_barrier()
            values = merged_values(candidates_ptr, num_chunks, MAX_CHUNKS, BLOCK_S, NUM_PICKED)
        pick_values(
            values, num_blocks, num_blocks, indices_ptr,
            NUM_SELECTED, NUM_FORCED, LEGACY, AS_BLOCKS=True,
        )  # fmt: skip
        if not LEGACY:
            store_forced(num_blocks, indices_ptr, NUM_SELECTED, BLOCK_S, NUM_INIT, NUM_LOCAL)
        if WIDTH > NUM_SELECTED:
            rest = tl.arange(0, BLOCK_W)
            tl.store(indices_ptr + rest, -1, mask=(rest >= NUM_SELECTED) & (rest < WIDTH))


@triton.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=["positions_ptr"])
def _prefill_select_kernel(
    units_ptr,
    spill_ptr,
    tile_max_ptr,
    lse2_ptr,
    positions_ptr,
    indices_ptr,
    candidates_ptr,
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
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    MAX_POOL: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """One program is one token and KV head."""
    token = tl.program_id(0).to(tl.int64)
    row = token * tl.num_programs(1) + tl.program_id(1)
    tiles = row * GROUP_SIZE * num_tiles
    TILE_UNITS: tl.constexpr = TILE_BLOCKS * ENTRIES if MAX_POOL else TILE_BLOCKS
    select_row(
        units_ptr + tiles * TILE_UNITS,
        spill_ptr if spill_ptr is None else spill_ptr + tiles,
        tile_max_ptr + tiles,
        lse2_ptr + row * GROUP_SIZE,
        num_tiles,
        tl.load(positions_ptr + token),
        candidates_ptr + row * (MAX_CHUNKS * BLOCK_S),
        indices_ptr + row * WIDTH,
        GROUP_SIZE, HEADS, TILES, TILE_BLOCKS, MAX_CHUNKS, ENTRIES, WINDOW_STRIDES, CMP_STRIDE,
        BLOCK_SIZE, NUM_SELECTED, BLOCK_S, DENSE_LEN, WIDTH, BLOCK_W, NUM_INIT, NUM_LOCAL, MAX_POOL,
        LEGACY,
    )  # fmt: skip
