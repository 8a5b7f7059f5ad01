"""What structured output costs a decode step: rows with a grammar against rows without.

    python benchmarks/structured.py [--rows 16] [--steps 100] [--repeats 3] [--output FILE]

The engine runs in this process, greedy, prompts of 128 tokens. Prints the median step of each
case, and what of it is masks: to compute them (beside the forward pass), to wait for them, to
apply them. Writes benchmarks/results/structured.json and docs/performance.md.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from cpu import commit, machine
from report import write_report
from workload import ROOT, documentation_text

from nsa_serve.config import EngineConfig, make_config, num_usable_cpus
from nsa_serve.engine import Engine
from nsa_serve.exclusions import apply_bitmask
from nsa_serve.model_source import load_tokenizer
from nsa_serve.request import EngineRequest, SamplingParams, StructuredOutput
from nsa_serve.structured.grammar import json_schema, regex
from nsa_serve.structured.masks import GrammarMasks, StepMasks

_PROMPT_LEN = 128
_PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 5},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
# None of them can end within the steps that are measured.
CASES: dict[str, StructuredOutput | None] = {
    "none": None,
    "json_schema": json_schema(
        {"type": "array", "items": _PERSON, "minItems": 1000}, param="schema"
    ),
    "regex": regex(r"([A-Z][a-z]{2,9} ){1000}", param="regex"),
}


class MaskTimes:
    """Seconds spent on masks, a number a step."""

    def __init__(self) -> None:
        self.compute_s: list[float] = []
        self.wait_s: list[float] = []
        self.apply_s: list[float] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Time the engine's own functions."""
        compute, start = GrammarMasks._compute, GrammarMasks.start
        times = self

        def timed_compute(self: GrammarMasks, *arguments: object) -> StepMasks:
            with timed(times.compute_s):
                return compute(self, *arguments)  # type: ignore[arg-type]

        def timed_start(self: GrammarMasks, requests: object) -> "_TimedFuture | None":
            future = start(self, requests)  # type: ignore[arg-type]
            return None if future is None else _TimedFuture(future, times.wait_s)

        def timed_apply(*arguments: object) -> None:
            with timed(times.apply_s):
                apply_bitmask(*arguments)  # type: ignore[arg-type]

        with (
            mock.patch.object(GrammarMasks, "_compute", timed_compute),
            mock.patch.object(GrammarMasks, "start", timed_start),
            mock.patch("nsa_serve.exclusions.apply_bitmask", timed_apply),
        ):
            yield


class _TimedFuture:
    def __init__(self, future: "Future[StepMasks]", wait_s: list[float]) -> None:
        self._future = future
        self._wait_s = wait_s

    def result(self) -> StepMasks:
        with timed(self._wait_s):
            return self._future.result()


@contextmanager
def timed(seconds: list[float]) -> Iterator[None]:
    """Append how long the context took."""
    start_s = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - start_s)


def measure(
    engine: Engine, prompts: list[list[int]], structured: StructuredOutput | None, num_steps: int
) -> tuple[list[float], MaskTimes]:
    """Return the seconds of `num_steps` decode steps, in which every prompt is a row."""
    # The rows that are first decode while the others' prompts run.
    params = SamplingParams(
        max_tokens=num_steps + _PROMPT_LEN, temperature=0.0, ignore_eos=True, structured=structured
    )
    for i, prompt in enumerate(prompts):
        engine.add(EngineRequest(request_id=str(i), prompt_token_ids=prompt, params=params))
    steps_s: list[float] = []
    times = MaskTimes()
    num_decoding = 0
    while num_decoding < len(prompts):
        num_decoding = len(engine.step())
    with times.recorded():
        for _ in range(num_steps):
            with timed(steps_s):
                outputs = engine.step()
            if len(outputs) != len(prompts) or any(output.error for output in outputs):
                raise SystemExit(f"a row ended early: {outputs}")
    engine.abort([str(i) for i in range(len(prompts))])
    return steps_s, times


def main() -> None:
    """Run every case `repeats` times, in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-nsa")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=num_usable_cpus())
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "structured.json"
    )
    options = parser.parse_args()
    config = make_config(
        EngineConfig,
        {
            "model": options.model,
            "max_num_seqs": options.rows,
            "num_threads": options.threads,
            "page_memory": "1GiB",
            "max_model_len": 2048,
            "enable_prefix_caching": False,
        },
    )
    engine = Engine(config)
    ids = load_tokenizer(config).encode(documentation_text(), add_special_tokens=False)
    prompts = [ids[211 * i :][:_PROMPT_LEN] for i in range(options.rows)]
    steps: dict[str, list[float]] = {name: [] for name in CASES}
    masks = {name: MaskTimes() for name in CASES}
    for _ in range(options.repeats):
        for name, structured in CASES.items():
            steps_s, times = measure(engine, prompts, structured, options.steps)
            steps[name] += steps_s
            for field in ("compute_s", "wait_s", "apply_s"):
                getattr(masks[name], field).extend(getattr(times, field))
    engine.close()
    report(steps, masks, options)


def report(
    steps: dict[str, list[float]], masks: dict[str, MaskTimes], options: argparse.Namespace
) -> None:
    """Print the medians in milliseconds, and write them down."""
    cases = {
        name: {
            "step_ms": _median_ms(steps[name]),
            "masks_ms": _median_ms(masks[name].compute_s),
            "wait_ms": _median_ms(masks[name].wait_s),
            "apply_ms": _median_ms(masks[name].apply_s),
        }
        for name in steps
    }
    print(
        f"{options.rows} rows, {len(steps['none'])} steps a case, torch {torch.__version__}, "
        f"{options.threads} threads"
    )
    print(f"{'case':<12} {'step':>8} {'masks':>8} {'wait':>8} {'apply':>8}  ms (medians)")
    for name, row in cases.items():
        print(f"{name:<12} " + " ".join(f"{value:8.3f}" for value in row.values()))
    result = {
        "command": f"python benchmarks/structured.py --rows {options.rows} "
        f"--steps {options.steps} --repeats {options.repeats}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "torch": torch.__version__,
        "model": options.model,
        "rows": options.rows,
        "threads": options.threads,
        "cases": cases,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    write_report()


def _median_ms(seconds: list[float]) -> float:
    return round(1000 * statistics.median(seconds), 3) if seconds else 0.0


if __name__ == "__main__":
    main()
