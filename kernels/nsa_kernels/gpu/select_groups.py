"""Exact top-n of block scores that are summed over the heads of a group (`prefill_scores`).

One warp a token and KV head, as in `select`, whose rules, keys and order these are. Here a chunk
of blocks is a vector in memory, so that every step is one pass over 32-bit keys in registers and
one instruction across the warp, and once a chunk has no key among the n best any more, what is left
of it costs one pass a place. Between chunks a key and its block make one 64-bit number.

Legend: R prefill tokens, H KV heads, S blocks to select, E compressed entries a page, NU blocks, or
for max pooling compressed entries, that a row of scores has room for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.gpu.prefill_scores import GroupScores
from nsa_kernels.gpu.select import (
    MAX_INT,
    MIN_KEYS,
    merged_values,
    pick_values,
    score_keys,
    store_all_blocks,
    store_forced,
    values_of,
)
from nsa_kernels.spec import NSASpec

# Blocks that a program has in registers at once: so few that an SM holds 32 programs.
CHUNK_BLOCKS = 512


def select_group_blocks(
    scores: GroupScores,
    positions: Tensor,
    spec: NSASpec,
    *,
    out: Tensor | None = None,
    chunk_blocks: int = CHUNK_BLOCKS,
    num_warps: int = 1,
) -> Tensor:
    """Select the blocks of R prefill tokens at `positions` [R] int32: -> [R, H, S] int32.

    A row lists its free blocks by score, then the forced ones; -1 where there are fewer than S.
    out: where to write them, contiguous. Tuning: chunk_blocks, blocks in registers at once, and
    num_warps.
    """
    num_tokens, num_kv_heads, num_units = scores.units.shape
    entries, is_max_pool = spec.cmp_entries_per_page, spec.score_map == "max_pool"
    num_blocks = num_units // entries if is_max_pool else num_units
    padded = triton.next_power_of_2(spec.num_selected_blocks)
    chunk = min(triton.next_power_of_2(chunk_blocks), triton.next_power_of_2(num_blocks))
    chunk = max(chunk, MIN_KEYS.value, padded)
    max_chunks = triton.next_power_of_2(triton.cdiv(num_blocks, chunk))
    if out is None:
        shape = (num_tokens, num_kv_heads, spec.num_selected_blocks)
        out = scores.units.new_empty(shape, dtype=torch.int32)
    num_candidates = max_chunks * padded if max_chunks > 1 else 0
    candidates = scores.units.new_empty(
        (num_tokens, num_kv_heads, num_candidates), dtype=torch.int64
    )
    if num_tokens:
        _select_groups_kernel[(num_tokens, num_kv_heads)](
            scores.units,
            scores.spill,
            positions,
            out,
            candidates,
            num_units,
            CHUNK=chunk,
            MAX_CHUNKS=max_chunks,
            ENTRIES=entries,
            WINDOW_STRIDES=spec.strides_per_window,
            CMP_STRIDE=spec.cmp_stride,
            BLOCK_SIZE=spec.block_size,
            NUM_SELECTED=spec.num_selected_blocks,
            BLOCK_S=padded,
            NUM_INIT=spec.num_init_blocks,
            NUM_LOCAL=spec.num_local_blocks,
            MAX_POOL=is_max_pool,
            LEGACY=spec.selection == "fla_legacy",
            num_warps=num_warps,
        )
    return out


@triton.jit
def _load_scores(
    units_ptr,
    spill_ptr,
    block,
    num_visible,
    ENTRIES: tl.constexpr,
    WINDOW_STRIDES: tl.constexpr,
    MAX_POOL: tl.constexpr,
):
    """Scores of the blocks numbered `block`: [CHUNK]. Nothing from num_visible on was written."""
    if MAX_POOL:
        scores = tl.zeros(block.shape, tl.float32)
        # Windows that begin in a block and end in the next are filed under the next.
        for column in tl.static_range(ENTRIES + WINDOW_STRIDES - 1):
            entry = block * ENTRIES + column
            units = tl.load(units_ptr + entry, mask=entry < num_visible, other=0.0)
            scores = tl.maximum(scores, units)
        return scores
    else:
        first = block * ENTRIES
        scores = tl.load(units_ptr + block, mask=first < num_visible, other=0.0)
        if spill_ptr is not None:
            mask = first + ENTRIES < num_visible
            scores += tl.load(spill_ptr + 1 + block, mask=mask, other=0.0)
        return scores


@triton.jit
def _pick_keys(keys, block, low, target_ptr, COUNT: tl.constexpr, AS_BLOCKS: tl.constexpr):
    """Write the COUNT largest keys above `low`, largest first, then lowest block; -1 for none.

    They are written as blocks, or as values. Returns the last key, -1 if there are fewer.
    """
    last = tl.full([], -1, tl.int32)
    for place in range(COUNT):
        best = tl.max(keys, axis=0)
        last = tl.full([], -1, tl.int32)
        index = tl.full([], 0, tl.int32)
        if best > low:
            index = tl.min(tl.where(keys == best, block, MAX_INT), axis=0)
            keys = tl.where(block == index, -1, keys)
            last = best
        if AS_BLOCKS:
            tl.store(target_ptr + place, tl.where(last >= 0, index, -1))
        else:
            tl.store(target_ptr + place, values_of(last, index))
    return last


@triton.jit
def _pick_chunk(
    keys,
    block,
    end,
    num_blocks,
    low,
    target_ptr,
    NUM_SELECTED: tl.constexpr,
    NUM_FORCED: tl.constexpr,
    LEGACY: tl.constexpr,
    AS_BLOCKS: tl.constexpr,
):
    """Write what the rule of the dialect chooses among the keys of blocks before `end`.

    low: a key that as many earlier blocks reach as are wanted. Returns the next chunk's.
    """
    if LEGACY:
        # Its two halves come from the blocks before and in the last NUM_SELECTED.
        half: tl.constexpr = NUM_SELECTED // 2
        border = (num_blocks - 1) // NUM_SELECTED * NUM_SELECTED
        is_present = block >= border
        past = tl.where(is_present, -1, keys)
        last = _pick_keys(past, block, low, target_ptr, half, AS_BLOCKS)
        if end > border:
            present = tl.where(is_present, keys, -1)
            _pick_keys(present, block, -1, target_ptr + half, half, AS_BLOCKS)
        else:
            for place in range(half):
                tl.store(target_ptr + half + place, -1)
    else:
        last = _pick_keys(keys, block, low, target_ptr, NUM_SELECTED - NUM_FORCED, AS_BLOCKS)
    return tl.maximum(low, last)


@triton.jit(do_not_specialize=["num_units"], do_not_specialize_on_alignment=["positions_ptr"])
def _select_groups_kernel(
    units_ptr,
    spill_ptr,
    positions_ptr,
    indices_ptr,
    candidates_ptr,
    num_units,
    CHUNK: tl.constexpr,
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
    NUM_FORCED: tl.constexpr = NUM_INIT + NUM_LOCAL
    NUM_PICKED: tl.constexpr = NUM_SELECTED if LEGACY else NUM_SELECTED - NUM_FORCED
    token = tl.program_id(0).to(tl.int64)
    row = token * tl.num_programs(1) + tl.program_id(1)
    indices_ptr += row * NUM_SELECTED
    units_ptr += row * num_units
    if spill_ptr is not None:
        spill_ptr += row * num_units
    position = tl.load(positions_ptr + token)
    num_blocks = (position + BLOCK_SIZE) // BLOCK_SIZE
    num_visible = (position + 1) // CMP_STRIDE
    if num_blocks <= NUM_SELECTED:
        store_all_blocks(num_blocks, indices_ptr, NUM_SELECTED, BLOCK_S)
    else:
        block = tl.arange(0, CHUNK)
        if MAX_CHUNKS == 1:
            scores = _load_scores(
                units_ptr, spill_ptr, block, num_visible, ENTRIES, WINDOW_STRIDES, MAX_POOL
            )
            keys = score_keys(scores, block, num_blocks, NUM_INIT, NUM_LOCAL, LEGACY)
            _pick_chunk(
                keys, block, num_blocks, num_blocks, -1, indices_ptr,
                NUM_SELECTED, NUM_FORCED, LEGACY, AS_BLOCKS=True,
            )  # fmt: skip
        else:
            candidates_ptr += row * (MAX_CHUNKS * BLOCK_S)
            num_chunks = tl.cdiv(num_blocks, CHUNK)
            low = tl.full([], -1, tl.int32)
            for chunk in range(num_chunks):
                scores = _load_scores(
                    units_ptr, spill_ptr, block, num_visible, ENTRIES, WINDOW_STRIDES, MAX_POOL
                )
                keys = score_keys(scores, block, num_blocks, NUM_INIT, NUM_LOCAL, LEGACY)
                low = _pick_chunk(
                    keys, block, (chunk + 1) * CHUNK, num_blocks, low,
                    candidates_ptr + chunk * BLOCK_S,
                    NUM_SELECTED, NUM_FORCED, LEGACY, AS_BLOCKS=False,
                )  # fmt: skip
                block += CHUNK
            # Other threads read what these wrote.
            tl.debug_barrier()
            values = merged_values(candidates_ptr, num_chunks, MAX_CHUNKS, BLOCK_S, NUM_PICKED)
            pick_values(
                values, num_blocks, num_blocks, indices_ptr,
                NUM_SELECTED, NUM_FORCED, LEGACY, AS_BLOCKS=True,
            )  # fmt: skip
        if not LEGACY:
            store_forced(num_blocks, indices_ptr, NUM_SELECTED, BLOCK_S, NUM_INIT, NUM_LOCAL)
