"""The parts of docs/performance.md about the API process and about other people's tools."""

import json
from pathlib import Path
from typing import Any


def api_section(results: Path) -> str:
    """Return the Markdown of what has been measured so far."""
    parts = []
    sections = (
        ("api-overhead", _overhead),
        ("structured", _structured),
        ("referee-tools", _tools),
    )
    for name, write in sections:
        path = results / f"{name}.json"
        if path.is_file():
            parts.append(write(json.loads(path.read_text())))
    return "\n".join(parts)


def _overhead(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    lines = [
        "## API process",
        "",
        f"{machine['cpu']}, {machine['num_cpus']} cores shared with the clients, load average "
        f"{result['load_average']:.1f}, commit {result['commit']}, {result['date']}. Command: "
        f"`{result['command']}`. starlette {versions['starlette']}, uvicorn {versions['uvicorn']}.",
        "",
        f"{result['num_streams']} streams of one token a chunk, detokenized, from an engine that "
        "costs nothing; the bare StreamingResponse (httptools, no middleware) sends constant "
        "chunks of the same size. Paced is 50 tokens/s a stream, saturated as fast as it goes; the "
        "best of the runs of each. CPU is the server process's, user and system.",
        "",
        "| server | load | chunks/s | CPU, us a chunk | gap p50, ms | p99 | max |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for run in result["runs"]:
        groups.setdefault((run["server"], run["path"], run["rate"]), []).append(run)
    for (server, path, rate), runs in groups.items():
        best = min(runs, key=lambda run: run["gap_ms"]["max"] if rate else -run["events_per_s"])
        gaps = best["gap_ms"]
        name = "bare StreamingResponse" if server == "bare" else f"nsa-serve `{path}`"
        lines.append(
            f"| {name} | {'paced' if rate else 'saturated'} | {best['events_per_s']:.0f} | "
            f"{best['cpu_us_per_event']:.1f} | {gaps['p50']:.1f} | {gaps['p99']:.1f} | "
            f"{gaps['max']:.1f} |"
        )
    return "\n".join([*lines, ""])


def _structured(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        "## Structured output",
        "",
        f"{machine['cpu']}, {result['threads']} threads, torch {result['torch']}, commit "
        f"{result['commit']}, {result['date']}. Command: `{result['command']}`.",
        "",
        f"A decode step of {result['rows']} rows of {result['model']}, all with a grammar or none; "
        "medians in milliseconds. Masks are computed by another thread while the model runs, here "
        "on the same cores; waiting and applying are what the step itself pays.",
        "",
        "| grammar | step | masks | waiting for them | applying them |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["cases"].items():
        cells = " | ".join(f"{value:.2f}" for value in row.values())
        lines.append(f"| {name} | {cells} |")
    return "\n".join([*lines, ""])


def _tools(result: dict[str, Any]) -> str:
    tools = result["tools"]
    lines = [
        "## Other people's tools",
        "",
        "Unchanged, against the default model in float32 on one thread of a busy machine "
        f"({result['machine']['cpu']}): what counts is that they run and agree. "
        "`benchmarks/referee_tools.py` "
        "runs them, `benchmarks/results/referee-tools.json` has the rest.",
        "",
    ]
    if "lm-eval" in tools:
        lines += _lm_eval(tools["lm-eval"])
    if "aiperf" in tools:
        found = tools["aiperf"]["result"]
        lines += [
            f"- `{tools['aiperf']['command']}`: {found['request_count']['avg']:.0f} requests, "
            f"{found['output_token_throughput']['avg']:.1f} tokens/s, first token after "
            f"{found['time_to_first_token']['avg']:.0f} ms, then one each "
            f"{found['inter_token_latency']['avg']:.0f} ms; it scraped `/metrics`.",
        ]
    for route in ("/v1/completions", "/v1/chat/completions"):
        if "guidellm" in tools:
            entry = tools["guidellm"][route]
            found, requests = entry["result"], entry["requests"]
            lines += [
                f"- `{entry['command']}`: {requests['successful']} of {requests['total']} "
                "requests, "
                f"{found['output_tokens_per_second']['mean']:.1f} tokens/s, first token after "
                f"{found['time_to_first_token_ms']['mean']:.0f} ms, then one each "
                f"{found['inter_token_latency_ms']['mean']:.0f} ms.",
            ]
    return "\n".join([*lines, ""])


def _lm_eval(entry: dict[str, Any]) -> list[str]:
    facts, answers = entry["tasks"]["nsa_facts"], entry["tasks"]["nsa_answers"]
    lines = [
        "| lm-eval | nsa_facts acc | acc_norm | nsa_answers exact_match |",
        "|---|---|---|---|",
    ]
    for backend in ("hf", "local-completions"):
        scores = entry[backend]["scores"]
        lines.append(
            f"| `{backend}` | {scores['nsa_facts']['acc']:.4f} | "
            f"{scores['nsa_facts']['acc_norm']:.4f} | "
            f"{scores['nsa_answers']['exact_match']:.4f} |"
        )
    return [
        *lines,
        "",
        f"Its own transformers backend and this server on the same weights: "
        f"{facts['num_responses']} loglikelihoods differ by at most "
        f"{facts['max_loglikelihood_difference']:.1e}, {facts['num_equal_is_greedy']} agree on "
        f"is_greedy, {answers['num_equal_texts']} of {answers['num_responses']} generated texts "
        "are equal.",
        "",
    ]
