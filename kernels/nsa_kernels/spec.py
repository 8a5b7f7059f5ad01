"""The static description of an NSA operator: what differs between checkpoints, and no tensor.

Symbols of the paper (arXiv 2502.11089): l = cmp_len, d = cmp_stride, l' = block_size,
n = num_selected_blocks, w = window_size.
"""

from dataclasses import dataclass
from typing import Literal

ScoreMap = Literal["overlap", "max_pool"]
Selection = Literal["exact", "fla_legacy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class NSASpec:
    """Geometry and selection rule of one NSA dialect.

    cmp_len, cmp_stride: tokens per compression window, tokens between windows (stride divides len).
    block_size: tokens per selection block; also the page size of the cache.
    num_selected_blocks: blocks a token attends to, forced ones included.
    num_init_blocks, num_local_blocks: forced blocks at the start, and ending at the query's block.
    window_size: tokens of the sliding window, the query's own token included; 0 = no window branch.
    score_map: how compression probabilities become block scores. "overlap" weighs each window by
        the strides it shares with the block (the identity when l = d = l', [1, 2, 2, 2, 1] for
        32/16/64); "max_pool" is InfLLM-v2's pooling over overlapping windows.
    selection: "exact" top-n, ties to the lower index; "fla_legacy" is the half-and-half rule of
        the kernel that `zen-E/NSA-1B` was published with.
    dense_len: a query with fewer than this many tokens, its own included, selects every block; 0 =
        no such rule. Decided for each query, so that prefill and decode agree.
    lse_len, lse_stride: tokens per coarse window, and between coarse windows, whose keys (the mean)
        give the log-sum-exp that the scores of the compression windows are relative to (InfLLM-v2:
        128 and 64); 0 and 0 = that of the compression windows themselves.

    Raises ValueError, naming the field, when the values do not fit together.
    """

    cmp_len: int = 32
    cmp_stride: int = 16
    block_size: int = 64
    num_selected_blocks: int = 16
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    score_map: ScoreMap = "overlap"
    selection: Selection = "exact"
    dense_len: int = 0
    lse_len: int = 0
    lse_stride: int = 0

    def __post_init__(self) -> None:
        for name in ("cmp_len", "cmp_stride", "block_size", "num_selected_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in (
            "num_init_blocks",
            "num_local_blocks",
            "window_size",
            "dense_len",
            "lse_len",
            "lse_stride",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.cmp_len % self.cmp_stride:
            raise ValueError(
                f"cmp_stride must divide cmp_len, got cmp_len {self.cmp_len} "
                f"and cmp_stride {self.cmp_stride}"
            )
        if self.block_size % self.cmp_stride:
            raise ValueError(
                f"cmp_stride must divide block_size, got block_size {self.block_size} "
                f"and cmp_stride {self.cmp_stride}"
            )
        if self.cmp_len > self.block_size:
            raise ValueError(
                f"cmp_len must not exceed block_size, got cmp_len {self.cmp_len} "
                f"and block_size {self.block_size}"
            )
        forced = self.num_init_blocks + self.num_local_blocks
        if forced > self.num_selected_blocks:
            raise ValueError(
                f"num_selected_blocks ({self.num_selected_blocks}) must hold the forced blocks: "
                f"num_init_blocks + num_local_blocks = {forced}"
            )
        if self.num_local_blocks < 1:
            raise ValueError("num_local_blocks must be at least 1: the query's own block is forced")
        if self.score_map not in ("overlap", "max_pool"):
            raise ValueError(f"score_map must be 'overlap' or 'max_pool', got {self.score_map!r}")
        if self.selection not in ("exact", "fla_legacy"):
            raise ValueError(f"selection must be 'exact' or 'fla_legacy', got {self.selection!r}")
        # The rule keeps one half of the blocks from the past and one half from the present.
        has_half = self.num_selected_blocks % 2 == 0 and forced <= self.num_selected_blocks // 2
        if self.selection == "fla_legacy" and not has_half:
            raise ValueError(
                "selection 'fla_legacy' needs an even num_selected_blocks whose half holds the "
                f"forced blocks, got num_selected_blocks {self.num_selected_blocks} and "
                f"{forced} forced blocks"
            )
        if self.selection != "exact" and (self.dense_len or self.lse_len):
            raise ValueError(
                f"dense_len and lse_len need selection 'exact', got {self.selection!r} with "
                f"dense_len {self.dense_len} and lse_len {self.lse_len}"
            )
        self._check_coarse_windows()

    def _check_coarse_windows(self) -> None:
        """Raise ValueError unless there are none, or their keys fit into pages."""
        if not (self.lse_len or self.lse_stride):
            return
        if not (self.lse_len and self.lse_stride) or self.lse_len % self.lse_stride:
            raise ValueError(
                f"lse_stride must divide lse_len, or both be 0, got lse_len {self.lse_len} "
                f"and lse_stride {self.lse_stride}"
            )
        if self.block_size % self.lse_stride:
            raise ValueError(
                f"lse_stride must divide block_size, got block_size {self.block_size} "
                f"and lse_stride {self.lse_stride}"
            )
        if self.lse_len > self.num_selected_blocks * self.block_size:
            # So a query that has to choose sees a coarse window.
            raise ValueError(
                f"lse_len must not exceed num_selected_blocks * block_size = "
                f"{self.num_selected_blocks * self.block_size}, got {self.lse_len}"
            )
        if self.score_map != "max_pool":
            raise ValueError(
                f"lse_len needs score_map 'max_pool', got {self.score_map!r} "
                f"with lse_len {self.lse_len}"
            )

    @property
    def block_table_width(self) -> int:
        """Most blocks that a query selects: `num_selected_blocks`, or all of a dense query's."""
        return max(self.num_selected_blocks, -(-(self.dense_len - 1) // self.block_size))

    @property
    def num_dense_tokens(self) -> int:
        """Tokens up to which a query selects every block it sees, whatever the scores."""
        return max(self.num_selected_blocks * self.block_size, self.dense_len - 1)

    @property
    def coarse(self) -> "NSASpec":
        """The coarse windows as the compression windows of a spec, for what treats them alike.

        They may be longer than a block, which no other spec allows: scores of blocks are not
        defined on them. ValueError where lse_len is 0.
        """
        if not self.lse_len:
            raise ValueError("lse_len is 0: this dialect has no coarse windows")
        return _CoarseSpec(
            cmp_len=self.lse_len,
            cmp_stride=self.lse_stride,
            block_size=self.block_size,
            num_selected_blocks=self.num_selected_blocks,
            num_init_blocks=self.num_init_blocks,
            num_local_blocks=self.num_local_blocks,
            window_size=self.window_size,
            score_map=self.score_map,
        )

    @property
    def strides_per_window(self) -> int:
        """l / d: strides that one compression window spans."""
        return self.cmp_len // self.cmp_stride

    @property
    def cmp_entries_per_page(self) -> int:
        """l' / d: compressed entries that one page holds."""
        return self.block_size // self.cmp_stride

    def num_windows(self, num_tokens: int) -> int:
        """Complete compression windows among the first `num_tokens` tokens (paper, Eq. 7)."""
        if num_tokens < self.cmp_len:
            return 0
        return (num_tokens - self.cmp_len) // self.cmp_stride + 1


class _CoarseSpec(NSASpec):
    """What `NSASpec.coarse` returns: checked where it comes from."""

    __slots__ = ()

    def __post_init__(self) -> None:
        """Accept windows longer than a block."""
