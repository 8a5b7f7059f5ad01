"""The vectorised PyTorch path's plan: index tensors and masks that all layers of a step share.

B rows, H KV heads, P pages of the longest row, E compressed entries a page, n selected blocks.
"flat rows" index a cache seen as a matrix: token rows of k.view(-1, D), page rows of
k.view(num_pages * H, page_size * D).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nsa_kernels.block_trace import BlockTrace
from nsa_kernels.metadata import AttnMetadata
from nsa_kernels.spec import NSASpec

# Finite, so that a row without a visible key stays finite through softmax; it is zeroed after.
MASKED = -1e30
# Queries of one tile while all blocks are selected; after that a tile is the queries of one block.
DENSE_TILE = 128

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Branches:
    """Which branch outputs the gates let through; an unused one is not computed."""

    cmp: bool = True
    slc: bool = True
    swa: bool = True


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Rows of one query token, batched.

    page_rows: [B * H * P] page rows of every row's pages. token_bias: [B, P, page_size] 0 where
    the token is in the sequence, else MASKED. window_*: the same for the last pages only, those
    that the sliding window can touch. The selection fields are None when every row's blocks are
    all selected (`is_dense`), where slc is plain attention.
    """

    num_rows: int
    num_pages: int
    is_dense: bool
    page_rows: Tensor
    token_bias: Tensor
    dense_bias: Tensor | None  # [B * H, 1, P * page_size], the same per head, when is_dense
    window_page_rows: Tensor | None
    window_bias: Tensor | None
    cmp_bias: Tensor | None  # [B * H, 1, P * E] fp32
    lse_bias: Tensor | None  # the same of the coarse windows, where there are any
    has_windows: Tensor | None  # [B, 1, 1] 1 where a compressed entry is visible, else 0
    selection: "SelectionPlan | None"
    block_row_base: Tensor | None  # [B, H, 1] start of each row and head in page_rows
    bias_row_base: Tensor | None  # [B, 1, 1] start of each row in token_bias' rows


@dataclass(frozen=True, slots=True)
class SelectionPlan:
    """What is fixed about a selection before the scores are known. Q query rows.

    touching: E + l/d - 1, the windows that touch a block; per_block: E, where the next block's
    begin. weights: [touching] fp32 for their sum ("overlap"), None for their maximum ("max_pool").
    force: [Q, P] fp32, added to the scores: inf for forced blocks, -inf for blocks that the
    query cannot choose. halves: for "fla_legacy", two such tensors; n/2 blocks come from each.
    limits: [Q] int64, blocks of each query at most, where some select more than others (the dense
    ones); num_selected is then the largest. None = num_selected for all.
    """

    num_selected: int
    touching: int
    per_block: int
    weights: Tensor | None
    force: Tensor
    halves: tuple[Tensor, Tensor] | None
    limits: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TilePlan:
    """A run of one chunk's queries that are computed together.

    start, stop: query tokens, relative to the step. first_position: of the first. num_keys: keys
    [0, num_keys) of the sequence that the last query sees. causal_bias: [queries, queries] over
    the keys at the queries' own positions. selection is None where all blocks are selected.
    """

    start: int
    stop: int
    first_position: int
    num_keys: int
    causal_bias: Tensor
    cmp_bias: Tensor | None  # [queries, entries]
    lse_bias: Tensor | None  # [queries, coarse entries] fp32, where scores are relative to those
    has_windows: Tensor | None  # [queries, 1]
    selection: SelectionPlan | None
    window_start: int  # first key that a query of this tile can see through the window
    window_bias: Tensor | None  # [queries, num_keys - window_start]


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """One sequence's prefill chunk.

    page_rows: [H * P] page rows of its pages, head-major. swa_page_rows: the same of its window
    pages, from logical page swa_first_page on; None when the window reads the same pages.
    """

    page_rows: Tensor
    num_pages: int
    swa_page_rows: Tensor | None
    swa_first_page: int
    needs_cmp: bool
    tiles: list[TilePlan]


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """Rows of the caches that branches with keys and values of their own have beside.

    fresh_rows, kv_rows: as in `TorchPlan`, of the window pages. window_tokens: [W * l] step tokens
    of the windows that close, any where the token is older: those are old_tokens [Y] of the W * l,
    and old_rows [Y * H] the flat token rows of the tails that hold them. tail_tokens: [X] step
    tokens that tails keep, tail_rows: [X * H] flat token rows that they go to.
    """

    fresh_rows: Tensor
    kv_rows: Tensor
    window_tokens: Tensor
    old_tokens: Tensor
    old_rows: Tensor
    tail_tokens: Tensor
    tail_rows: Tensor


@dataclass(frozen=True, slots=True)
class TorchPlan:
    """One step for the PyTorch path.

    kv_rows [T * H], window_rows [W * H * l], cmp_rows [W * H]: flat token rows.
    lse_window_rows, lse_rows: as the last two, of the coarse windows.
    fresh_rows [F * H]: page rows to zero first. separate: None when branches share K/V.
    trace: where to record selections, None = nowhere.
    """

    branches: Branches
    fresh_rows: Tensor
    kv_rows: Tensor
    window_rows: Tensor
    cmp_rows: Tensor
    lse_window_rows: Tensor
    lse_rows: Tensor
    decode: DecodePlan | None
    chunks: list[ChunkPlan]
    separate: BranchPlan | None
    trace: BlockTrace | None = None


def overlap_weights(spec: NSASpec) -> Tensor:
    """Return [E + l/d - 1] fp32: strides that a block shares with each window that touches it.

    Eq. 9 of the paper; [1, 2, 2, 2, 1] for 32/16/64. In flat entries e = window + l/d - 1 the
    windows that touch block j are [jE, jE + E + l/d - 2], for every j.
    """
    entries, span = spec.cmp_entries_per_page, spec.strides_per_window
    entry = torch.arange(entries + span - 1)
    return (entry.clamp(max=entries - 1) - (entry - span + 1).clamp(min=0) + 1).float()


def plan_selection(positions: IntArray, num_pages: int, spec: NSASpec) -> SelectionPlan:
    """Plan the selection of the queries at `positions` among `num_pages` blocks."""
    current = (positions // spec.block_size)[:, None]
    block = np.arange(num_pages)[None, :]
    forced = (block < spec.num_init_blocks) | (block > current - spec.num_local_blocks)
    # Scores relative to coarse windows have no bound but this one.
    force = np.where(forced, np.float32(np.inf), np.float32(0.0))
    force[np.broadcast_to(block > current, force.shape)] = -np.inf
    num_selected, limits = spec.num_selected_blocks, None
    is_dense = positions + 1 < spec.dense_len
    if is_dense.any():
        # All their blocks compete, so that the local ones need not be told from the others.
        num_selected = spec.block_table_width
        counts = np.where(is_dense, num_selected, spec.num_selected_blocks)
        limits = torch.from_numpy(counts.astype(np.int64))
    halves = None
    if spec.selection == "fla_legacy":
        # The kernel merges chunks of n blocks and keeps n/2 of the past and n/2 of the last chunk;
        # inside the first chunk everything is kept, which splitting it in two reproduces.
        chunk = current // spec.num_selected_blocks * spec.num_selected_blocks
        border = np.where(chunk == 0, spec.num_selected_blocks // 2, chunk)
        past = np.where(block < border, force, np.float32(-np.inf)).astype(np.float32)
        last = np.where(block >= border, force, np.float32(-np.inf)).astype(np.float32)
        halves = (torch.from_numpy(past), torch.from_numpy(last))
    return SelectionPlan(
        num_selected=min(num_selected, num_pages),
        touching=spec.cmp_entries_per_page + spec.strides_per_window - 1,
        per_block=spec.cmp_entries_per_page,
        weights=overlap_weights(spec) if spec.score_map == "overlap" else None,
        force=torch.from_numpy(force),
        halves=halves,
        limits=limits,
    )


def plan_attention(
    meta: AttnMetadata,
    spec: NSASpec,
    *,
    num_kv_heads: int,
    dtype: torch.dtype,
    branches: Branches | None = None,
    trace: BlockTrace | None = None,
) -> TorchPlan:
    """Plan one step for layers of `num_kv_heads` heads and activations of `dtype`."""
    branches = branches or Branches()
    if trace is not None:
        trace.prepare(meta, spec, num_kv_heads=num_kv_heads, uses_slc=branches.slc)
    table = meta.page_table.numpy().astype(np.int64)
    swa_table = None
    if meta.branches is not None:
        swa_table = meta.branches.swa_page_table.numpy().astype(np.int64)
    seq_lens = meta.seq_lens.numpy().astype(np.int64)
    cu_seqlens = meta.cu_seqlens_q.tolist()
    decode = None
    if meta.num_decode_rows:
        rows = slice(0, meta.num_decode_rows)
        window_table = (table if swa_table is None else swa_table)[rows]
        decode = _plan_decode(
            table[rows], window_table, seq_lens[rows], spec, num_kv_heads, dtype, branches
        )
    chunks = [
        _plan_chunk(
            table[row], None if swa_table is None else swa_table[row], int(seq_lens[row]),
            cu_seqlens[row], cu_seqlens[row + 1], spec, num_kv_heads, dtype, branches,
        )
        for row in range(meta.num_decode_rows, len(seq_lens))
    ]  # fmt: skip
    return TorchPlan(
        branches=branches,
        fresh_rows=_flat_rows(meta.fresh_pages, num_kv_heads, 1).flatten(),
        kv_rows=_flat_rows(meta.slot_mapping, num_kv_heads, spec.block_size).flatten(),
        # Head before token, so that a window's tokens are consecutive per head.
        window_rows=_flat_rows(meta.window_slots, num_kv_heads, spec.block_size)
        .transpose(1, 2)
        .flatten(),
        cmp_rows=_flat_rows(
            meta.cmp_slot_mapping, num_kv_heads, spec.cmp_entries_per_page
        ).flatten(),
        lse_window_rows=_flat_rows(meta.lse_window_slots, num_kv_heads, spec.block_size)
        .transpose(1, 2)
        .flatten(),
        lse_rows=_flat_rows(
            meta.lse_slot_mapping, num_kv_heads, spec.block_size // (spec.lse_stride or 1)
        ).flatten(),
        decode=decode,
        chunks=chunks,
        separate=_plan_separate(meta, spec, num_kv_heads),
        trace=trace,
    )


def _plan_separate(meta: AttnMetadata, spec: NSASpec, num_kv_heads: int) -> BranchPlan | None:
    branches = meta.branches
    if branches is None:
        return None
    sources, num_tokens = branches.window_sources.flatten(), len(meta.positions)
    old_tokens = (sources >= num_tokens).nonzero().flatten()
    return BranchPlan(
        fresh_rows=_flat_rows(branches.fresh_swa_pages, num_kv_heads, 1).flatten(),
        kv_rows=_flat_rows(branches.swa_slot_mapping, num_kv_heads, spec.block_size).flatten(),
        window_tokens=sources.where(sources < num_tokens, 0),
        old_tokens=old_tokens,
        old_rows=_flat_rows(sources[old_tokens] - num_tokens, num_kv_heads, spec.cmp_len).flatten(),
        tail_tokens=branches.tail_tokens,
        tail_rows=_flat_rows(branches.tail_rows, num_kv_heads, spec.cmp_len).flatten(),
    )


def _flat_rows(slots: Tensor, num_kv_heads: int, per_page: int) -> Tensor:
    """[...] slots -> [..., H] rows of a [num_pages, H, per_page, D] cache seen as [-1, D]."""
    page, offset = slots // per_page, slots % per_page
    heads = torch.arange(num_kv_heads)
    return (page.unsqueeze(-1) * num_kv_heads + heads) * per_page + offset.unsqueeze(-1)


def _page_rows(pages: IntArray, num_kv_heads: int) -> IntArray:
    """[..., P] pages -> [..., H, P] rows of a cache seen as [num_pages * H, page_size * D]."""
    heads = np.arange(num_kv_heads, dtype=np.int64)[:, None]
    return pages[..., None, :] * num_kv_heads + heads


def _bias(visible: npt.NDArray[np.bool_], dtype: torch.dtype) -> Tensor:
    """0 where visible, else MASKED."""
    return torch.from_numpy(np.where(visible, np.float32(0.0), np.float32(MASKED))).to(dtype)


def _cmp_visible(positions: IntArray, num_entries: int, spec: NSASpec) -> npt.NDArray[np.bool_]:
    """[Q, entries]: entry e ends with token (e + 1) * d - 1; the first l/d - 1 do not exist."""
    entry = np.arange(num_entries)[None, :]
    ended = (entry + 1) * spec.cmp_stride <= positions[:, None] + 1
    return ended & (entry >= spec.strides_per_window - 1)


def _plan_decode(
    table: IntArray,
    window_table: IntArray,
    seq_lens: IntArray,
    spec: NSASpec,
    num_kv_heads: int,
    dtype: torch.dtype,
    branches: Branches,
) -> DecodePlan:
    size = spec.block_size
    num_rows, num_pages = len(seq_lens), int(-(-seq_lens.max() // size))
    table = table[:, :num_pages]
    positions = seq_lens - 1
    token = np.arange(num_pages * size)[None, :]
    visible = token < seq_lens[:, None]
    is_dense = bool(seq_lens.max() <= spec.num_dense_tokens)
    selects = branches.slc and not is_dense
    cmp_bias = lse_bias = has_windows = None
    if branches.cmp or selects:
        seen = _cmp_visible(positions, num_pages * spec.cmp_entries_per_page, spec)
        cmp_bias = _bias(seen, torch.float32).repeat_interleave(num_kv_heads, 0).unsqueeze(1)
        has_windows = torch.from_numpy(seen.any(1)).to(dtype).view(-1, 1, 1)
    if selects and spec.lse_len:
        num_coarse = num_pages * spec.coarse.cmp_entries_per_page
        seen = _cmp_visible(positions, num_coarse, spec.coarse)
        lse_bias = _bias(seen, torch.float32).repeat_interleave(num_kv_heads, 0).unsqueeze(1)
    window_page_rows = window_bias = None
    if branches.swa and spec.window_size > 0:
        window_page_rows, window_bias = _plan_decode_window(
            window_table[:, :num_pages], positions, spec, num_kv_heads, dtype
        )
    row = torch.arange(num_rows)
    token_bias = _bias(visible, dtype)
    return DecodePlan(
        num_rows=num_rows,
        num_pages=num_pages,
        is_dense=is_dense,
        page_rows=torch.from_numpy(_page_rows(table, num_kv_heads)).flatten(),
        token_bias=token_bias.view(num_rows, num_pages, size),
        dense_bias=(
            token_bias.repeat_interleave(num_kv_heads, 0).unsqueeze(1) if is_dense else None
        ),
        window_page_rows=window_page_rows,
        window_bias=window_bias,
        cmp_bias=cmp_bias,
        lse_bias=lse_bias,
        has_windows=has_windows,
        selection=plan_selection(positions, num_pages, spec) if selects else None,
        block_row_base=(
            (row.view(-1, 1) * num_kv_heads + torch.arange(num_kv_heads)) * num_pages
        ).unsqueeze(-1),
        bias_row_base=(row * num_pages).view(-1, 1, 1),
    )


def _plan_decode_window(
    table: IntArray,
    positions: IntArray,
    spec: NSASpec,
    num_kv_heads: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Page rows and bias of the pages that hold each row's last `window_size` tokens."""
    size = spec.block_size
    first_token = np.maximum(positions - spec.window_size + 1, 0)
    first_page = first_token // size
    count = int((positions // size - first_page).max()) + 1
    logical = first_page[:, None] + np.arange(count)[None, :]
    inside = logical <= (positions // size)[:, None]
    clipped = np.minimum(logical, table.shape[1] - 1)
    pages = np.where(inside, np.take_along_axis(table, clipped, axis=1), 0)
    token = (logical[:, :, None] * size + np.arange(size)).reshape(len(positions), -1)
    visible = (token >= first_token[:, None]) & (token <= positions[:, None])
    bias = _bias(visible, dtype).repeat_interleave(num_kv_heads, 0).unsqueeze(1)
    return torch.from_numpy(_page_rows(pages, num_kv_heads)).flatten(), bias


def _plan_chunk(
    pages: IntArray,
    swa_pages: IntArray | None,
    seq_len: int,
    start: int,
    stop: int,
    spec: NSASpec,
    num_kv_heads: int,
    dtype: torch.dtype,
    branches: Branches,
) -> ChunkPlan:
    size = spec.block_size
    num_pages = -(-seq_len // size)
    first = seq_len - (stop - start)  # position of the chunk's first query
    tiles, position = [], first
    while position < seq_len:
        end = min(_tile_end(position, spec), seq_len)
        offset = start - first
        tiles.append(_plan_tile(position, end, offset, spec, dtype, branches))
        position = end
    swa_first_page = max(0, first - spec.window_size + 1) // size
    return ChunkPlan(
        page_rows=torch.from_numpy(_page_rows(pages[:num_pages], num_kv_heads)).flatten(),
        num_pages=num_pages,
        swa_page_rows=(
            None
            if swa_pages is None
            else torch.from_numpy(
                _page_rows(swa_pages[swa_first_page:num_pages], num_kv_heads)
            ).flatten()
        ),
        swa_first_page=swa_first_page,
        needs_cmp=branches.cmp or any(tile.selection is not None for tile in tiles),
        tiles=tiles,
    )


def _tile_end(position: int, spec: NSASpec) -> int:
    """Where the tile that starts at `position` ends: inside one block once blocks are selected."""
    dense_end = spec.num_dense_tokens
    if position < dense_end:
        return min(position // DENSE_TILE * DENSE_TILE + DENSE_TILE, dense_end)
    return (position // spec.block_size + 1) * spec.block_size


def _plan_tile(
    position: int, end: int, offset: int, spec: NSASpec, dtype: torch.dtype, branches: Branches
) -> TilePlan:
    positions = np.arange(position, end, dtype=np.int64)
    selects = branches.slc and end > spec.num_dense_tokens
    cmp_bias = lse_bias = has_windows = window_bias = None
    if branches.cmp or selects:
        num_blocks = -(-end // spec.block_size)
        seen = _cmp_visible(positions, num_blocks * spec.cmp_entries_per_page, spec)
        cmp_bias = _bias(seen, dtype)
        has_windows = torch.from_numpy(seen.any(1)).to(dtype).view(-1, 1)
    if selects and spec.lse_len:
        num_coarse = -(-end // spec.block_size) * spec.coarse.cmp_entries_per_page
        lse_bias = _bias(_cmp_visible(positions, num_coarse, spec.coarse), torch.float32)
    window_start = max(0, position - spec.window_size + 1)
    if branches.swa and spec.window_size > 0:
        key = np.arange(window_start, end)[None, :]
        near = key > positions[:, None] - spec.window_size
        window_bias = _bias(near & (key <= positions[:, None]), dtype)
    own = np.arange(end - position)
    return TilePlan(
        start=position + offset,
        stop=end + offset,
        first_position=position,
        num_keys=end,
        causal_bias=_bias(own[None, :] <= own[:, None], dtype),
        cmp_bias=cmp_bias,
        lse_bias=lse_bias,
        has_windows=has_windows,
        selection=(
            plan_selection(positions, -(-end // spec.block_size), spec) if selects else None
        ),
        window_start=window_start,
        window_bias=window_bias,
    )
