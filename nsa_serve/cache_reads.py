"""What attention needs of the cache, by branch, against dense attention: from lengths alone.

A query at sequence length t (its own token included) needs, in every layer and KV head:

    dense   the keys and values of t tokens
    slc     those of its selected blocks: min(n, ceil(t / l')) of them, the last one as far as it
            is filled; no tensor is looked at, since the query's own block is always selected; all
            of them where t is below `dense_len`
    swa     those of the last min(w, t) tokens
    cmp     the compressed keys of the windows that ended, and their values when the branch's
            output is used; without it the keys only choose blocks, and only when t is above
            `num_dense_tokens`; then also the coarse keys, where there are such

A decode row moves just that. Queries of a prefill tile share what they read, so for prefill the
sums say what the queries attend to, not what the memory bus carries: the ratio to dense is exact
where both share alike. Sums over a chunk are differences of closed prefix sums: O(1) a row.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import msgspec

from nsa_kernels.spec import NSASpec
from nsa_serve.scheduler_output import SchedulerOutput


class CacheReads(msgspec.Struct, frozen=True, array_like=True):
    """Sums over queries: bytes over all layers and KV heads, blocks of one layer and KV head.

    num_visible_blocks: blocks that could have been selected.
    """

    cmp_bytes: int = 0
    slc_bytes: int = 0
    swa_bytes: int = 0
    dense_bytes: int = 0
    num_selected_blocks: int = 0
    num_visible_blocks: int = 0

    def __add__(self, other: "CacheReads") -> "CacheReads":
        pairs = zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True)
        return CacheReads(*(mine + theirs for mine, theirs in pairs))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadCosts:
    """What decides the cost of a query.

    key_bytes, value_bytes: of one cache entry over all layers and KV heads. uses_*: branches whose
    output reaches the model.
    """

    spec: NSASpec
    key_bytes: int
    value_bytes: int
    uses_cmp: bool = True
    uses_slc: bool = True
    uses_swa: bool = True

    def of_queries(self, start: int, num_queries: int) -> CacheReads:
        """Return the needs of the queries of tokens [start, start + num_queries)."""
        end = start + num_queries
        return self._make_reads(
            cmp_entries=self._sum_cmp_entries(end) - self._sum_cmp_entries(start),
            coarse_keys=self._sum_coarse_keys(end) - self._sum_coarse_keys(start),
            slc_tokens=self._sum_slc_tokens(end) - self._sum_slc_tokens(start),
            swa_tokens=self._sum_swa_tokens(end) - self._sum_swa_tokens(start),
            dense_tokens=_triangle(end) - _triangle(start),
            num_selected=self._sum_selected(end) - self._sum_selected(start),
            num_visible=self._sum_blocks(end) - self._sum_blocks(start),
        )

    def of_rows(self, lengths: Iterable[int]) -> CacheReads:
        """Return the needs of decode rows: one query at each of these sequence lengths."""
        spec = self.spec
        size, most, window = spec.block_size, spec.num_selected_blocks, spec.window_size
        most_dense, has_coarse = spec.num_dense_tokens, self.uses_slc and spec.lse_len > 0
        cmp_entries = slc_tokens = swa_tokens = dense_tokens = num_selected = num_visible = 0
        coarse_keys = 0
        for length in lengths:
            num_blocks = (length + size - 1) // size
            dense_tokens += length
            swa_tokens += min(length, window)
            num_visible += num_blocks
            if length <= most_dense:
                num_selected += num_blocks
                slc_tokens += length
            else:
                num_selected += most
                slc_tokens += length - (num_blocks - most) * size
            if self.uses_cmp or (self.uses_slc and length > most_dense):
                cmp_entries += spec.num_windows(length)
            if has_coarse and length > most_dense:
                coarse_keys += (length - spec.lse_len) // spec.lse_stride + 1
        return self._make_reads(
            cmp_entries=cmp_entries,
            coarse_keys=coarse_keys,
            slc_tokens=slc_tokens if self.uses_slc else 0,
            swa_tokens=swa_tokens if self.uses_swa else 0,
            dense_tokens=dense_tokens,
            num_selected=num_selected if self.uses_slc else 0,
            num_visible=num_visible if self.uses_slc else 0,
        )

    def _make_reads(
        self,
        *,
        cmp_entries: int,
        coarse_keys: int,
        slc_tokens: int,
        swa_tokens: int,
        dense_tokens: int,
        num_selected: int,
        num_visible: int,
    ) -> CacheReads:
        entry_bytes = self.key_bytes + self.value_bytes
        cmp_bytes = cmp_entries * (entry_bytes if self.uses_cmp else self.key_bytes)
        return CacheReads(
            cmp_bytes=cmp_bytes + coarse_keys * self.key_bytes,
            slc_bytes=slc_tokens * entry_bytes,
            swa_bytes=swa_tokens * entry_bytes,
            dense_bytes=dense_tokens * entry_bytes,
            num_selected_blocks=num_selected,
            num_visible_blocks=num_visible,
        )

    # Each `_sum_*(length)` adds up the queries at sequence lengths 1 to `length`.

    def _sum_cmp_entries(self, length: int) -> int:
        total = self._sum_windows(length)
        if self.uses_cmp:
            return total
        if not self.uses_slc:
            return 0
        return total - self._sum_windows(min(length, self.spec.num_dense_tokens))

    def _sum_windows(self, length: int) -> int:
        return _sum_windows(length, self.spec.cmp_len, self.spec.cmp_stride)

    def _sum_coarse_keys(self, length: int) -> int:
        size, stride = self.spec.lse_len, self.spec.lse_stride
        if not (self.uses_slc and size):
            return 0
        dense_length = min(length, self.spec.num_dense_tokens)
        return _sum_windows(length, size, stride) - _sum_windows(dense_length, size, stride)

    def _sum_slc_tokens(self, length: int) -> int:
        if not self.uses_slc:
            return 0
        dense_length = min(length, self.spec.num_dense_tokens)
        others = (length - dense_length) * (self.spec.num_selected_blocks - 1)
        own_blocks = self._sum_own_blocks(length) - self._sum_own_blocks(dense_length)
        return _triangle(dense_length) + others * self.spec.block_size + own_blocks

    def _sum_own_blocks(self, length: int) -> int:
        """Tokens of each query's own block that it sees."""
        whole, rest = divmod(length, self.spec.block_size)
        return whole * _triangle(self.spec.block_size) + _triangle(rest)

    def _sum_swa_tokens(self, length: int) -> int:
        if not self.uses_swa:
            return 0
        short = min(length, self.spec.window_size)
        return _triangle(short) + (length - short) * self.spec.window_size

    def _sum_selected(self, length: int) -> int:
        if not self.uses_slc:
            return 0
        dense_length = min(length, self.spec.num_dense_tokens)
        num_sparse = length - dense_length
        return self._sum_blocks(dense_length) + num_sparse * self.spec.num_selected_blocks

    def _sum_blocks(self, length: int) -> int:
        if not self.uses_slc:
            return 0
        whole, rest = divmod(length, self.spec.block_size)
        return self.spec.block_size * _triangle(whole) + rest * (whole + 1)


def step_reads(scheduled: SchedulerOutput, costs: ReadCosts) -> tuple[CacheReads, CacheReads]:
    """Return the reads of one step: those of its decode rows, those of its prefill chunks."""
    num_decode = scheduled.num_decode_rows
    decode = costs.of_rows(row.start + 1 for row in scheduled.rows[:num_decode])
    prefill = CacheReads()
    for row in scheduled.rows[num_decode:]:
        prefill += costs.of_queries(row.start, row.num_tokens)
    return decode, prefill


def _sum_windows(length: int, window_len: int, stride: int) -> int:
    """Return how many complete windows the queries at lengths 1 to `length` see together."""
    num_queries = max(0, length - window_len + 1)  # those that see a window
    whole, rest = divmod(num_queries, stride)
    return num_queries + stride * _triangle(whole - 1) + rest * whole


def _triangle(number: int) -> int:
    """Return 1 + 2 + ... + number; 0 for -1, too."""
    return number * (number + 1) // 2
