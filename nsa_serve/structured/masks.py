"""Which tokens may follow in each row of a step, found while the model computes their logits.

One thread takes in the tokens of the last step and computes the masks; llguidance releases the GIL
for it. Another compiles, so that a large grammar holds up nobody but its own request.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
from llguidance import LLExecutor, LLMatcher
from numpy.typing import NDArray

from nsa_serve.request import Request, RequestStatus, StructuredOutput
from nsa_serve.structured.matcher import GrammarError, Vocabulary, check_matcher

_MAX_CACHED_GRAMMARS = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MaskFailure:
    """Why a grammar cannot be followed any further, and whether it is its author's fault."""

    message: str
    is_request_fault: bool


@dataclass(frozen=True, slots=True)
class StepMasks:
    """The masks of one step.

    rows: of the step, those with a grammar. bits: uint8 [len(rows), ceil(V / 8)], bit i % 8 (the
    lowest first) of byte i // 8 set where token i may follow. failures: by row.
    """

    rows: list[int]
    bits: NDArray[np.uint8]
    failures: dict[int, MaskFailure]


class TokenMatcher:
    """The grammar of one request and how much of its output was taken in; a `RequestMatcher`."""

    def __init__(self, compiled: LLMatcher) -> None:
        self._matcher = compiled
        self._num_consumed = 0
        self._is_done = False

    @property
    def is_done(self) -> bool:
        """True once nothing but the end of the sequence may follow."""
        return self._is_done

    @property
    def compiled(self) -> LLMatcher:
        """The matcher, in the state after the tokens of the last `advance`."""
        return self._matcher

    def advance(self, output_token_ids: Sequence[int]) -> None:
        """Take in the tokens since the last call. Raises GrammarError."""
        fresh = list(output_token_ids[self._num_consumed :])
        if fresh:
            self._num_consumed += len(fresh)
            self._matcher.consume_tokens(fresh)
        check_matcher(self._matcher)

    def settle(self) -> None:
        """Take note of where the mask just computed has led. Raises GrammarError."""
        check_matcher(self._matcher)
        self._is_done = self._matcher.is_stopped()


class GrammarMasks:
    """Compiles the grammars of requests, and computes their masks a step at a time.

    load_vocabulary: called in a thread before the first grammar; it may raise GrammarError.
    """

    def __init__(self, load_vocabulary: Callable[[], Vocabulary]) -> None:
        self._load_vocabulary = load_vocabulary
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[StructuredOutput, LLMatcher] = OrderedDict()
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self._masking = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor = LLExecutor(1)

    def compile(self, structured: StructuredOutput) -> "Future[TokenMatcher]":
        """Return a future of the matcher for one request; it may raise GrammarError."""
        return self._compiling.submit(self._compile, structured)

    def start(self, requests: Sequence[Request]) -> "Future[StepMasks] | None":
        """Begin the masks of a step that samples for `requests`; None when none has a grammar."""
        # One that ended since its row was scheduled has no use for a mask, and may have no next
        # token either: its grammar may be at its end.
        rows = [
            row
            for row, request in enumerate(requests)
            if request.matcher is not None and request.status is not RequestStatus.FINISHED
        ]
        if not rows:
            return None
        return self._masking.submit(self._compute, rows, [requests[row] for row in rows])

    def close(self) -> None:
        """End the threads."""
        self._compiling.shutdown(cancel_futures=True)
        self._masking.shutdown(cancel_futures=True)

    def _compile(self, structured: StructuredOutput) -> TokenMatcher:
        if self._vocabulary is None:
            self._vocabulary = self._load_vocabulary()
        compiled = self._compiled.get(structured)
        if compiled is None:
            compiled = self._compiled[structured] = self._vocabulary.compile(structured)
            if len(self._compiled) > _MAX_CACHED_GRAMMARS:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(structured)
        return TokenMatcher(compiled.deep_copy())

    def _compute(self, rows: list[int], requests: list[Request]) -> StepMasks:
        assert self._vocabulary is not None, "a request has a matcher, so one was compiled"
        bits = np.zeros((len(rows), -(-self._vocabulary.size // 32) * 4), dtype=np.uint8)
        failures: dict[int, MaskFailure] = {}
        ready: list[tuple[TokenMatcher, int]] = []
        for i, (row, request) in enumerate(zip(rows, requests, strict=True)):
            matcher = cast(TokenMatcher, request.matcher)
            with _failure_of(row, failures):
                matcher.advance(request.output_token_ids)
                ready.append((matcher, i))
        try:
            self._fill(bits, ready)
        except BaseException:
            logger.exception("the masks of a step failed; each row is tried alone")
            for matcher, i in ready:
                with _failure_of(rows[i], failures):
                    self._fill(bits, [(matcher, i)])
        for matcher, i in ready:
            with _failure_of(rows[i], failures):
                matcher.settle()
        return StepMasks(rows, bits, failures)

    def _fill(self, bits: NDArray[np.uint8], ready: list[tuple[TokenMatcher, int]]) -> None:
        num_rows, num_bytes = bits.shape
        pairs = [(matcher.compiled, i) for matcher, i in ready]
        self._executor.unsafe_compute_mask_ptr(pairs, bits.ctypes.data, num_bytes, num_rows)


@contextmanager
def _failure_of(row: int, failures: dict[int, MaskFailure]) -> Iterator[None]:
    """Note an error as the row's own; others must not suffer from it."""
    try:
        yield
    except GrammarError as error:
        failures[row] = MaskFailure(f"the grammar failed: {error}", is_request_fault=True)
    # A panic of the library is no Exception.
    except BaseException as error:
        logger.exception("the grammar of a row failed")
        failures[row] = MaskFailure(
            f"the grammar failed: internal error: {type(error).__name__}", is_request_fault=False
        )
