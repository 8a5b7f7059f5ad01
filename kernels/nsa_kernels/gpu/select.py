"""Block selection: group-summed block scores from the score workspace, and an exact top-n.

The compression kernels leave, for each query head and score tile, probabilities relative to a
maximum of the tile's own ("units"); with the final log-sum-exp they become block scores here
(paper, Eq. 8 to 11; `reference.block_scores` and `reference.select_blocks`).

Top-n works on int32 keys, the bits of a score (never negative, so they order like it), and -1 for
what is no candidate.

Prefill wants throughput, a warp for a row. The n-th largest of the maxima of small groups bounds
the n-th largest key from below, and usually only a few keys lie between the two; the threshold
rises over these one by one. So there is no sort, every reduction is of one 32-bit word, and few of
them go over all keys. The chosen are then bits of a word for every 16 keys, and written out from
lowest to highest.

Decode wants latency, several warps for a row. Keys and blocks make one 64-bit number, so no two are
equal and ties need no care. The n best lie in the n groups with the best maxima; those groups, and
then what is in them, are ranked by counting for each how many are larger: no loop, and a number of
barriers that depends on no score. The rank is the place of the block in the output.

Legend: R rows of the workspace (decode rows, or prefill tokens), HQ query heads, H KV heads,
G = HQ // H, S blocks to select, E compressed entries a page, NT score tiles of TB blocks, P pages.
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
# With units up to this size decode reads those beyond the row, not to wait for its length first.
EARLY_BYTES = 1 << 20
# Elements compared with all others at once.
RANK_STEP = tl.constexpr(128)
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
    check: bool = False,
    launch_pdl: bool = False,
    start_next: bool = False,
    num_warps: int = 4,
    early_bytes: int = EARLY_BYTES,
) -> None:
    """Select the blocks of decode rows: a program per chunk of blocks, the last one merges.

    lse2_part: [Nd, HQ, splits] fp32. seq_lens: [B], page_table: [B, P] int32; written before the
    kernel in front began. block_indices, block_pages: [Nd, H, S] int32, written. counters: [Nd * H]
    int32 zeros, and zeros afterwards. constants: of `select_constants`, as units were written.
    launch_pdl: start while the kernel in front ends; start_next: let the next one do so.
    Tuning: num_warps; early_bytes, up to which size units are read before the row's length is.
    """
    num_rows, num_kv_heads, num_selected = block_indices.shape
    num_splits, num_chunks = lse2_part.shape[2], int(constants["MAX_CHUNKS"])
    num_free = num_selected - int(constants["NUM_INIT"]) - int(constants["NUM_LOCAL"])
    num_picks = num_selected // 2 if constants["LEGACY"] else num_free
    slots = int(triton.next_power_of_2(max(num_picks, 1)))
    candidates = None
    if num_chunks > 1:
        size = num_chunks * slots * (2 if constants["LEGACY"] else 1)
        candidates = units.new_empty((num_rows, num_kv_heads, size), dtype=torch.int64)
    is_early = num_chunks == 1 and not launch_pdl
    is_early = is_early and units.numel() * units.element_size() <= early_bytes
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


def new_candidates(like: Tensor, rows: tuple[int, int], constants: dict[str, int | bool]) -> Tensor:
    """Workspace for the winners of every chunk, (key, block) pairs; empty if there is one chunk."""
    num_chunks = constants["MAX_CHUNKS"]
    size = 2 * num_chunks * constants["BLOCK_S"] if num_chunks > 1 else 0
    return like.new_empty((*rows, size), dtype=torch.int32)


@triton.jit
def _load_lse2(lse2_ptr, head, mask, num_splits, BLOCK_SPLITS: tl.constexpr):
    """Parts [heads, splits] of the log-sum-exp2 of `head`."""
    offs = tl.arange(0, BLOCK_SPLITS)
    return tl.load(
        lse2_ptr + head[:, None] * num_splits + offs[None, :],
        mask=mask[:, None] & (offs < num_splits)[None, :],
        other=float("-inf"),
    )


@triton.jit
def _merge_lse2(part):
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
        return _max_pool_scores(
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
def _max_pool_scores(
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
            part = _load_lse2(lse2_ptr, head, head >= 0, num_splits, BLOCK_SPLITS)
            lse2 = tl.sum(_merge_lse2(part), axis=0)
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
def _block_keys(
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
    keys, block = _block_keys(scores, chunk, num_blocks, NUM_INIT, NUM_LOCAL, LEGACY)
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
    """Scores [TILES, TILE_BLOCKS] of the blocks from `first_tile` on, like `_block_scores`.

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
        lse2_part = _load_lse2(lse2_ptr, head, is_head, num_splits, BLOCK_SPLITS)
        tile_max = tl.load(tile_max_ptr + at, mask=mask, other=float("-inf"))
        if WITH_SPILL:
            spill = tl.load(spill_ptr + at + 1, mask=next_mask, other=0.0)
            next_max = tl.load(tile_max_ptr + at + 1, mask=next_mask, other=float("-inf"))
        ptrs = units_ptr + at[:, :, None] * TILE_BLOCKS + offs[None, None, :]
        units = tl.load(ptrs, mask=mask[:, :, None], other=0.0)
        lse2 = _merge_lse2(lse2_part)[None, :]
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
    if START_NEXT:
        tl.extra.cuda.gdc_launch_dependents()
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
    indices_ptr += row * NUM_SELECTED
    pages_ptr += row * NUM_SELECTED
    page_table_ptr += batch * stride_pb
    tiles = row * GROUP_SIZE * num_tiles
    units_ptr += tiles * TILE_UNITS
    tile_max_ptr += tiles
    lse2_ptr += row * GROUP_SIZE * num_splits
    num_visible = (position + 1) // CMP_STRIDE
    if MAX_POOL:
        scores = _max_pool_scores(
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
    if num_blocks <= NUM_SELECTED:
        offs = tl.arange(0, BLOCK_S)
        block = tl.where(offs < num_blocks, offs, -1)
        page = _load_page(page_table_ptr, block, offs < num_blocks, num_pages, CHECK)
        tl.store(indices_ptr + offs, block, mask=offs < NUM_SELECTED)
        tl.store(pages_ptr + offs, page, mask=offs < NUM_SELECTED)
        return
    keys, block = _block_keys(scores, chunk, num_blocks, NUM_INIT, NUM_LOCAL, LEGACY)
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
