"""What a decode step costs in Python: scheduling, bookkeeping and messages, without the model.

    python benchmarks/host_overhead.py [--rows 1 32 256] [--steps 400] [--repeats 5] [--output FILE]

A runner that returns canned tokens takes the model's place. Steps overlap, as on a GPU, whose own
time hides this one as long as it is longer. Microseconds a step, the best of the repeats, of:

    step      the whole of StepPipeline.step, which is: schedule, launch and sample (nothing here),
              and the three that follow
    schedule  Scheduler.schedule
    update    Scheduler.update
    reads     step_reads: the counts of what attention read
    message   statistics and the message to the API process, encoded
    text      OutputProcessor.process of all rows: in the API process, or in LLM.generate

Prints a table and writes benchmarks/results/host-overhead.json.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from cpu import commit, machine
from workload import ROOT

from nsa_kernels.spec import NSASpec
from nsa_serve.cache_reads import ReadCosts, step_reads
from nsa_serve.config import EngineConfig
from nsa_serve.ipc import make_frame
from nsa_serve.messages import EngineStats, StepOutputs
from nsa_serve.model_source import load_tokenizer
from nsa_serve.output import OutputProcessor
from nsa_serve.page_pool import PagePool
from nsa_serve.request import EngineRequest, Request, SamplingParams, TokenOutput
from nsa_serve.sampler import SamplingFailure
from nsa_serve.scheduler import SampledToken, Scheduler, SchedulerOutput
from nsa_serve.step_pipeline import StepPipeline

_PAGE_SIZE = 16
_PROMPT_LEN = 2048
_SPEC = NSASpec(cmp_len=16, cmp_stride=16, block_size=_PAGE_SIZE, num_selected_blocks=16)
PARTS = ("step", "schedule", "update", "reads", "message", "text")


@dataclass(slots=True)
class CannedStep:
    """A step whose tokens are known before it ran."""

    scheduled: SchedulerOutput
    needs_history: bool = False


class CannedRunner:
    """Takes no time; every row samples the same token."""

    def __init__(self) -> None:
        self._token = SampledToken(11)

    def launch(self, output: SchedulerOutput) -> CannedStep:
        return CannedStep(output)

    def sample(self, step: CannedStep) -> None:
        """Do nothing."""

    def result(self, step: CannedStep) -> dict[str, SampledToken | SamplingFailure]:
        token = self._token
        return {row.request.request_id: token for row in step.scheduled.rows if row.samples}

    def reset(self) -> None:
        """Do nothing."""


def make_pipeline(num_rows: int, num_steps: int) -> StepPipeline[CannedStep]:
    """Return requests whose prompts were run, `num_rows` of them, with `num_steps` to go."""
    length = _PROMPT_LEN + num_steps + 64
    pool = PagePool(num_rows * (length // _PAGE_SIZE + 1) + 1, _PAGE_SIZE)
    scheduler = Scheduler(
        pool,
        max_num_seqs=num_rows,
        max_num_batched_tokens=8192,
        max_model_len=length,
        eos_token_ids=(0,),
    )
    costs = ReadCosts(spec=_SPEC, key_bytes=1024, value_bytes=1024)
    pipeline = StepPipeline(scheduler, CannedRunner(), costs, is_overlapped=True)
    for number in range(num_rows):
        scheduler.add(Request(make_message(number)))
    while scheduler.num_waiting or pipeline.num_step_tokens != num_rows:
        pipeline.step()
    return pipeline


def make_message(number: int) -> EngineRequest:
    """Return a request of a prompt that no other has."""
    return EngineRequest(
        request_id=f"{number}-0-9f3c1b7e5a2d4c8fb6e0d1a2b3c4d5e6",
        prompt_token_ids=[number + 1, *range(1, _PROMPT_LEN)],
        params=SamplingParams(max_tokens=None, temperature=0.0),
    )


def time_per_step(run: Callable[[], object], num_steps: int) -> float:
    """Return the mean microseconds of a call."""
    start = time.perf_counter()
    for _ in range(num_steps):
        run()
    return (time.perf_counter() - start) / num_steps * 1e6


def measure(num_rows: int, num_steps: int) -> dict[str, float]:
    """Time every part once."""
    pipeline = make_pipeline(num_rows, num_steps)
    times = {"step": time_per_step(pipeline.step, num_steps)}
    times |= measure_scheduler(num_rows, num_steps)
    outputs = pipeline.step()
    times["message"] = measure_message(pipeline, outputs, num_steps)
    times["text"] = measure_text(outputs, num_steps)
    return times


def measure_scheduler(num_rows: int, num_steps: int) -> dict[str, float]:
    """Time the calls that a step makes, each by itself."""
    pipeline = make_pipeline(num_rows, num_steps)
    while pipeline.has_step_in_flight:
        pipeline.is_overlapped = False
        pipeline.step()
    scheduler, runner, costs = pipeline.scheduler, CannedRunner(), pipeline._costs
    clock = time.perf_counter
    totals = [0.0, 0.0, 0.0]
    previous = scheduler.schedule()
    for _ in range(num_steps):
        start = clock()
        output = scheduler.schedule()
        scheduled = clock()
        tokens: Any = runner.result(CannedStep(previous))
        ran = clock()
        scheduler.update(previous, tokens)
        updated = clock()
        step_reads(previous, costs)
        for index, value in enumerate((scheduled - start, updated - ran, clock() - updated)):
            totals[index] += value
        previous = output
    names = ("schedule", "update", "reads")
    return {name: total / num_steps * 1e6 for name, total in zip(names, totals, strict=True)}


def measure_message(
    pipeline: StepPipeline[CannedStep], outputs: list[TokenOutput], num_steps: int
) -> float:
    """Time what the engine process does with a step's outputs, but for the write itself."""
    encoder = msgspec.msgpack.Encoder()
    pool, scheduler = pipeline.scheduler.pool, pipeline.scheduler

    def send() -> None:
        stats = EngineStats(
            num_steps_total=pipeline.num_steps,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_free_pages=pool.num_free_pages,
            num_pages=pool.num_pages,
            num_step_tokens=pipeline.num_step_tokens,
            decode_reads=pipeline.decode_reads,
            prefill_reads=pipeline.prefill_reads,
        )
        make_frame(encoder.encode(StepOutputs(outputs, stats)))

    return time_per_step(send, num_steps)


def measure_text(outputs: list[TokenOutput], num_steps: int) -> float:
    """Time what becomes of a step's outputs: text and `RequestOutput`s."""
    processor = OutputProcessor(load_tokenizer(EngineConfig()))
    for index, output in enumerate(outputs):
        message = make_message(index)
        processor.add(
            output.request_id,
            index=0,
            prompt_token_ids=message.prompt_token_ids,
            params=message.params,
        )

    def process() -> None:
        for output in outputs:
            processor.process(output)

    return time_per_step(process, num_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "host-overhead.json"
    )
    options = parser.parse_args()
    cases = []
    print("microseconds a step", *(f"{part:>9}" for part in PARTS))
    for num_rows in options.rows:
        runs = [measure(num_rows, options.steps) for _ in range(options.repeats)]
        best = {part: round(min(run[part] for run in runs), 1) for part in PARTS}
        cases.append({"num_rows": num_rows, "us_per_step": best})
        print(f"{num_rows:>14} rows", *(f"{best[part]:9.1f}" for part in PARTS))
    result = {
        "command": "python benchmarks/host_overhead.py",
        "machine": machine(),
        "commit": commit(),
        "num_steps": options.steps,
        "num_repeats": options.repeats,
        "prompt_len": _PROMPT_LEN,
        "cases": cases,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
