"""Decode and prefill speed of the GPU engine, through LLM.generate: random weights, random prompts.

    python benchmarks/gpu_decode.py [--model a|b|moe] [--cells 2048x1 ...] [--out FILE]
                                    [--option quantization=fp8] [--tiny]

A decode cell is a context and a number of rows. Its prompts are put into the prefix cache by a
first call; then ms a step = (time of 129 tokens - time of 1 token) / 128, greedy, the medians of
the repeats. Both times begin with the same work of the host, which hashes the prompts for tens of
milliseconds, so they are taken in turns, the order changing from repeat to repeat; the least and
the largest difference of a turn are the spread. Beside it the median and the 99th percentile of the
time between two calls of the engine's step that decode, in the same runs. Rows share nothing with
one another; a row's prompt in a short context is the start of its prompt in a long one.

The byte floor of a cell is what its step has to read at the memory's rate: weights (of experts,
those that so many rows are expected to use) and cache; the weight floor is without the cache.

Prefill is whole prompts that no cache knows and one token each: tokens/s of the whole call.

The result is written after every cell.
"""

import gc
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from gpu_common import (
    device_options,
    engine_options,
    environment,
    make_parser,
    make_prompt,
    median,
    percentile,
    resolve_device,
    time_s,
    write_result,
)
from gpu_models import (
    BYTES_PER_S,
    MODELS,
    BenchModel,
    expected_experts,
    step_cache_bytes,
    step_weight_bytes,
    write_model,
)

from nsa_serve.config import EngineConfig, make_config
from nsa_serve.engine import Engine
from nsa_serve.llm import LLM
from nsa_serve.messages import EngineInfo
from nsa_serve.model_source import load_tokenizer, resolve_model
from nsa_serve.models.families import load_model_config
from nsa_serve.request import EngineRequest, RequestOutput, SamplingParams, TokenOutput

NUM_TOKENS = 129
_TINY_CELLS = ((64, 1), (64, 3), (130, 3))


class TimedEngine:
    """An engine that notes when each step returned, and how many tokens it brought."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.returns: list[tuple[float, int]] = []

    @property
    def info(self) -> EngineInfo:
        return self._engine.info

    @property
    def num_graph_replays(self) -> int | None:
        """Steps that were replayed from a CUDA graph; None where there are no graphs."""
        return self._engine.stats.num_graph_replays_total

    @property
    def has_unfinished(self) -> bool:
        return self._engine.has_unfinished

    def add(self, request: EngineRequest) -> None:
        self._engine.add(request)

    def abort(self, request_ids: Sequence[str]) -> None:
        self._engine.abort(request_ids)

    def step(self) -> list[TokenOutput]:
        outputs = self._engine.step()
        self.returns.append((time.perf_counter(), len(outputs)))
        return outputs

    def close(self) -> None:
        self._engine.close()


def step_gaps_s(returns: Sequence[tuple[float, int]], num_rows: int) -> list[float]:
    """Return the seconds between steps that follow each other and brought a token for every row."""
    return [
        later - earlier
        for (earlier, first), (later, second) in pairwise(returns)
        if first == second == num_rows
    ]


def step_ms(
    first_s: Sequence[float], whole_s: Sequence[float], num_steps: int
) -> tuple[float, tuple[float, float]]:
    """Return ms a step from the medians, and the least and largest of the repeats' own.

    first_s, whole_s: seconds of each repeat without and with these steps.
    """
    ms = (median(whole_s) - median(first_s)) / num_steps * 1e3
    each = [(b - a) / num_steps * 1e3 for a, b in zip(first_s, whole_s, strict=True)]
    return ms, (min(each), max(each))


def greedy(num_tokens: int) -> SamplingParams:
    """Return parameters for exactly so many likeliest tokens."""
    return SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)


def sampled(num_tokens: int) -> SamplingParams:
    """Return parameters for exactly so many tokens that are drawn."""
    return SamplingParams(
        max_tokens=num_tokens, temperature=0.8, top_p=0.95, seed=1, ignore_eos=True
    )


class DecodeBench:
    """One engine and the prompts of its rows."""

    def __init__(self, model: BenchModel, config: EngineConfig, *, repeats: int) -> None:
        self.model = model
        self.repeats = repeats
        self.engine = TimedEngine(Engine(config))
        self.llm = LLM.from_engine(self.engine, load_tokenizer(config))
        self.info = self.engine.info
        self.loaded = load_model_config(resolve_model(config))
        self.element_bytes = 1 if config.kv_cache_dtype == "fp8" else 2
        self._prompts: list[list[int]] = []

    def floors_ms(self, context: int, num_rows: int) -> tuple[float, float]:
        """Return the least ms of a step: by its weights, and by its weights and cache."""
        weights = step_weight_bytes(self.loaded, self.info.weight_bytes, num_rows)
        cache = step_cache_bytes(self.loaded, context, element_bytes=self.element_bytes)
        scale = 1e3 / BYTES_PER_S
        return weights * scale, (weights + num_rows * cache) * scale

    def prompts(self, context: int, num_rows: int, longest: int) -> list[list[int]]:
        """Return the prompts of a cell; of no row more than `longest` tokens will be asked."""
        for row in range(len(self._prompts), num_rows):
            self._prompts.append(make_prompt(row, longest, self.info.vocab_size))
        return [prompt[:context] for prompt in self._prompts[:num_rows]]

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[RequestOutput]:
        """Run the prompts at once."""
        return self.llm.generate(prompts, params, use_tqdm=False)

    def decode(
        self, prompts: list[list[int]], *, num_tokens: int, num_sampled: int = 0
    ) -> dict[str, Any]:
        """Measure a cell; `num_sampled` of its rows are not greedy."""
        context, num_rows = len(prompts[0]), len(prompts)
        kinds = [sampled if row < num_sampled else greedy for row in range(num_rows)]
        start = time.perf_counter()
        self.generate(prompts, greedy(1))
        fill_s = time.perf_counter() - start
        # The path of this cell once, unmeasured: what is compiled or first touched is not timed.
        self.generate(prompts, [kind(min(8, num_tokens)) for kind in kinds])
        times: dict[int, list[float]] = {1: [], num_tokens: []}
        gaps_s: list[float] = []
        hits = context
        replays = self.engine.num_graph_replays
        for repeat in range(self.repeats):
            for count in (1, num_tokens) if repeat % 2 == 0 else (num_tokens, 1):
                params = [kind(count) for kind in kinds]
                outputs: list[RequestOutput] = []
                self.engine.returns.clear()
                times[count].append(time_s(lambda: outputs.extend(self.generate(prompts, params))))  # noqa: B023
                gaps_s += step_gaps_s(self.engine.returns, num_rows)
                hits = min(hits, *(output.num_prefix_hit_tokens for output in outputs))
                if any(len(output.token_ids) != count for output in outputs):
                    raise SystemExit("a row ended early: the times are not those of the cell")
        first_s, whole_s = times[1], times[num_tokens]
        if replays is not None:
            replays = (self.engine.num_graph_replays or 0) - replays
            if replays < self.repeats * (num_tokens - 1):
                print(f"warning: only {replays} steps were replayed from a graph", flush=True)
        # The last page of a prompt always runs again, and a page may be as long as the prompt.
        if hits < context - 2 * self.info.page_size:
            print(f"warning: {hits} of {context} prompt tokens were cached", flush=True)
        ms, spread = step_ms(first_s, whole_s, num_tokens - 1)
        gap_ms = [gap * 1e3 for gap in gaps_s]
        moe = self.loaded.moe
        weight_floor_ms, byte_floor_ms = self.floors_ms(context, num_rows)
        return {
            "context": context,
            "rows": num_rows,
            "num_sampled": num_sampled,
            "ms_per_step": ms,
            "ms_per_step_min": spread[0],
            "ms_per_step_max": spread[1],
            "tokens_per_s": num_rows / ms * 1e3,
            "of_weight_floor": weight_floor_ms / ms,
            "byte_floor_ms": byte_floor_ms,
            "of_byte_floor": byte_floor_ms / ms,
            "expected_experts": moe and expected_experts(moe, num_rows),
            "step_ms_p50": percentile(gap_ms, 50),
            "step_ms_p99": percentile(gap_ms, 99),
            "longest_steps_ms": sorted(gap_ms)[-6:],
            "first_s": first_s,
            "whole_s": whole_s,
            "num_tokens": num_tokens,
            "fill_s": fill_s,
            "num_prefix_hit_tokens": hits,
            "num_graph_replays": replays,
        }

    def prefill(self, context: int, num_rows: int) -> dict[str, Any]:
        """Measure prompts that no cache knows."""
        vocab_size = self.info.vocab_size
        seconds = []
        # The first, of its own prompts too, is not counted.
        for repeat in range(self.repeats + 1):
            seed = f"{context}x{num_rows}/{repeat}"
            prompts = [make_prompt(row, context, vocab_size, seed=seed) for row in range(num_rows)]
            outputs: list[RequestOutput] = []
            elapsed = time_s(lambda: outputs.extend(self.generate(prompts, greedy(1))))  # noqa: B023
            if any(output.num_prefix_hit_tokens for output in outputs):
                raise SystemExit("a prompt was cached that never ran before")
            if repeat:
                seconds.append(elapsed)
        return {
            "context": context,
            "rows": num_rows,
            "seconds": seconds,
            "tokens_per_s": context * num_rows / median(seconds),
        }


def fits(info: EngineInfo, context: int, num_rows: int, num_tokens: int) -> str | None:
    """Return why a cell cannot be measured with what was loaded; None when it can."""
    if num_rows > info.max_num_seqs:
        return f"{num_rows} rows, max_num_seqs {info.max_num_seqs}"
    if context + num_tokens > info.max_model_len:
        return f"{context} + {num_tokens} tokens, max_model_len {info.max_model_len}"
    needed = num_rows * (-(-(context + num_tokens) // info.page_size) + 1)
    return f"{needed} pages, the cache has {info.num_pages}" if needed > info.num_pages else None


def parse_cell(text: str) -> tuple[int, int]:
    """Read CONTEXTxROWS; a context may end in k, of 1024. Raises ValueError."""
    context, _, rows = text.lower().partition("x")
    factor = 1024 if context.endswith("k") else 1
    return int(context.removesuffix("k")) * factor, int(rows)


def bars_of(model: BenchModel, cell: tuple[int, int]) -> dict[str, float | None]:
    """Return what a decode cell is to reach and what the dense twin takes, in ms."""
    if cell not in model.cells or not model.bars:
        return {"bar_ms": None, "dense_ms": None}
    index = model.cells.index(cell)
    return {"bar_ms": model.bars[index], "dense_ms": model.dense[index]}


def show(kind: str, row: dict[str, Any]) -> None:
    """Print a row of the result."""
    name = f"{kind} {row['context']} x {row['rows']}"
    if row.get("skipped"):
        print(f"{name}: skipped, {row['skipped']}", flush=True)
    elif kind == "prefill":
        bar = row["bar_tokens_per_s"]
        print(f"{name}: {row['tokens_per_s']:,.0f} tokens/s (bar {bar})", flush=True)
    else:
        extra = f", {row['num_sampled']} sampled" if row["num_sampled"] else ""
        p50, p99 = (row[f"step_ms_{q}"] or 0.0 for q in ("p50", "p99"))
        print(
            f"{name}{extra}: {row['ms_per_step']:.3f} ms a step (repeats "
            f"{row['ms_per_step_min']:.3f} to {row['ms_per_step_max']:.3f}, p50 {p50:.3f}, "
            f"p99 {p99:.3f}; bar {row['bar_ms']}), {row['of_weight_floor']:.0%} of the weight "
            f"floor, {row['of_byte_floor']:.0%} of the byte floor ({row['byte_floor_ms']:.2f} ms), "
            f"filled in {row['fill_s']:.1f} s",
            flush=True,
        )


def run(options: Any, folder: Path) -> dict[str, Any]:
    """Load the engine and measure every cell."""
    model = MODELS[options.model]
    device = resolve_device(options.device)
    cells = options.cells or (_TINY_CELLS if options.tiny else model.cells)
    prefills = tuple(model.prefill) if not options.tiny else ((96, 3), (500, 1))
    num_tokens = min(options.tokens, 9) if options.tiny else options.tokens
    longest = max(context for context, _ in (*cells, *prefills))
    settings = {
        **device_options(device, options.utilization),
        "model": str(write_model(folder / model.name, model.name, is_tiny=options.tiny)),
        "load_format": "dummy",
        "max_model_len": longest + num_tokens + 128,
        "max_num_seqs": max(rows for _, rows in (*cells, *prefills)),
        **engine_options(options.option),
    }
    start = time.perf_counter()
    bench = DecodeBench(model, make_config(EngineConfig, settings), repeats=options.repeats)
    info = bench.info
    result: dict[str, Any] = {
        "bench": "gpu-decode",
        **environment(options.commit),
        "model": model.name,
        "title": model.title,
        "settings": {name: value for name, value in settings.items() if name != "model"},
        "load_s": time.perf_counter() - start,
        "phase_s": info.phase_s,
        "weight_bytes": info.weight_bytes,
        "num_parameters": info.num_parameters,
        "cache_tokens": info.num_pages * info.page_size,
        "cache_bytes_per_token": sum(
            part.bytes_per_token for part in info.cache if part.max_tokens is None
        ),
        "weight_floor_ms": bench.floors_ms(0, min(rows for _, rows in cells))[0],
        "repeats": options.repeats,
        "decode": [],
        "prefill": [],
    }
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in info.phase_s.items())
    print(f"loaded in {result['load_s']:.1f} s ({phases}); {result['cache_tokens']:,} tokens fit")
    gc.collect()
    gc.freeze()  # what was loaded is not walked again
    if not options.no_prefill:
        measure_prefill(bench, prefills, result, out=options.out)
    for context, num_rows in cells:
        row: dict[str, Any] = {"context": context, "rows": num_rows}
        reason = fits(info, context, num_rows, num_tokens)
        bars = bars_of(model, (context, num_rows))
        if reason is None:
            prompts = bench.prompts(context, num_rows, longest)
            # One sampled row takes the batch off the greedy path: once for each batch size.
            for num_sampled in (0, 1) if context == min(c for c, _ in cells) else (0,):
                row = bench.decode(prompts, num_tokens=num_tokens, num_sampled=num_sampled)
                result["decode"].append({**row, **bars})
                show("decode", result["decode"][-1])
        else:
            nothing = dict.fromkeys(("ms_per_step", "tokens_per_s", "of_byte_floor"))
            result["decode"].append({**row, **nothing, **bars, "skipped": reason})
            show("decode", result["decode"][-1])
        write_result(options.out, result)
    bench.llm.close()
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def measure_prefill(
    bench: DecodeBench,
    cells: Sequence[tuple[int, int]],
    result: dict[str, Any],
    *,
    out: Path | None,
) -> None:
    """Measure the prefill cells into the result."""
    for context, num_rows in cells:
        bar, dense = bench.model.prefill.get((context, num_rows), (None, None))
        bars = {"bar_tokens_per_s": bar, "dense_tokens_per_s": dense}
        reason = fits(bench.info, context, num_rows, 1)
        if reason is None:
            row = bench.prefill(context, num_rows)
        else:
            row = {"context": context, "rows": num_rows, "skipped": reason}
        result["prefill"].append({**row, **bars})
        show("prefill", result["prefill"][-1])
        write_result(out, result)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=["a", "b", "moe"], default="a")
    parser.add_argument("--cells", nargs="+", type=parse_cell, help="such as 2048x1 64kx32")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-prefill", action="store_true", help="decode only")
    parser.add_argument("--utilization", type=float, help="gpu_memory_utilization (0.94)")
    options = parser.parse_args()
    if options.utilization is None:
        options.utilization = 0.94
    with tempfile.TemporaryDirectory() as temporary:
        result = run(options, Path(temporary))
    write_result(options.out, result)
    print(f"{result['seconds']} s in all")


if __name__ == "__main__":
    main()
