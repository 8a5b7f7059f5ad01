"""Block selection: group-summed block scores from the score workspace, and an exact top-n.

The compression kernels leave, for each query head and score tile, probabilities relative to a
maximum of the tile's own ("units"); with the final log-sum-exp they become block scores here
(paper, Eq. 8 to 11; `reference.block_scores` and `reference.select_blocks`).

Top-n works on int32 keys, the bits of a score (never negative, so they order like it), and -1 for
what is no candidate. Constants, keys and the max-pooled scores are for decode too, whose top-n is
another one (`decode_select`).

Prefill wants throughput, a warp for a row. The n-th largest of the maxima of small groups bounds
the n-th largest key from below, and usually only a few keys lie between the two; the threshold
rises over these one by one. So there is no sort, every reduction is of one 32-bit word, and few of
them go over all keys. The chosen are then bits of a word for every 16 keys, and written out from
lowest to highest.

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
# Keys of a word, of whose 32 bits the upper half counts; and the least that is sorted out at once.
WORD = tl.constexpr(16)
MIN_KEYS = tl.constexpr(128)
# Keys above the first threshold that are taken away one by one, before bisection is faster.
MAX_STEPS = tl.constexpr(16)


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
    """Select the blocks of R prefill tokens at `positions` [R] int32: -> [R, H, S] int32.

    A row's blocks are in no particular order, the same in every run; -1 fills up at the end.
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
        out = units.new_empty((*rows, spec.num_selected_blocks), dtype=torch.int32)
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
    """Workspace for the winners of every chunk, (key, block) pairs; empty if there is one chunk."""
    num_chunks = constants["MAX_CHUNKS"]
    size = 2 * num_chunks * constants["BLOCK_S"] if num_chunks > 1 else 0
    return like.new_empty((*rows, size), dtype=torch.int32)


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
        scores += units * _tile_weight(tile_max_ptr, at // TILE_ENTRIES, mask, lse2)
    return tl.max(scores, axis=2)


@triton.jit
def _count_above(keys, threshold):
    return tl.sum((keys > threshold).to(tl.int32))


@triton.jit
def _words(picked):
    """For every WORD flags of [rows, columns]: one bit each, and their number times 2^16."""
    NUM_WORDS: tl.constexpr = picked.shape[0] * picked.shape[1] // WORD
    value = (1 << tl.arange(0, WORD)) | 0x10000
    flags = tl.reshape(picked.to(tl.int32), [NUM_WORDS, WORD])
    return tl.sum(flags * value[None, :], axis=1)


@triton.jit
def _top_words(keys, COUNT: tl.constexpr):
    """Words of the COUNT largest keys [rows, columns], -1 excepted; of equal ones the first."""
    NUM_KEYS: tl.constexpr = keys.shape[0] * keys.shape[1]
    # Neighbours often score alike: pairs of them, and keys far away, share a group.
    GROUPS: tl.constexpr = NUM_KEYS // 2 if NUM_KEYS <= 2 * MIN_KEYS else MIN_KEYS
    LOW_BITS: tl.constexpr = GROUPS - 1
    best = tl.max(tl.reshape(keys, [NUM_KEYS // (2 * GROUPS), GROUPS, 2]), axis=2)
    best = tl.max(best, axis=0)
    # Made unique by the group in the low bits, COUNT maxima are at least the last one's high bits.
    best = (best & ~LOW_BITS) | (LOW_BITS - tl.arange(0, GROUPS))
    bound = tl.max(best, axis=0)
    for _ in range(COUNT - 1):
        bound = tl.max(tl.where(best < bound, best, -1), axis=0)
    start = tl.maximum((bound & ~LOW_BITS) - 1, -1)
    above = _count_above(keys, start)
    threshold = start
    for _ in range(tl.minimum(above - COUNT, MAX_STEPS)):
        threshold = tl.min(tl.where(keys > threshold, keys, MAX_INT))
    words = _words(keys > threshold)
    if (above > COUNT) & (tl.sum(words >> 16, axis=0) != COUNT):
        # Ties, or more steps to take: bisect to the least threshold with fewer keys above.
        low, high = start, start * 0 + FORCED_KEY
        while high - low > 1:
            middle = low + (high - low) // 2
            is_low = _count_above(keys, middle) >= COUNT
            low = tl.where(is_low, middle, low)
            high = tl.where(is_low, high, middle)
        # Of the keys that equal it, take those before a place that leaves enough.
        is_tied = keys == high
        place = tl.arange(0, keys.shape[0])[:, None] * keys.shape[1]
        place = place + tl.arange(0, keys.shape[1])[None, :]
        room = COUNT - _count_above(keys, high)
        first, last = start * 0, start * 0 + NUM_KEYS
        while first < last:
            middle = (first + last) // 2
            is_enough = tl.sum((is_tied & (place < middle)).to(tl.int32)) >= room
            first = tl.where(is_enough, first, middle + 1)
            last = tl.where(is_enough, middle, last)
        words = _words((keys > high) | (is_tied & (place < last)))
    return words


@triton.jit
def _pick(
    keys,
    block,
    num_blocks,
    NUM_SELECTED: tl.constexpr,
    NUM_FORCED: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """Words of the chosen among keys [rows, columns] of `block`, by the rule of the dialect."""
    if LEGACY:
        half: tl.constexpr = NUM_SELECTED // 2
        present = block >= (num_blocks - 1) // NUM_SELECTED * NUM_SELECTED
        words = _top_words(tl.where(present, -1, keys), half)
        return words + _top_words(tl.where(present, keys, -1), half)
    elif NUM_SELECTED == NUM_FORCED:
        return _words(keys > MAX_INT)
    else:
        return _top_words(keys, NUM_SELECTED - NUM_FORCED)


@triton.jit
def _next_place(bits):
    """Place of the lowest bit of every word, and the bits without it. Void for 0."""
    low = bits & -bits
    # The exponent of a power of two.
    return (low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, bits ^ low


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
    # The maximum also makes NaN 0, whose bits might be a negative key.
    keys = tl.maximum(scores, 0.0).to(tl.int32, bitcast=True)
    block = tl.arange(0, TILES)[:, None] * TILE_BLOCKS + tl.arange(0, TILE_BLOCKS)[None, :]
    block += chunk * (TILES * TILE_BLOCKS)
    if LEGACY:
        is_free = (block >= NUM_INIT) & (block < num_blocks - NUM_LOCAL)
        keys = tl.where(is_free, keys, FORCED_KEY)
        keys = tl.where(block < num_blocks, keys, -1)
    else:
        # One unsigned comparison for both ends of what is free.
        num_free = num_blocks - (NUM_INIT + NUM_LOCAL)
        is_free = (block - NUM_INIT).to(tl.uint32, bitcast=True) < num_free.to(tl.uint32)
        keys = tl.where(is_free, keys, -1)
    return keys, block


@triton.jit
def chunk_candidates(
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
    NUM_SELECTED: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    MAX_POOL: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """Pick from one chunk of TILES tiles: -> (words, keys [TILES, TILE_BLOCKS]).

    Forced blocks are no candidates, but the rule of LEGACY counts them with the others.
    """
    num_blocks = (position + BLOCK_SIZE) // BLOCK_SIZE
    scores = _block_scores(
        units_ptr, spill_ptr, tile_max_ptr, lse2_ptr,
        chunk * TILES, num_tiles, (position + 1) // CMP_STRIDE,
        GROUP_SIZE, HEADS, TILES, TILE_BLOCKS, ENTRIES, WINDOW_STRIDES, MAX_POOL,
    )  # fmt: skip
    keys, block = block_keys(scores, chunk, num_blocks, NUM_INIT, NUM_LOCAL, LEGACY)
    return _pick(keys, block, num_blocks, NUM_SELECTED, NUM_INIT + NUM_LOCAL, LEGACY), keys


@triton.jit
def store_candidates(
    words, keys, candidates_ptr, chunk, MAX_CHUNKS: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Keep what a chunk picked in the row's candidates: keys [MAX_CHUNKS, BLOCK_S], and blocks."""
    NUM_KEYS: tl.constexpr = keys.shape[0] * keys.shape[1]
    flat = tl.reshape(keys, [NUM_KEYS])
    counts, bits = words >> 16, words & 0xFFFF
    place = tl.cumsum(counts, axis=0) - counts
    first = tl.arange(0, NUM_KEYS // WORD) * WORD
    keys_ptr = candidates_ptr + chunk * BLOCK_S
    blocks_ptr = keys_ptr + MAX_CHUNKS * BLOCK_S
    for _ in range(tl.max(counts, axis=0)):
        mask = bits != 0
        bit, bits = _next_place(bits)
        at = tl.where(mask, first + bit, 0)
        tl.store(keys_ptr + place, tl.gather(flat, at, axis=0), mask=mask)
        tl.store(blocks_ptr + place, chunk * NUM_KEYS + at, mask=mask)
        place += 1
    offs = tl.arange(0, BLOCK_S)
    tl.store(keys_ptr + offs, -1, mask=offs >= tl.sum(counts, axis=0))


@triton.jit
def merge_candidates(
    candidates_ptr,
    position,
    MAX_CHUNKS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    TILES: tl.constexpr,
    TILE_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NUM_SELECTED: tl.constexpr,
    NUM_FORCED: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """Pick from the candidates of all chunks, which are in the order of blocks: -> words."""
    COLUMNS: tl.constexpr = BLOCK_S if BLOCK_S >= WORD else WORD
    LEAST: tl.constexpr = MIN_KEYS // COLUMNS
    ALL: tl.constexpr = MAX_CHUNKS * BLOCK_S // COLUMNS
    ROWS: tl.constexpr = ALL if ALL > LEAST else LEAST if LEAST > 1 else 1
    num_blocks = (position + BLOCK_SIZE) // BLOCK_SIZE
    num_chunks = tl.cdiv(num_blocks, TILES * TILE_BLOCKS)
    offs = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    mask = offs < num_chunks * BLOCK_S
    keys = tl.load(candidates_ptr + offs, mask=mask, other=-1)
    block = tl.load(candidates_ptr + MAX_CHUNKS * BLOCK_S + offs, mask=mask & (keys >= 0), other=0)
    return _pick(keys, block, num_blocks, NUM_SELECTED, NUM_FORCED, LEGACY)


@triton.jit
def store_selection(
    words,
    blocks_ptr,
    num_blocks,
    indices_ptr,
    NUM_SELECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """Write the picked blocks, then the forced ones that are not among them, then -1.

    blocks_ptr: block of every key; None if the keys are those of the blocks 0, 1, ...
    """
    counts, bits = words >> 16, words & 0xFFFF
    place = tl.cumsum(counts, axis=0) - counts
    first = tl.arange(0, words.shape[0]) * WORD
    for _ in range(tl.max(counts, axis=0)):
        mask = (bits != 0) & (place < NUM_SELECTED)
        bit, bits = _next_place(bits)
        block = first + bit
        if blocks_ptr is not None:
            block = tl.load(blocks_ptr + block, mask=mask, other=0)
        tl.store(indices_ptr + place, block, mask=mask)
        place += 1
    offs = tl.arange(0, BLOCK_S)
    rest = offs - tl.sum(counts, axis=0)
    block = tl.where(rest < NUM_INIT, rest, num_blocks - NUM_LOCAL + rest - NUM_INIT)
    block = tl.where(LEGACY | (rest >= NUM_INIT + NUM_LOCAL), -1, block)
    mask = (rest >= 0) & (offs < NUM_SELECTED)
    tl.store(indices_ptr + offs, block, mask=mask)


@triton.jit
def store_all_blocks(
    num_blocks,
    indices_ptr,
    NUM_SELECTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write the blocks 0 .. num_blocks - 1, at most NUM_SELECTED, and fill up with -1."""
    offs = tl.arange(0, BLOCK_S)
    block = tl.where(offs < num_blocks, offs, -1)
    mask = offs < NUM_SELECTED
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
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    MAX_POOL: tl.constexpr,
    LEGACY: tl.constexpr,
):
    """Select for one query and KV head, chunk after chunk. Position -1 selects nothing."""
    num_blocks = (position + BLOCK_SIZE) // BLOCK_SIZE
    if num_blocks <= NUM_SELECTED:
        store_all_blocks(
            num_blocks, indices_ptr,
            NUM_SELECTED, BLOCK_S,
        )  # fmt: skip
    elif MAX_CHUNKS == 1:
        words, _ = chunk_candidates(
            units_ptr, spill_ptr, tile_max_ptr, lse2_ptr, 0, num_tiles, position,
            GROUP_SIZE, HEADS, TILES, TILE_BLOCKS, ENTRIES, WINDOW_STRIDES, CMP_STRIDE,
            BLOCK_SIZE, NUM_SELECTED, NUM_INIT, NUM_LOCAL, MAX_POOL, LEGACY,
        )  # fmt: skip
        store_selection(
            words, None, num_blocks, indices_ptr,
            NUM_SELECTED, BLOCK_S, NUM_INIT, NUM_LOCAL, LEGACY,
        )  # fmt: skip
    else:
        for chunk in range(tl.cdiv(num_blocks, TILES * TILE_BLOCKS)):
            words, keys = chunk_candidates(
                units_ptr, spill_ptr, tile_max_ptr, lse2_ptr, chunk, num_tiles,
                position, GROUP_SIZE, HEADS, TILES, TILE_BLOCKS, ENTRIES, WINDOW_STRIDES,
                CMP_STRIDE, BLOCK_SIZE, NUM_SELECTED, NUM_INIT, NUM_LOCAL, MAX_POOL,
                LEGACY,
            )  # fmt: skip
            store_candidates(words, keys, candidates_ptr, chunk, MAX_CHUNKS, BLOCK_S)
        tl.debug_barrier()
        winners = merge_candidates(
            candidates_ptr, position, MAX_CHUNKS, BLOCK_S, TILES, TILE_BLOCKS, BLOCK_SIZE,
            NUM_SELECTED, NUM_INIT + NUM_LOCAL, LEGACY,
        )  # fmt: skip
        store_selection(
            winners, candidates_ptr + MAX_CHUNKS * BLOCK_S, num_blocks,
            indices_ptr,
            NUM_SELECTED, BLOCK_S, NUM_INIT, NUM_LOCAL, LEGACY,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tiles"])
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
        candidates_ptr + row * (2 * MAX_CHUNKS * BLOCK_S),
        indices_ptr + row * NUM_SELECTED,
        GROUP_SIZE, HEADS, TILES, TILE_BLOCKS, MAX_CHUNKS, ENTRIES, WINDOW_STRIDES, CMP_STRIDE,
        BLOCK_SIZE, NUM_SELECTED, BLOCK_S, NUM_INIT, NUM_LOCAL, MAX_POOL, LEGACY,
    )  # fmt: skip
