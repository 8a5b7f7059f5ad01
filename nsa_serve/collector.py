"""Full garbage collections kept short and rare: nobody gets a token while one runs.

A collection walks every list, and a long prompt is a list of its token ids, and another, and one
of its pages: with 32 requests of 64k tokens it takes 20 to 30 ms, a dozen steps of a small model.
What a step leaves behind is freed by its reference counts; a full collection finds next to nothing.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_RARER = 100


def tame_collector() -> None:
    """Leave out of collections what exists now, and make the full ones rare, for good.

    For a process that has loaded all it will load.
    """
    gc.collect()
    gc.freeze()
    _make_rare()


@contextmanager
def rare_full_collections() -> Iterator[None]:
    """Make full collections rare inside the block. For a process that is somebody else's."""
    before = gc.get_threshold()
    _make_rare()
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _make_rare() -> None:
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, _RARER * old)
