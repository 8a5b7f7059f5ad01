"""Run requests on a real engine over a tiny checkpoint, and collect what each produced."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from nsa_serve.config import EngineConfig, make_config
from nsa_serve.engine import Engine
from nsa_serve.request import (
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
    TokenOutput,
)
from tests.util import VOCAB_SIZE


@dataclass(slots=True)
class Result:
    """Everything one request put out."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    num_prefix_hit_tokens: int = 0

    def add(self, output: TokenOutput) -> None:
        """Take in one step's output; a request puts nothing out after its end."""
        assert self.finish_reason is None, f"{output.request_id} went on after its end"
        assert output.error is None, output.error
        self.token_ids += output.token_ids
        self.logprobs += output.logprobs or []
        if output.prompt_logprobs is not None:
            assert self.prompt_logprobs is None, "prompt logprobs came twice"
            self.prompt_logprobs = output.prompt_logprobs
        self.finish_reason = output.finish_reason
        self.num_prefix_hit_tokens = output.num_prefix_hit_tokens


def make_engine(model: Path | str, *, dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
    """Load a checkpoint on one thread; float64, which users cannot choose, tells rounding apart."""
    values = {"model": str(model), "num_threads": 1, "device": "cpu", **options}
    with mock.patch("nsa_serve.engine_setup.run_dtype", lambda *_: dtype):
        return Engine(make_config(EngineConfig, values))


def make_prompt(length: int, *, seed: int = 0) -> list[int]:
    """Draw token ids, none of them special."""
    rng = random.Random(f"{length}-{seed}")
    return [rng.randrange(3, VOCAB_SIZE) for _ in range(length)]


def greedy(max_tokens: int = 20, **options: Any) -> SamplingParams:
    """Return parameters of a greedy request of exactly `max_tokens` tokens."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **options)


def run(engine: Engine, requests: Iterable[EngineRequest]) -> dict[str, Result]:
    """Add all requests at once and step until none is left; check the engine after each step."""
    results: dict[str, Result] = {}
    for request in requests:
        engine.add(request)
        results[request.request_id] = Result()
    while engine.has_unfinished:
        step(engine, results)
    for pool in (engine.pool, engine.swa_pool):
        assert pool is None or pool.num_free_pages == pool.num_pages
    return results


def step(engine: Engine, results: dict[str, Result]) -> None:
    """Run one step and take in what it produced."""
    for output in engine.step():
        results[output.request_id].add(output)
    engine.scheduler.check()


def run_alone(engine: Engine, requests: Sequence[EngineRequest]) -> dict[str, Result]:
    """Run each request by itself, without what the one before left in the prefix cache."""
    results = {}
    for request in requests:
        engine.scheduler.reset_prefix_cache()
        results.update(run(engine, [request]))
    return results
