"""Decode steps as CUDA graphs: one a bucket of rows and of context.

A graph replays fixed shapes, so a step runs in the least bucket that holds its rows and its longest
context; rows beyond are padding. The context is a dimension because the kernels split a row by the
pages that its table may hold.
"""

import gc
import time
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

# The shortest context bucket, in tokens, and the room above a power of two that all of them have:
# prompts are often as long as a power of two, and what is generated comes on top.
_LEAST_CONTEXT = 4096
_CONTEXT_ROOM = 1 / 8


def row_buckets(max_num_rows: int) -> list[int]:
    """Return the numbers of rows that have a graph: powers of two, and steps of 8 from there on."""
    sizes = {size for size in (1, 2, 4) if size < max_num_rows}
    sizes |= set(range(8, max_num_rows, 8))
    return sorted(sizes | {max_num_rows})


def page_buckets(max_num_tokens: int, page_size: int) -> list[int]:
    """Return the context lengths that have a graph, in pages; the last holds `max_num_tokens`."""
    most = -(-max_num_tokens // page_size)
    sizes = []
    context = _LEAST_CONTEXT
    while (pages := round(context * (1 + _CONTEXT_ROOM)) // page_size) < most:
        sizes.append(pages)
        context *= 2
    return [*sizes, most]


def least_at_least(sizes: list[int], value: int) -> int:
    """Return the first of the ascending `sizes` that is not below `value`."""
    return sizes[bisect_left(sizes, value)]


@dataclass(frozen=True, slots=True)
class GraphReport:
    """What capturing took: graphs, seconds, and bytes of device memory."""

    num_graphs: int
    capture_s: float
    bytes: int


@dataclass(slots=True)
class GraphPool:
    """CUDA graphs that share one pool of memory; they never run at the same time.

    device: whose memory is counted.
    """

    device: torch.device
    _graphs: dict[tuple[object, ...], torch.cuda.CUDAGraph] = field(default_factory=dict)
    _pool: Any = None  # torch's handle, whose type it does not name
    _stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, key: tuple[object, ...], run: Callable[[], None]) -> None:
        """Run once, so that every kernel is compiled and loaded, then record under `key`."""
        if self._pool is None or self._stream is None:
            self._pool = torch.cuda.graph_pool_handle()
            self._stream = torch.cuda.Stream(self.device)
        run()
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        # torch.cuda.graph would also empty the allocator's cache, once a graph.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                run()
            finally:
                graph.capture_end()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._graphs[key] = graph

    def has(self, key: tuple[object, ...]) -> bool:
        """Tell whether something was recorded under `key`."""
        return key in self._graphs

    def replay(self, key: tuple[object, ...]) -> None:
        """Queue what was recorded under `key`."""
        self._graphs[key].replay()


def measure(device: torch.device, capture_all: Callable[[], int]) -> GraphReport:
    """Run `capture_all`, which returns the number of graphs; report its time and memory."""
    torch.cuda.synchronize(device)
    # A collection in the middle of a capture may free tensors of the device, which is an error.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        free_before, _ = torch.cuda.mem_get_info(device)
        start = time.perf_counter()
        num_graphs = capture_all()
        torch.cuda.synchronize(device)
        capture_s = time.perf_counter() - start
        free_after, _ = torch.cuda.mem_get_info(device)
    finally:
        gc.enable()
        gc.unfreeze()
    return GraphReport(num_graphs, capture_s, max(0, free_before - free_after))
