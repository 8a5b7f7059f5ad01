"""A stand-in for the engine, run in a process of its own by the tests of the asyncio side.

Run as `python fake_engine.py '{"option": value}' FD`. Each running request gets one token a step:
byte `ord("a") + i % 26` for its i-th, until max_tokens.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

from nsa_serve.config import EngineConfig
from nsa_serve.engine_process import run_process
from nsa_serve.errors import CapacityError, RequestError
from nsa_serve.messages import CacheComponent, EngineInfo, EngineStats, LoadProgress
from nsa_serve.request import EngineRequest, FinishReason, TokenOutput

VOCAB_SIZE = 256
MAX_MODEL_LEN = 500
FIRST_TOKEN = ord("a")
QUEUED_S = 0.5  # what every request claims to have waited
REFUSED_TOKEN = 200
POISON_TOKEN = 201

INFO = EngineInfo(
    family="fake",
    dtype="float32",
    device="cpu",
    num_parameters=1,
    weight_bytes=4,
    max_model_len=MAX_MODEL_LEN,
    max_num_seqs=32,
    vocab_size=VOCAB_SIZE,
    page_size=16,
    num_pages=100,
    cache=[CacheComponent("raw", 8.0, 12800)],
    phase_s={"load": 0.0},
)


class FakeEngine:
    """Options: load_error, step_s, crash_at, raise_at, hang_at (steps), stuck."""

    def __init__(self, options: dict[str, Any]) -> None:
        self._options = options
        self._requests: dict[str, tuple[EngineRequest, int]] = {}
        self._num_steps = 0
        self._num_step_tokens = 0
        self.info = INFO

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def has_step_in_flight(self) -> bool:
        return False

    @property
    def stats(self) -> EngineStats:
        return EngineStats(
            num_steps_total=self._num_steps,
            num_running=len(self._requests),
            num_step_tokens=self._num_step_tokens,
        )

    def add(self, request: EngineRequest) -> None:
        if REFUSED_TOKEN in request.prompt_token_ids:
            raise RequestError("the fake engine refuses this prompt", param="prompt")
        if POISON_TOKEN in request.prompt_token_ids:
            raise ZeroDivisionError("poison")
        self._requests[request.request_id] = (request, 0)

    def abort(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._requests.pop(request_id, None)

    def step(self) -> list[TokenOutput]:
        if self._options.get("stuck"):
            self._num_step_tokens = 0
            return []
        self._num_steps += 1
        time.sleep(self._options.get("step_s", 0.0))
        self._fail(self._num_steps)
        self._num_step_tokens = len(self._requests)
        return [self._next(request_id) for request_id in list(self._requests)]

    def close(self) -> None:
        sys.stderr.write("fake engine closed\n")

    def _fail(self, step: int) -> None:
        if step == self._options.get("crash_at"):
            sys.stderr.write("about to crash\n")
            sys.stderr.flush()
            os._exit(9)
        if step == self._options.get("raise_at"):
            raise RuntimeError("step\nfailed")
        if step == self._options.get("hang_at"):
            time.sleep(3600)

    def _next(self, request_id: str) -> TokenOutput:
        request, num_tokens = self._requests[request_id]
        token_id = FIRST_TOKEN + num_tokens % 26
        num_tokens += 1
        self._requests[request_id] = (request, num_tokens)
        finish_reason = None
        if num_tokens == request.params.max_tokens:
            finish_reason = FinishReason.LENGTH
            del self._requests[request_id]
        queued_s = QUEUED_S if num_tokens == 1 else 0.0
        return TokenOutput(request_id, [token_id], finish_reason=finish_reason, queued_s=queued_s)


def make_fake_engine(
    options: dict[str, Any],
) -> Callable[[EngineConfig, Callable[[LoadProgress], None]], FakeEngine]:
    """Return a factory of engines with these options."""

    def make(config: EngineConfig, on_progress: Callable[[LoadProgress], None]) -> FakeEngine:
        for done in range(3):
            on_progress(LoadProgress("weights", done, 2))
        if options.get("load_error") == "capacity":
            raise CapacityError(f"{config.model} does not\nfit")
        if options.get("load_error") == "crash":
            sys.stderr.write("no such luck\n")
            sys.stderr.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if options.get("load_error") == "bug":
            raise KeyError("bug")
        time.sleep(options.get("load_s", 0.0))
        return FakeEngine(options)

    return make


if __name__ == "__main__":
    sys.exit(run_process(int(sys.argv[2]), make_fake_engine(json.loads(sys.argv[1]))))
