"""One log line every ten seconds while requests run."""

import asyncio
import logging
import time

from nsa_http.state import ServerState

_logger = logging.getLogger(__name__)

_INTERVAL_S = 10.0


async def log_stats_forever(state: ServerState, *, interval_s: float = _INTERVAL_S) -> None:
    """Log throughput, requests and cache use every `interval_s` in which something happened."""
    last_s, last_prompt, last_output = time.monotonic(), *state.metrics.token_totals()
    while True:
        await asyncio.sleep(interval_s)
        now_s, prompt, output = time.monotonic(), *state.metrics.token_totals()
        stats = state.require_engine().stats
        if prompt != last_prompt or output != last_output or stats.num_running or stats.num_waiting:
            elapsed_s = now_s - last_s
            usage = 1 - stats.num_free_pages / stats.num_pages if stats.num_pages else 0.0
            hits = stats.prefix_cache_hits_total / max(1, stats.prefix_cache_queries_total)
            _logger.info(
                "prompt %.1f tok/s, output %.1f tok/s, running %d, waiting %d, preempted %d, "
                "cache %.1f%%, prefix hits %.1f%%",
                (prompt - last_prompt) / elapsed_s,
                (output - last_output) / elapsed_s,
                stats.num_running,
                stats.num_waiting,
                stats.num_preemptions_total,
                100 * usage,
                100 * hits,
            )
        last_s, last_prompt, last_output = now_s, prompt, output
