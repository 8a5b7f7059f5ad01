"""Garbage collections kept short and rare: nobody gets a token while one runs.

A collection walks every list of its generation, and a long prompt is a list of its token ids, and
another, and one of its pages: with 32 requests of 64k tokens it takes 20 to 40 ms, a dozen steps of
a small model. What a step leaves behind is freed by its reference counts; a full collection finds
next to nothing.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_RARER = 100


def tame_collector(rarer: int = _RARER) -> None:
    """Leave out of collections what exists now, and make full ones `rarer` times rarer, for good.

    For a process that has loaded all it will load. One whose work leaves reference cycles behind
    passes 1: those of the web framework are 4 KB a request, which only a full collection frees.
    """
    gc.collect()
    gc.freeze()
    _make_rare(rarer)


@contextmanager
def rare_full_collections() -> Iterator[None]:
    """Make full collections rare inside the block. For a process that is somebody else's."""
    before = gc.get_threshold()
    _make_rare(_RARER)
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextmanager
def set_aside() -> Iterator[None]:
    """Leave out of collections, inside the block, what exists when it begins.

    New lists are young, so that the two younger generations walk each of them once, however rare
    full collections are; prompts that come all at once are walked all at once. Does nothing where
    the process has set objects aside itself, because ending it would end that, too.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _make_rare(rarer: int) -> None:
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, rarer * old)
