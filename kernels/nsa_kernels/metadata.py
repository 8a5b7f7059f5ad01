"""What the operators are told about a step and a layer's cache.

T tokens of this step, B sequences (rows), P pages of the longest row, H KV heads,
W compression windows that close in this step, E compressed entries a page.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nsa_kernels.spec import NSASpec


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's paged cache. Page 0 is the null page: rows are padded with it.

    k: [num_pages, H, page_size, D]; v: [num_pages, H, page_size, Dv].
    k_cmp: [num_pages, H, E, D]; v_cmp: [num_pages, H, E, Dv]. Compressed window j is filed under
    the page in which its last token lies: flat entry e = j + l/d - 1 of the sequence is slot e % E
    of its page e // E.

    A model with keys and values of its own for every branch keeps those of selection in k and v,
    and has two more pairs, None where the branches share k and v:
    k_swa, v_swa: [num_swa_pages, H, page_size, D or Dv], pages of the window branch.
    k_tail, v_tail: [num_swa_pages, H, l, D or Dv], the raw tokens of the compression branch, of
    each window page the last l: token p of a sequence is entry p % l of its own window page.

    k_scale, v_scale: [H] fp32 on the device, of an FP8 (torch.float8_e4m3fn) cache, None of any
    other. It holds round(clamp(x / scale, -448, 448)), and compressed entries have the scale of
    the raw ones. Only where the branches share keys and values, and only on a GPU.

    k_lse: [num_pages, H, page_size / lse_stride, D], mean keys of the coarse windows, filed as
    compressed windows are; None where the dialect has none (`NSASpec.lse_len`).
    """

    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_swa: Tensor | None = None
    v_swa: Tensor | None = None
    k_tail: Tensor | None = None
    v_tail: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    k_lse: Tensor | None = None

    @property
    def page_size(self) -> int:
        """Tokens a page holds."""
        return self.k.shape[2]

    @property
    def window_kv(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the window branch."""
        if self.k_swa is None or self.v_swa is None:
            return self.k, self.v
        return self.k_swa, self.v_swa


@dataclass(frozen=True, slots=True)
class BranchKV:
    """This step's keys [T, H, D] and values [T, H, Dv] of the branches that do not share k and v.

    k_cmp, v_cmp: what is compressed. k_swa, v_swa: what the sliding window attends to.
    """

    k_cmp: Tensor
    v_cmp: Tensor
    k_swa: Tensor
    v_swa: Tensor


@dataclass(frozen=True, slots=True)
class BranchMetadata:
    """What a step needs beside, when every branch has keys and values of its own.

    swa_page_table: [B, P] int32, window pages by position // page_size. An entry that neither the
    window nor an open compression window of the row's tokens touches is never read: 0, or stale.
    swa_slot_mapping: [T] int64. fresh_swa_pages: [F] int64, as `AttnMetadata.fresh_pages`.
    window_sources: [W, l] int64, the tokens of every window that closes: i < T is token i of the
    step, T + page * l + p % l is token p, of an earlier step, in the tail of its window page.
    tail_tokens, tail_rows: [X] int64, step tokens to keep in tails, those that are among the last l
    that their page has after the step; and where, page * l + p % l.
    """

    swa_page_table: Tensor
    swa_slot_mapping: Tensor
    fresh_swa_pages: Tensor
    window_sources: Tensor
    tail_tokens: Tensor
    tail_rows: Tensor


@dataclass(frozen=True, slots=True)
class AttnMetadata:
    """One step, as every layer sees it; tensors are on the host, built once a step.

    Rows with one query token come first (`num_decode_rows` of them), then prefill chunks; the
    tokens of a row are consecutive and are the last ones of its sequence.

    positions: [T] int64, absolute. slot_mapping: [T] int64, page * page_size + offset.
    cu_seqlens_q: [B + 1] int32, prefix sums of the rows' query lengths.
    seq_lens: [B] int32, tokens in the cache after this step.
    page_table: [B, P] int32, padded with the null page.
    window_slots: [W, l] int64, slots of the tokens of every window that closes in this step.
    cmp_slot_mapping: [W] int64, page * E + entry where each of them is filed.
    lse_window_slots, lse_slot_mapping: the same of the coarse windows, none without `lse_len`.
    fresh_pages: [F] int64, pages that this step opens and leaves with unwritten entries. They are
    zeroed first: a masked key weighs 0, but 0 times a stale NaN would still be NaN.
    branches: None when the branches share keys and values.
    """

    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    page_table: Tensor
    window_slots: Tensor
    cmp_slot_mapping: Tensor
    fresh_pages: Tensor
    num_decode_rows: int
    lse_window_slots: Tensor
    lse_slot_mapping: Tensor
    branches: BranchMetadata | None = None


def build_metadata(
    pages: Sequence[Sequence[int]],
    starts: Sequence[int],
    query_lens: Sequence[int],
    spec: NSASpec,
    *,
    num_decode_rows: int = 0,
    swa_pages: Sequence[Sequence[int]] | None = None,
) -> AttnMetadata:
    """Describe a step to the operators.

    pages[b]: the pages of row b, in order, enough for its tokens. starts[b]: tokens of row b that
    are in the cache already. query_lens[b]: tokens that this step adds, at least 1.
    num_decode_rows: rows at the front with exactly one query token.
    swa_pages: window pages of each row (0 where passed), for a model whose branches have keys and
    values of their own.

    Raises ValueError when a row's pages do not hold its tokens, or window pages come with a dialect
    that has coarse windows.
    """
    size = spec.block_size
    start = np.asarray(starts, dtype=np.int64)
    lens = np.asarray(query_lens, dtype=np.int64)
    seq_lens = start + lens
    table = _page_table(pages, seq_lens, size)
    cu_seqlens = np.zeros(len(lens) + 1, dtype=np.int32)
    np.cumsum(lens, out=cu_seqlens[1:])
    token_row = np.repeat(np.arange(len(lens)), lens)
    positions = np.arange(cu_seqlens[-1]) - cu_seqlens[token_row] + start[token_row]
    # A window closes with its last token: when the count of tokens is l, l + d, l + 2d, ...
    ended = positions + 1
    closes = (ended >= spec.cmp_len) & ((ended - spec.cmp_len) % spec.cmp_stride == 0)
    window_row, window_end = token_row[closes], ended[closes]
    window_positions = window_end[:, None] - spec.cmp_len + np.arange(spec.cmp_len)
    # Flat entry e = (end / d) - 1, because its window ends with token (e + 1) * d - 1.
    entries = window_end // spec.cmp_stride - 1
    opens = positions % size == 0
    left_open = positions // size == (seq_lens[token_row] - 1) // size
    # The first l/d - 1 compressed entries of a sequence do not exist, nor do its first coarse ones.
    fresh = opens & (left_open | (positions < max(1, spec.lse_len - spec.lse_stride)))
    branches = None
    if swa_pages is not None:
        if spec.lse_len:
            raise ValueError(
                "lse_len needs keys that the branches share: coarse windows are read from their "
                "pages"
            )
        swa_table = _page_table(swa_pages, seq_lens, size)
        length = spec.cmp_len
        row_start, row_token = start[window_row, None], cu_seqlens[window_row, None]
        page_stops = np.minimum((positions // size + 1) * size, seq_lens[token_row])
        kept = positions >= page_stops - length
        branches = BranchMetadata(
            swa_page_table=torch.from_numpy(swa_table),
            swa_slot_mapping=torch.from_numpy(_slots(swa_table, token_row, positions, size)),
            fresh_swa_pages=torch.from_numpy(
                swa_table[token_row[fresh], positions[fresh] // size].astype(np.int64)
            ),
            window_sources=torch.from_numpy(
                np.where(
                    window_positions >= row_start,
                    window_positions - row_start + row_token,
                    len(positions) + _tails(swa_table, window_row[:, None], window_positions, spec),
                )
            ),
            tail_tokens=torch.from_numpy(np.flatnonzero(kept)),
            tail_rows=torch.from_numpy(_tails(swa_table, token_row[kept], positions[kept], spec)),
        )
    lse_window_slots, lse_slots = _coarse_windows(table, token_row, ended, spec)
    return AttnMetadata(
        positions=torch.from_numpy(positions),
        slot_mapping=torch.from_numpy(_slots(table, token_row, positions, size)),
        cu_seqlens_q=torch.from_numpy(cu_seqlens),
        seq_lens=torch.from_numpy(seq_lens.astype(np.int32)),
        page_table=torch.from_numpy(table),
        window_slots=torch.from_numpy(_slots(table, window_row[:, None], window_positions, size)),
        cmp_slot_mapping=torch.from_numpy(
            _slots(table, window_row, entries, spec.cmp_entries_per_page)
        ),
        fresh_pages=torch.from_numpy(
            table[token_row[fresh], positions[fresh] // size].astype(np.int64)
        ),
        num_decode_rows=num_decode_rows,
        lse_window_slots=torch.from_numpy(lse_window_slots),
        lse_slot_mapping=torch.from_numpy(lse_slots),
        branches=branches,
    )


def _coarse_windows(
    table: "np.ndarray[tuple[int, ...], np.dtype[np.int32]]",
    token_row: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    ended: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    spec: NSASpec,
) -> tuple[
    "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
]:
    """Token slots and entry slots of the coarse windows that close in the step.

    ended: tokens of the row up to each of the step's, that one included.
    """
    if not spec.lse_len:
        return np.zeros((0, 0), dtype=np.int64), np.zeros(0, dtype=np.int64)
    coarse = spec.coarse
    closes = (ended >= coarse.cmp_len) & (ended % coarse.cmp_stride == 0)
    row, end = token_row[closes], ended[closes]
    positions = end[:, None] - coarse.cmp_len + np.arange(coarse.cmp_len)
    entries = end // coarse.cmp_stride - 1
    return (
        _slots(table, row[:, None], positions, coarse.block_size),
        _slots(table, row, entries, coarse.cmp_entries_per_page),
    )


def _page_table(
    pages: Sequence[Sequence[int]],
    seq_lens: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    page_size: int,
) -> "np.ndarray[tuple[int, ...], np.dtype[np.int32]]":
    """Rows of pages as one [B, P] table, padded with the null page."""
    for row, (owned, length) in enumerate(zip(pages, seq_lens, strict=True)):
        if len(owned) * page_size < length:
            raise ValueError(
                f"row {row} has {length} tokens but {len(owned)} pages of {page_size} tokens"
            )
    table = np.zeros((len(pages), max(int(-(-n // page_size)) for n in seq_lens)), dtype=np.int32)
    for row, owned in enumerate(pages):
        used = min(len(owned), table.shape[1])
        table[row, :used] = owned[:used]
    return table


def _slots(
    table: "np.ndarray[tuple[int, ...], np.dtype[np.int32]]",
    row: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    position: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    per_page: int,
) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """Slot of each position: page * per_page + offset."""
    page = table[row, position // per_page].astype(np.int64)
    return page * per_page + position % per_page


def _tails(
    table: "np.ndarray[tuple[int, ...], np.dtype[np.int32]]",
    row: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    position: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]",
    spec: NSASpec,
) -> "np.ndarray[tuple[int, ...], np.dtype[np.int64]]":
    """Entry of each position in the tail of its window page: page * l + position % l."""
    page = table[row, position // spec.block_size].astype(np.int64)
    return page * spec.cmp_len + position % spec.cmp_len
