"""NSA's own metrics: blocks selected, and bytes needed of the cache against dense attention."""

from nsa_serve.cache_reads import CacheReads
from nsa_serve.metric_families import STEP_BLOCK_BUCKETS, Families

_PHASES = ("decode", "prefill")
_BRANCHES = ("cmp", "slc", "swa")


class ReadMetrics:
    """Counters by branch and phase, created with all their series."""

    def __init__(self, new: Families) -> None:
        read_bytes = new.counter_family(
            "nsa_cache_read_bytes",
            "Bytes that attention needed of the KV cache, by branch.",
            "branch",
            "phase",
        )
        dense_bytes = new.counter_family(
            "nsa_dense_cache_read_bytes",
            "Bytes that dense attention would have needed for the same queries.",
            "phase",
        )
        selected = new.counter_family(
            "nsa_selected_blocks",
            "Blocks selected by query tokens, in one layer and KV head.",
            "phase",
        )
        visible = new.counter_family(
            "nsa_visible_blocks",
            "Blocks that query tokens could have selected, in one layer and KV head.",
            "phase",
        )
        values = new.label_values
        self._branch_bytes = {
            (branch, phase): read_bytes.labels(*values, branch, phase)
            for branch in _BRANCHES
            for phase in _PHASES
        }
        self._dense_bytes = {phase: dense_bytes.labels(*values, phase) for phase in _PHASES}
        self._selected = {phase: selected.labels(*values, phase) for phase in _PHASES}
        self._visible = {phase: visible.labels(*values, phase) for phase in _PHASES}
        self._step_blocks = new.histogram(
            "nsa_step_selected_blocks",
            "Blocks selected by one engine step, in one layer and KV head.",
            STEP_BLOCK_BUCKETS,
            is_vllm=False,
        )

    def on_step(self, *, decode: CacheReads, prefill: CacheReads) -> None:
        """Count the reads of one step."""
        for phase, reads in (("decode", decode), ("prefill", prefill)):
            if not reads.dense_bytes:
                continue
            self._branch_bytes["cmp", phase].inc(reads.cmp_bytes)
            self._branch_bytes["slc", phase].inc(reads.slc_bytes)
            self._branch_bytes["swa", phase].inc(reads.swa_bytes)
            self._dense_bytes[phase].inc(reads.dense_bytes)
            self._selected[phase].inc(reads.num_selected_blocks)
            self._visible[phase].inc(reads.num_visible_blocks)
        self._step_blocks.observe(decode.num_selected_blocks + prefill.num_selected_blocks)
