"""Lists what an engine would compile while it serves: `python -m tests.engine.variants`.

A whole GPU engine on the CPU whose kernels do not run: Triton is asked for each variant and told
that it is there already. Every token is 0, which is all that a schedule needs. Its parent gives the
checkpoint's folder and the engine's options in JSON, with `num_requests` to serve and the tokens of
their `longest` prompt, and reads a report as of `tests.kernels.variants`, with the number of steps
by kind.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from nsa_serve.cuda_graph import GraphReport
from nsa_serve.engine import Engine
from nsa_serve.request import EngineRequest, SamplingParams
from tests.engine.engine_runs import greedy, make_engine, make_prompt
from tests.engine.test_gpu_runner import RecordedCalls, load_interpreted
from tests.kernels.variants import Recorder

# Every kernel of sampling beside the attention; grammars need tokens that differ.
PARAMS = (
    greedy(9),
    greedy(24, logprobs=2, prompt_logprobs=1),
    greedy(40, allowed_token_ids=(0, 9, 41)),
    SamplingParams(max_tokens=24, seed=3, top_k=40, top_p=0.9, min_p=0.01, ignore_eos=True),
    greedy(24, frequency_penalty=1.0, repetition_penalty=1.3),
    greedy(24, bad_words=((7,), (90,)), logit_bias={7: 3.0}, min_tokens=2),
    greedy(0, prompt_logprobs=1),
)


class RecordedGraphs(RecordedCalls):
    """Runs what is recorded once, as a capture does; a replay launches nothing."""

    def capture(self, key: tuple[object, ...], run: Callable[[], None]) -> None:
        run()
        super().capture(key, run)

    def replay(self, key: tuple[object, ...]) -> None:
        assert key in self.calls, key


def warmed_up(*args: Any, **options: Any) -> Any:
    """Load as on a GPU, with the runner's warm-up."""
    from nsa_serve.gpu_runner import GpuModelRunner

    capture = GpuModelRunner.capture

    def warm_up_and_capture(runner: GpuModelRunner) -> GraphReport:
        runner.warm_up()
        return capture(runner)

    with mock.patch.object(GpuModelRunner, "capture", warm_up_and_capture):
        return load_interpreted(*args, **options)


def zeros_for_empty(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return what makes zeros, where kernels would write."""
    return lambda *args, **options: make(*args, **options).zero_()


def ask(name: str, length: int, params: SamplingParams, *, seed: int = 0) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=make_prompt(length, seed=seed), params=params
    )


def serve(engine: Engine, *, num_requests: int, longest: int, seed: int) -> None:
    """Run requests of any length, alone, in bursts, and with prefixes that are found."""
    for length in (longest >> shift for shift in range(4)):
        # One decode row beside a chunk of a prompt: the lone row of a step of several tokens.
        engine.add(ask(f"lone-{length}", 3, greedy(60)))
        for _ in range(4):
            engine.step()
        engine.add(ask(f"beside-{length}", max(length, 1), greedy(2)))
        while engine.has_unfinished:
            engine.step()
    rng = random.Random(seed)
    num_made = 0
    while num_made < num_requests or engine.has_unfinished:
        if num_made < num_requests and rng.random() < (0.6 if num_made % 60 < 40 else 0.05):
            length = rng.randint(1, longest if rng.random() < 0.3 else min(longest, 100))
            engine.add(ask(str(num_made), length, rng.choice(PARAMS), seed=rng.randrange(2)))
            num_made += 1
        engine.step()


def main() -> None:
    """Print the report of one checkpoint."""
    folder, options = sys.argv[1], json.loads(sys.argv[2])
    recorder = Recorder()
    recorder.install()

    def measure(device: torch.device, capture_all: Callable[[], int]) -> GraphReport:
        return GraphReport(capture_all(), 0.0, 0)

    for place, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        setattr(place, name, zeros_for_empty(getattr(place, name)))
    with (
        mock.patch("nsa_serve.engine.load_runner", warmed_up),
        mock.patch.object(Engine, "_warm_up_grammars", lambda self: None),
        mock.patch("nsa_serve.gpu_runner.GraphPool", RecordedGraphs),
        mock.patch("nsa_serve.gpu_runner.measure", measure),
        mock.patch("nsa_kernels.gpu.plan.has_dependent_launch", lambda device: True),
        mock.patch("nsa_kernels.gpu.linear.has_dependent_launch", lambda device: True),
        mock.patch.object(torch.cuda, "synchronize", lambda device=None: None),
        mock.patch.object(Tensor, "pin_memory", Tensor.clone),
    ):
        longest, num_requests = options.pop("longest"), options.pop("num_requests")
        dtype = getattr(torch, options.pop("dtype"))
        engine = make_engine(Path(folder), dtype=dtype, async_scheduling=True, **options)
        recorder.phase = "serving"
        serve(engine, num_requests=num_requests, longest=longest, seed=1)
        runner: Any = engine.runner
        report = recorder.report() | {
            "num_graph_replays": runner.num_graph_replays,
            "num_eager_steps": runner.num_eager_steps,
            "num_preemptions": engine.scheduler.num_preemptions_total,
        }
        engine.close()
    print(json.dumps(report))  # noqa: T201 (its parent reads it)


if __name__ == "__main__":
    main()
