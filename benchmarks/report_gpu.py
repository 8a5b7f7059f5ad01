"""The GPU engine's part of docs/performance.md, from benchmarks/results/gpu-*.json."""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

HOW_TO_RUN = """\
On a machine with the GPU, from the repository's root; each writes its result after every part:

```console
$ for m in a b moe; do python benchmarks/gpu_decode.py --model $m \\
    --out benchmarks/results/gpu-decode-$m.json; done
$ for m in a b; do python benchmarks/gpu_profile.py --model $m \\
    --out benchmarks/results/gpu-profile-$m.json; done
$ python benchmarks/serve.py --model a --out benchmarks/results/gpu-serve-a.json \\
    --plot benchmarks/results/gpu-serve-a.png
$ for m in b moe; do python benchmarks/gpu_start.py --model $m \\
    --out benchmarks/results/gpu-start-$m.json; done
$ python benchmarks/gpu_fla.py --out benchmarks/results/gpu-fla.json
$ python benchmarks/gpu_models.py models --models a --tiny
$ python benchmarks/soak.py --model models/a --minutes 10 --clients 64 --page-memory 4MiB \\
    --out benchmarks/results/gpu-soak.json -- --device cuda --load-format dummy
$ python benchmarks/report.py
```

`make bench-gpu` runs them all. With `--tiny` each is a trial of a minute that needs no GPU.
"""


def gpu_section(results: Path) -> str:
    """Return the Markdown of the GPU engine's results that are there; empty without any."""
    parts: tuple[tuple[str, Callable[[list[dict[str, Any]], list[Path]], str]], ...] = (
        ("gpu-decode*.json", _speed),
        ("gpu-profile*.json", _profile),
        ("gpu-serve*.json", _serving),
        ("gpu-referee.json", _referee),
        ("gpu-start*.json", _start),
        ("gpu-fla*.json", _fla),
        ("gpu-soak*.json", _soak),
    )
    texts = []
    for pattern, write in parts:
        paths = sorted(results.glob(pattern))
        if paths:
            texts.append(write([json.loads(path.read_text()) for path in paths], paths))
    if not texts:
        return ""
    return "\n".join(["## GPU: the engine", "", HOW_TO_RUN, *texts])


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _origin(result: dict[str, Any]) -> str:
    return (
        f"{result['device_name']}, torch {result['torch']}, triton {result['triton']}, commit "
        f"{result['commit'] or 'unknown'}, {result['date']}. Command: `{result['command']}`."
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _context(length: int) -> str:
    return f"{length // 1024}k" if length % 1024 == 0 else str(length)


def _settings(result: dict[str, Any]) -> str:
    """Name the settings that change what is computed."""
    names = ("quantization", "kv_cache_dtype", "enforce_eager", "async_scheduling", "dtype")
    pairs = [f"{name} {result['settings'][name]}" for name in names if name in result["settings"]]
    return f" ({', '.join(pairs)})" if pairs else ""


def _speed(results: list[dict[str, Any]], _paths: list[Path]) -> str:
    parts = [
        "### Decode\n",
        "Random weights and prompts, bf16 unless it says otherwise, through `LLM.generate`: ms a "
        "step = (time of 129 tokens - time of 1 token) / 128, greedy, prompts in the prefix "
        "cache, medians. Bar: what was set as the goal. Dense: vLLM 0.24, dense twin of the same "
        "shape, same GPU. Floor: the bytes of the weights alone at 4.25 TB/s; byte floor: with "
        "those of the cache. Of E experts, k a token, a step of B rows is expected to read "
        "E (1 - (1 - k / E)^B) in each layer, as if all were equally likely; a router that "
        "prefers some reads fewer, so that a step can take less than that floor. p50 and p99 are "
        "of the time between steps in the same runs.\n",
    ]
    for result in results:
        parts += [f"**{result['title']}**{_settings(result)}. {_origin(result)}\n", _decode(result)]
    parts.append("### Prefill\n")
    parts.append("Whole prompts that no cache knows, one token each; dense as above.\n")
    rows = []
    for result in results:
        for row in result["prefill"]:
            name = f"{result['model']}{_settings(result)}"
            cells = [name, f"{_context(row['context'])} x {row['rows']}"]
            cells.append(row.get("skipped") or _number(row["tokens_per_s"], "{:,.0f}"))
            cells += [_number(row[f"{of}_tokens_per_s"], "{:,.0f}") for of in ("bar", "dense")]
            rows.append(cells)
    parts.append(table(["model", "prompts", "tokens/s", "bar", "dense"], rows))
    return "\n".join(parts)


def _decode(result: dict[str, Any]) -> str:
    # Columns that only models with experts need, and older results do not have.
    more: tuple[tuple[str, str, str], ...] = ()
    if any(row.get("expected_experts") for row in result["decode"]):
        more = (
            ("of the byte floor", "of_byte_floor", "{:.0%}"),
            ("distinct experts expected", "expected_experts", "{:.1f}"),
        )
    rows = []
    for row in result["decode"]:
        name = f"{_context(row['context'])} x {row['rows']}"
        if row.get("skipped"):
            rows.append([name, row["skipped"], *["-"] * (7 + len(more))])
            continue
        if row["num_sampled"]:
            name += f", {row['num_sampled']} at temperature 0.8, top-p 0.95"
        dense = row["dense_ms"]
        rows.append(
            [
                name,
                f"{row['ms_per_step']:.2f}",
                _number(row["step_ms_p50"], "{:.2f}"),
                _number(row["step_ms_p99"], "{:.2f}"),
                _number(row["bar_ms"], "{:.1f}"),
                _number(dense, "{:.2f}"),
                "-" if dense is None else f"{dense / row['ms_per_step']:.2f}x",
                f"{row['tokens_per_s']:,.0f}",
                f"{row['of_weight_floor']:.0%}",
                *(_number(row[field], form) for _, field, form in more),
            ]
        )
    header = ["context x rows", "ms a step", "p50", "p99", "bar", "dense", "against dense"]
    return table([*header, "tokens/s", "of the floor", *(name for name, _, _ in more)], rows)


def _profile(results: list[dict[str, Any]], _paths: list[Path]) -> str:
    parts = [
        "### Where a step's time goes\n",
        "torch.profiler over steady steps; wall is measured without it. Busy is the union of the "
        "kernels' intervals (they may overlap), sum that of their times; idle is the share of the "
        "trace, from the first kernel to the last, in which none ran.\n",
    ]
    rows = []
    for result in results:
        for kind in ("decode", "prefill"):
            for row in result[kind]:
                size = (
                    f"decode {_context(row['context'])} x {row['rows']}"
                    if kind == "decode"
                    else _prefill_name(row)
                )
                cells = [f"{result['model']}: {size}"]
                cells += [f"{row[name]:,.0f}" for name in ("wall_us", "kernel_sum_us", "busy_us")]
                cells += [_number(row[f"wall_of_{of}"], "{:.3f}") for of in ("sum", "busy")]
                cells += [_number(row["idle_share"], "{:.1%}"), f"{row['kernels_per_step']:.0f}"]
                rows.append(cells)
    header = ["step", "wall, us", "sum, us", "busy, us", "wall / sum", "wall / busy", "idle"]
    parts.append(table([*header, "kernels"], rows))
    for result in results:
        parts.append(_kernels(result))
    parts += [f"{result['model']}: {_origin(result)}\n" for result in results]
    return "\n".join(parts)


def _prefill_name(row: dict[str, Any]) -> str:
    num_prompts = row.get("prompts", 1)
    if num_prompts > 1:
        return f"prefill {row['tokens'] // num_prompts} x {num_prompts}"
    return f"prefill {row['tokens']} after {row['context']}"


def _kernels(result: dict[str, Any], num_top: int = 12) -> str:
    """Return the kernels by time of the largest batch."""
    row = result["decode"][-1]
    rows = [
        [
            f"`{top['name']}`",
            f"{top['calls_per_step']:.1f}",
            f"{top['us_per_call']:.2f}",
            f"{top['us_per_step']:.0f}",
            f"{top['share']:.1%}",
        ]
        for top in row["top"][:num_top]
    ]
    title = f"Kernels of {result['model']}, decode {_context(row['context'])} x {row['rows']}:\n"
    return title + "\n" + table(["kernel", "calls", "us a call", "us a step", "share"], rows)


def _serving(results: list[dict[str, Any]], paths: list[Path]) -> str:
    parts = ["### Serving\n"]
    for result, path in zip(results, paths, strict=True):
        parts.append(f"**{result['title']}**{_settings(result)}. {_origin(result)}\n")
        if result["sweep"]:
            low, high = result["prompt_lens"]
            parts.append(
                f"Over HTTP, streamed: Poisson arrivals for {result['seconds_of_arrivals']:g} s at "
                f"each rate, prompts of {low} to {high} tokens (log-uniform, nothing shared), "
                f"{result['output_len']} tokens of output. Good requests: first token within "
                f"{result['ttft_ms']:g} ms, the others within {result['itl_ms']:g} ms each on "
                "average.\n"
            )
            parts.append(_sweep(result["sweep"]))
        plot = path.with_suffix(".png")
        if plot.is_file():
            parts.append(f"![latency and throughput](../benchmarks/results/{plot.name})\n")
        if result["equality"]:
            parts.append(_equality(result["equality"]))
    return "\n".join(parts)


def _sweep(runs: list[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        cells = [run["config"], f"{run['rate']:g}", f"{run['requests_per_s']:.2f}"]
        cells += [f"{run['good_requests_per_s']:.2f}", f"{run['output_tokens_per_s']:,.0f}"]
        cells.append(f"{run['total_tokens_per_s']:,.0f}")
        for metric, form in (("ttft", "{:,.0f}"), ("itl", "{:.1f}")):
            cells += [_number(run[f"{metric}_p{q}_ms"], form) for q in (50, 99)]
        rows.append([*cells, str(run["num_failed"])])
    header = ["server", "requests/s sent", "answered/s", "good/s", "output tokens/s", "tokens/s"]
    header += ["TTFT p50, ms", "p99", "ITL p50, ms", "p99", "failed"]
    return table(header, rows)


def _equality(runs: list[dict[str, Any]]) -> str:
    rows = [
        [
            run["dtype"],
            str(run["num_streams"]),
            str(run["num_failed"]),
            f"{run['equal_requests']:.1%} of {run['num_requests']}",
            f"{run['equal_tokens']:.1%} of {run['num_tokens']}",
            str(run["num_distinct"]),
            f"{run['together_s']:.1f}",
            f"{run['alone_s']:.1f}",
        ]
        for run in runs
    ]
    header = ["dtype", "streams at once", "failed", "equal requests", "equal tokens", "distinct"]
    return (
        "Greedy outputs of many streams at once against the same requests one by one, without a "
        "prefix cache. Equal tokens: those before a request's first difference; distinct: "
        "different tokens in all.\n\n" + table([*header, "together, s", "one by one, s"], rows)
    )


def _soak(results: list[dict[str, Any]], _paths: list[Path]) -> str:
    parts = ["### Soak\n"]
    for result in results:
        memory = [
            f"{name} {sizes['first'] / 1e6:,.0f} to {sizes['last'] / 1e6:,.0f} MB"
            for name, sizes in result["memory_bytes"].items()
        ]
        answers = ", ".join(f"{count:,} {kind}" for kind, count in result["answers"].items())
        first_byte = result["first_byte_s"]
        parts.append(
            f"Commit {result['commit']}. Command: `python {result['command']}`. "
            f"{result['seconds']:.0f} s, {result['num_clients']} clients: {answers}; "
            f"{result['num_generated_tokens']:,} tokens, {result['num_preemptions']:,} "
            f"preemptions, {result['num_prefix_hit_tokens']:,} tokens found in the prefix cache; "
            f"first byte p50 {first_byte['p50']:.2f} s, p99 {first_byte['p99']:.2f} s. "
            "At the end no request is left and every page is free. Memory, first third to last: "
            f"{'; '.join(memory)} (rss_0 is the API process, rss_1 the engine). Failures: "
            f"{'; '.join(result['failures']) or 'none'}. {result.get('note', '')}\n"
        )
    return "\n".join(parts)


def _referee(results: list[dict[str, Any]], _paths: list[Path]) -> str:
    (result,) = results
    ours, theirs = (result["tools"][name]["result"] for name in ("nsa-client bench", "aiperf"))
    first, gap = theirs["time_to_first_token"], theirs["inter_chunk_latency"]
    rows = [
        [
            "`nsa-client bench`",
            f"{ours['completed']}",
            *(f"{ours[name]:.1f}" for name in ("median_ttft_ms", "p99_ttft_ms")),
            *(f"{ours[name]:.2f}" for name in ("median_itl_ms", "mean_itl_ms")),
        ],
        [
            f"aiperf {result['tools']['aiperf']['version']}",
            f"{theirs['request_count']['avg']:.0f}",
            *(f"{first[name]:.1f}" for name in ("p50", "p99")),
            *(f"{gap[name]:.2f}" for name in ("p50", "avg")),
        ],
    ]
    header = ["client", "answered", "TTFT p50, ms", "p99", "between chunks p50, ms", "mean"]
    return (
        "#### Another client\n\n"
        f"One server of {result['model']} (`{result['server']}`), 96 prompts of 2048 tokens, 128 "
        "of output, Poisson arrivals at 8 a second. aiperf divides by tokens of its own: random "
        "ids make text that its tokenizer cuts into "
        f"{theirs['output_sequence_length']['avg']:.0f} tokens instead of "
        f"{theirs['usage_completion_tokens']['avg']:.0f}; so the time between "
        f"chunks is compared. {_origin(result)}\n\n" + table(header, rows)
    )


def _start(results: list[dict[str, Any]], _paths: list[Path]) -> str:
    parts = ["### Start\n"]
    for result in results:
        starts = result["starts"]
        phases = list(dict.fromkeys(name for row in starts for name in row["phase_s"]))
        rows = [
            [
                row["triton_cache"],
                f"{row['healthy_s']:.1f}",
                f"{row['first_token_s']:.1f}",
                *(_number(row["phase_s"].get(name), "{:.2f}") for name in phases),
                f"{row['weight_bytes_per_s'] / 1e9:.1f}",
            ]
            for row in starts
        ]
        weights = starts[0]["weight_bytes"] / 1e9
        parts.append(
            f"**{result['title']}**{_settings(result)}. {_origin(result)} Seconds from the start "
            f"of the process; {weights:.1f} GB of safetensors, in the page cache (which this "
            f"machine reads at {result['page_cache_bytes_per_s'] / 1e9:.1f} GB/s). Columns after "
            "the first token: the engine's own phases.\n"
        )
        header = ["Triton cache", "healthy", "first token", *phases, "weights, GB/s"]
        parts.append(table(header, rows))
    return "\n".join(parts)


def _fla(results: list[dict[str, Any]], _paths: list[Path]) -> str:
    parts = ["### Against flash-linear-attention\n"]
    for result in results:
        ours = next(row for row in result["rows"] if row["name"] == "ours")
        rows = []
        for row in result["rows"]:
            if "error" in row:
                rows.append([row["name"], row["error"], "-", "-", "-"])
                continue
            equal = result["equal"].get(row["name"])
            rows.append(
                [
                    row["name"],
                    f"{row['ms_per_step']:.2f}",
                    f"{row['tokens_per_s']:,.0f}",
                    f"{row['ms_per_step'] / ours['ms_per_step']:.1f}x",
                    "-" if equal is None else f"{equal['equal_tokens']:.1%}",
                ]
            )
        packages = ", ".join(f"{name} {text}" for name, text in result["versions"].items())
        parts.append(
            f"**{result['title']}**, {result['num_rows']} rows at {_context(result['context'])}, "
            f"{result['num_tokens']} tokens, {result['dtype']}; {packages}. {_origin(result)} "
            "Same weights and prompts. `fla generate` is NSAForCausalLM.generate, `fla loop` the "
            "same model called token by token without a mask. fla's window branch runs through "
            f"{result['fla_window']}. Equal: greedy tokens before the first difference from "
            "ours.\n"
        )
        parts.append(table(["", "ms a step", "tokens/s", "against ours", "equal tokens"], rows))
    return "\n".join(parts)
