"""The inverted index of prefill selection: for every KV head and block, the queries that chose it.

Selection lists blocks per query; prefill attention loads a block once and visits the queries that
chose it, so the lists have to be turned around. Three kernels without a host synchronisation: count
(every choice draws its rank in its block's list), allocate (every list gets its place), scatter.

Only free choices are indexed. Forced blocks (the first `num_init_blocks`, and the
`num_local_blocks` that end at the query's own) are known without an index and are whole runs of
neighbouring queries; a free block lies wholly before its query's block, so it needs no causal mask.

Legend: R tokens of the sub-chunk, H KV heads, S selected blocks of a query at most, F = S -
num_init_blocks - num_local_blocks free ones at most, NB blocks of all rows together.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa_kernels.spec import NSASpec

# Choices that one program of the counting and scattering kernels handles, and lists that one
# program of the allocating kernel handles.
CHOICES_PER_PROGRAM = 1024
LISTS_PER_PROGRAM = 1024
# int32 fields of a work item; see `BlockIndex.items`.
ITEM_FIELDS = tl.constexpr(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockIndex:
    """Who chose which block, cut into work items of at most `queries_per_item` queries.

    num_free: [R, H] int32, free choices of a query; they are numbered 1 .. num_free.
    lists: [R * H * F] int32, the queries of all lists as token * entry_base + number of the choice,
        where token counts from the first of the sub-chunk.
    items: [max_items, 4] int32: page, KV head, first entry in `lists`, number of entries.
    totals: [2] int32: entries in use of `lists`, and of `items`.
    The order of the items, and of the entries of a list, may differ between runs.
    """

    num_free: Tensor
    lists: Tensor
    items: Tensor
    totals: Tensor
    max_items: int


def num_free_blocks(spec: NSASpec) -> int:
    """F: how many blocks a query can choose beside the forced ones."""
    return spec.block_table_width - spec.num_init_blocks - spec.num_local_blocks


def entry_base(num_partials: int) -> int:
    """Factor of the token in a list's entry: a power of two, so that it is cheap to take apart."""
    return int(triton.next_power_of_2(num_partials))


def build_index(
    block_indices: Tensor,
    token_rows: Tensor,
    positions: Tensor,
    page_table: Tensor,
    cu_blocks: Tensor,
    *,
    num_blocks: int,
    num_pages: int,
    spec: NSASpec,
    first_token: int,
    queries_per_item: int,
    check: bool = False,
) -> BlockIndex:
    """Invert the free choices among block_indices [R, H, S] int32 (-1 for none, any order).

    token_rows, positions: [T] int32, of the step, whose tokens first_token .. first_token + R - 1
    are meant. page_table: [B, P] int32. cu_blocks: [B + 1] int32, prefix sums of the rows' numbers
    of blocks; num_blocks: the last of them. num_pages: pages of the cache, for `check`.
    """
    num_tokens, num_kv_heads, num_selected = block_indices.shape
    num_free = num_free_blocks(spec)
    num_lists = num_kv_heads * num_blocks
    max_entries = num_tokens * num_kv_heads * num_free
    # A list of n entries makes ceil(n / queries_per_item) items, and at least one entry each.
    max_items = min(max_entries, max_entries // queries_per_item + num_lists)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=block_indices.device)

    # The two totals, then the length of every list, which should start on 16 bytes.
    counters = torch.zeros(4 + num_lists, dtype=torch.int32, device=block_indices.device)
    totals, counts = counters[:2], counters[4:]
    index = BlockIndex(
        num_free=empty(num_tokens, num_kv_heads),
        lists=empty(max_entries),
        items=empty(max_items, ITEM_FIELDS.value),
        totals=totals,
        max_items=max_items,
    )
    ranks = empty(max_entries)
    list_starts, item_starts = empty(num_lists), empty(num_lists)
    block_s = triton.next_power_of_2(num_selected)
    block_t = max(1, CHOICES_PER_PROGRAM // block_s)
    grid = (triton.cdiv(num_tokens, block_t), num_kv_heads)
    choices = (block_indices, token_rows, positions, cu_blocks, first_token, num_tokens, num_blocks)
    constants = {
        "NUM_SELECTED": num_selected,
        "NUM_INIT": spec.num_init_blocks,
        "NUM_LOCAL": spec.num_local_blocks,
        "NUM_FREE": num_free,
        "PAGE_SIZE": spec.block_size,
        "BLOCK_T": block_t,
        "BLOCK_S": block_s,
        "CHECK": check,
    }
    _count_kernel[grid](*choices, counts, ranks, index.num_free, **constants, debug=check)
    _allocate_kernel[(triton.cdiv(num_lists, LISTS_PER_PROGRAM),)](
        counts,
        list_starts,
        item_starts,
        totals,
        num_lists,
        QUERIES_PER_ITEM=queries_per_item,
        BLOCK=LISTS_PER_PROGRAM,
    )
    _scatter_kernel[grid](
        *choices,
        counts,
        ranks,
        list_starts,
        item_starts,
        page_table,
        page_table.shape[1],
        num_pages,
        index.lists,
        index.items,
        **constants,
        ENTRY_BASE=entry_base(1 + num_free),
        QUERIES_PER_ITEM=queries_per_item,
        debug=check,
    )
    return index


@triton.jit
def _free_choices(
    block_indices_ptr,
    token_rows_ptr,
    positions_ptr,
    cu_blocks_ptr,
    first_token,
    num_tokens,
    num_blocks,
    NUM_SELECTED: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    NUM_FREE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHECK: tl.constexpr,
):
    """The free choices of BLOCK_T tokens for one KV head, as [BLOCK_T, BLOCK_S] tiles.

    Returns (is it one, row [BLOCK_T], block, its list, its number among the query's free choices,
    token * H + head [BLOCK_T]).
    """
    pid_head, num_heads = tl.program_id(1), tl.num_programs(1)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_s = tl.arange(0, BLOCK_S)
    mask_t = offs_t < num_tokens
    mask = mask_t[:, None] & (offs_s < NUM_SELECTED)[None, :]
    row = tl.load(token_rows_ptr + first_token + offs_t, mask=mask_t, other=0)
    current = tl.load(positions_ptr + first_token + offs_t, mask=mask_t, other=0) // PAGE_SIZE
    query = offs_t * num_heads + pid_head
    block = tl.load(
        block_indices_ptr + query[:, None] * NUM_SELECTED + offs_s[None, :], mask=mask, other=-1
    )
    is_free = (block >= NUM_INIT) & (block + NUM_LOCAL <= current[:, None])
    number = tl.cumsum(is_free.to(tl.int32), axis=1) - 1
    if CHECK:
        tl.device_assert(
            (number < NUM_FREE) | (is_free == 0),
            "more free blocks than the width of the table leaves room for",
        )
    # A forced block that is missing would free a place that does not exist.
    is_free = is_free & (number < NUM_FREE)
    list_id = pid_head * num_blocks + tl.load(cu_blocks_ptr + row)[:, None] + block
    return is_free, row, block, list_id, number, query


@triton.jit(do_not_specialize=["first_token", "num_tokens", "num_blocks"])
def _count_kernel(
    block_indices_ptr,
    token_rows_ptr,
    positions_ptr,
    cu_blocks_ptr,
    first_token,
    num_tokens,
    num_blocks,
    counts_ptr,
    ranks_ptr,
    num_free_ptr,
    NUM_SELECTED: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    NUM_FREE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Count the entries of every list; the count that an entry finds is its rank in the list.

    A popular block's counter takes one atomic a query, at about one a clock: microseconds.
    """
    is_free, _, _, list_id, number, query = _free_choices(
        block_indices_ptr, token_rows_ptr, positions_ptr, cu_blocks_ptr,
        first_token, num_tokens, num_blocks,
        NUM_SELECTED, NUM_INIT, NUM_LOCAL, NUM_FREE, PAGE_SIZE, BLOCK_T, BLOCK_S, CHECK,
    )  # fmt: skip
    rank = tl.atomic_add(counts_ptr + list_id, 1, mask=is_free, sem="relaxed")
    tl.store(ranks_ptr + query[:, None] * NUM_FREE + number, rank, mask=is_free)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    num_free = tl.sum(is_free.to(tl.int32), axis=1)
    tl.store(num_free_ptr + query, num_free, mask=offs_t < num_tokens)


@triton.jit(do_not_specialize=["num_lists"])
def _allocate_kernel(
    counts_ptr,
    list_starts_ptr,
    item_starts_ptr,
    totals_ptr,
    num_lists,
    QUERIES_PER_ITEM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Give every list its entries and its work items, in whatever order the programs come."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_lists
    entries = tl.load(counts_ptr + offs, mask=mask, other=0)
    items = (entries + QUERIES_PER_ITEM - 1) // QUERIES_PER_ITEM
    first_entry = tl.atomic_add(totals_ptr, tl.sum(entries), sem="relaxed")
    first_item = tl.atomic_add(totals_ptr + 1, tl.sum(items), sem="relaxed")
    tl.store(list_starts_ptr + offs, first_entry + tl.cumsum(entries, axis=0) - entries, mask=mask)
    tl.store(item_starts_ptr + offs, first_item + tl.cumsum(items, axis=0) - items, mask=mask)


@triton.jit(
    do_not_specialize=["first_token", "num_tokens", "num_blocks", "stride_page_row", "num_pages"]
)
def _scatter_kernel(
    block_indices_ptr,
    token_rows_ptr,
    positions_ptr,
    cu_blocks_ptr,
    first_token,
    num_tokens,
    num_blocks,
    counts_ptr,
    ranks_ptr,
    list_starts_ptr,
    item_starts_ptr,
    page_table_ptr,
    stride_page_row,
    num_pages,
    lists_ptr,
    items_ptr,
    NUM_SELECTED: tl.constexpr,
    NUM_INIT: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    NUM_FREE: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    CHECK: tl.constexpr,
    ENTRY_BASE: tl.constexpr,
    QUERIES_PER_ITEM: tl.constexpr,
):
    """Put every choice into its list; the first of each work item writes the item."""
    is_free, row, block, list_id, number, query = _free_choices(
        block_indices_ptr, token_rows_ptr, positions_ptr, cu_blocks_ptr,
        first_token, num_tokens, num_blocks,
        NUM_SELECTED, NUM_INIT, NUM_LOCAL, NUM_FREE, PAGE_SIZE, BLOCK_T, BLOCK_S, CHECK,
    )  # fmt: skip
    pid_head = tl.program_id(1)
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    rank = tl.load(ranks_ptr + query[:, None] * NUM_FREE + number, mask=is_free, other=0)
    entry = tl.load(list_starts_ptr + list_id, mask=is_free, other=0) + rank
    tl.store(lists_ptr + entry, offs_t[:, None] * ENTRY_BASE + 1 + number, mask=is_free)

    leads = is_free & (rank % QUERIES_PER_ITEM == 0)
    item = tl.load(item_starts_ptr + list_id, mask=leads, other=0) + rank // QUERIES_PER_ITEM
    length = tl.load(counts_ptr + list_id, mask=leads, other=0)
    page_offset = row[:, None] * stride_page_row + block
    page = tl.load(page_table_ptr + page_offset, mask=leads, other=0)
    if CHECK:
        tl.device_assert((page >= 0) & (page < num_pages), "page id outside the cache")
    item_ptr = items_ptr + item * ITEM_FIELDS
    tl.store(item_ptr, page, mask=leads)
    tl.store(item_ptr + 1, pid_head + tl.zeros_like(page), mask=leads)
    tl.store(item_ptr + 2, entry, mask=leads)
    tl.store(item_ptr + 3, tl.minimum(length - rank, QUERIES_PER_ITEM), mask=leads)
