"""Where a step's time goes on the GPU: the kernels of steady decode steps and of a prefill chunk.

    python benchmarks/gpu_profile.py [--model a|b] [--rows 1 8 32] [--context 2048] [--steps 20]
                                     [--traces FOLDER] [--out FILE] [--tiny]

Works on the Engine in this process: no server, no nsys. The wall time of a step is taken first,
without the profiler, over the same number of steps; then torch.profiler records as many. Every
figure is a step's, of prefill a step of one chunk of `--chunk` tokens, of one prompt or of four.
"""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_common import (
    device_options,
    engine_options,
    environment,
    make_parser,
    make_prompt,
    median,
    resolve_device,
    synchronize,
    write_result,
)
from gpu_models import BYTES_PER_S, MODELS, step_weight_bytes, write_model
from trace_stats import DEVICE_CATEGORIES, Span, read_trace, summarize, table

from nsa_serve.config import EngineConfig, make_config
from nsa_serve.engine import Engine
from nsa_serve.model_source import resolve_model
from nsa_serve.models.families import load_model_config
from nsa_serve.request import EngineRequest, SamplingParams

# Steps after the last prefill, before anything is timed: graphs and clocks settle.
_WARM_STEPS = 10
_TOP = 40
_names = itertools.count()


def start_profiler() -> None:
    """Use the profiler once: graphs that are captured after it are traced kernel by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
        torch.zeros(1, device="cuda")
        torch.cuda.synchronize()


@contextmanager
def timed_calls(owner: object, name: str) -> Iterator[list[float]]:
    """Collect the seconds that each call of a method takes."""
    real, seconds = getattr(owner, name), []

    def call(*arguments: Any) -> Any:
        start = time.perf_counter()
        result = real(*arguments)
        seconds.append(time.perf_counter() - start)
        return result

    setattr(owner, name, call)
    try:
        yield seconds
    finally:
        setattr(owner, name, real)


class ProfileBench:
    """An engine, and the steps that are looked at."""

    def __init__(self, engine: Engine, *, traces: Path) -> None:
        self.engine = engine
        self.traces = traces
        self.on_gpu = engine.info.device != "cpu"

    def add(self, prompt: list[int], num_tokens: int) -> str:
        """Queue a greedy request of exactly so many tokens; return its id."""
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        request_id = f"profile-{next(_names)}"
        self.engine.add(
            EngineRequest(request_id=request_id, prompt_token_ids=prompt, params=params)
        )
        return request_id

    def run_all(self) -> None:
        """Step until nothing is left."""
        while self.engine.has_unfinished:
            self.engine.step()
        synchronize()

    def trace(self, name: str, run: Callable[[], object]) -> list[Span]:
        """Return what ran on the device (on a CPU: torch's operators) during `run`."""
        activity = torch.profiler.ProfilerActivity
        activities = [activity.CUDA] if self.on_gpu else [activity.CPU]
        path = self.traces / f"{name}.json"
        synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            run()
            synchronize()
        profile.export_chrome_trace(str(path))
        return read_trace(path, DEVICE_CATEGORIES if self.on_gpu else frozenset({"cpu_op"}))

    def decode(self, num_rows: int, context: int, num_steps: int) -> dict[str, Any]:
        """Profile steps in which every row decodes."""
        vocab_size = self.engine.info.vocab_size
        # One more run of steps than is used, so that no row ends while it is looked at.
        num_tokens = 3 * num_steps + 2 * _WARM_STEPS
        for row in range(num_rows):
            prompt = make_prompt(row, context, vocab_size, seed=f"decode-{num_rows}")
            self.add(prompt, num_tokens)
        # The prompts, then a few steps; a prompt may take several steps.
        started: set[str] = set()
        while len(started) < num_rows:
            started |= {output.request_id for output in self.engine.step()}
        self._steps(_WARM_STEPS)
        synchronize()
        start = time.perf_counter()
        self._steps(num_steps)
        synchronize()
        wall_us = (time.perf_counter() - start) / num_steps * 1e6
        name = f"decode-{num_rows}x{context}"
        spans = self.trace(name, lambda: self._steps(num_steps))
        stats = summarize(spans, num_steps, wall_us, num_top=_TOP)
        assert self.engine.stats.num_running == num_rows, "a row ended while it was looked at"
        self.run_all()
        return {"rows": num_rows, "context": context, **stats}

    def prefill(
        self, chunk: int, context: int, num_prompts: int = 1, repeats: int = 3
    ) -> dict[str, Any]:
        """Profile a step of one chunk: of one prompt after `context` tokens, or of several.

        launch_us: what the host takes to launch it; the GPU waits where that is longer than its
        own time.
        """
        walls, launches = [], []
        for number in range(repeats + 1):
            self._start_prompts(chunk, context, num_prompts, f"prefill-{number}")
            synchronize()
            with timed_calls(self.engine.runner, "launch") as seconds:
                start = time.perf_counter()
                self.run_all()
                walls.append((time.perf_counter() - start) * 1e6)
            launches.append(seconds[0] * 1e6)
        self._start_prompts(chunk, context, num_prompts, "prefill-traced")
        spans = self.trace(f"prefill-{chunk}at{context}x{num_prompts}", self.run_all)
        # The first run may compile.
        stats = summarize(spans, 1, median(walls[1:]), num_top=_TOP)
        sizes = {"tokens": chunk, "context": context, "prompts": num_prompts}
        return {**sizes, "launch_us": median(launches[1:]), **stats}

    def _start_prompts(self, chunk: int, context: int, num_prompts: int, seed: str) -> None:
        """Queue prompts that are a chunk together: what goes before is in the prefix cache."""
        num_tokens = chunk // num_prompts
        for number in range(num_prompts):
            prompt = make_prompt(
                number, context + num_tokens, self.engine.info.vocab_size, seed=f"{seed}-{chunk}"
            )
            if context:
                self.add(prompt[:context], 1)
                self.run_all()
            self.add(prompt, 1)

    def _steps(self, count: int) -> None:
        for _ in range(count):
            self.engine.step()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=["a", "b", "moe"], default="a")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--traces", type=Path, help="keep the Chrome traces in this folder")
    options = parser.parse_args()
    if options.tiny:
        options.rows, options.context, options.steps, options.chunk = [1, 3], 64, 3, 200
    model = MODELS[options.model]
    # As much again for the prompt that stands before a chunk.
    longest = max(options.context, 2 * options.chunk)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        traces = options.traces or folder
        traces.mkdir(parents=True, exist_ok=True)
        device = resolve_device(options.device)
        if device == "cuda":
            start_profiler()
        settings = {
            **device_options(device),
            "model": str(write_model(folder / model.name, model.name, is_tiny=options.tiny)),
            "load_format": "dummy",
            "max_model_len": longest + 4 * options.steps + 4 * _WARM_STEPS,
            "max_num_seqs": max(4, *options.rows),
            "max_num_batched_tokens": options.chunk,
            **engine_options(options.option),
        }
        config = make_config(EngineConfig, settings)
        loaded = load_model_config(resolve_model(config))
        bench = ProfileBench(Engine(config), traces=traces)
        weight_bytes = bench.engine.info.weight_bytes
        result: dict[str, Any] = {
            "bench": "gpu-profile",
            **environment(options.commit),
            "model": model.name,
            "title": model.title,
            "settings": {name: value for name, value in settings.items() if name != "model"},
            "weight_floor_us": step_weight_bytes(loaded, weight_bytes) / BYTES_PER_S * 1e6,
            "decode": [],
            "prefill": [],
        }
        for num_rows in options.rows:
            stats = bench.decode(num_rows, options.context, options.steps)
            result["decode"].append(stats)
            floor = step_weight_bytes(loaded, weight_bytes, num_rows) / BYTES_PER_S * 1e6
            print(f"decode {options.context} x {num_rows} (weights alone: {floor:.0f} us)")
            print(table(stats), flush=True)
            write_result(options.out, result)
        for context, num_prompts in ((0, 1), (options.chunk, 1), (0, 4)):
            stats = bench.prefill(options.chunk, context, num_prompts)
            result["prefill"].append(stats)
            print(
                f"prefill of {options.chunk} tokens after {context}, prompts: {num_prompts}; "
                f"launched in {stats['launch_us']:.0f} us"
            )
            print(table(stats), flush=True)
            write_result(options.out, result)
        bench.engine.close()


if __name__ == "__main__":
    main()
