"""vLLM as the referee: the same requests to both servers, and every difference with its reason.

    python benchmarks/referee.py --vllm-python PATH        # starts both servers, writes the result
    python benchmarks/referee.py --ours URL --vllm URL     # uses servers that run

Both serve the default model's weights in float32. Compared are the status, the error's fields, the
tree of keys and types of the answer, and, for greedy requests, text, finish_reason and usage.
A difference is named `status`, `error`, `keys`, `null` or `value`; benchmarks/referee_reasons.json
has the reason for it, and docs/serving.md the table that is made of both. Exit code 1: one has no
reason.
"""

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from cpu import commit, free_port, machine, wait_for_first_answer
from export_hf import export_hf
from referee_cases import MODEL, Case, all_cases
from referee_docs import write_docs
from referee_tools import running_server
from workload import ROOT

from nsa_serve.config import EngineConfig

OUTPUT = ROOT / "benchmarks" / "results" / "referee.json"
REASONS = ROOT / "benchmarks" / "referee_reasons.json"
# An answer that takes longer is a difference of its own (status 0).
_TIMEOUT_S = 30.0
# What differs from one answer to the next.
_VOLATILE = ("id", "created", "system_fingerprint", "version", "request_id")


def ask(client: httpx.Client, url: str, case: Case) -> dict[str, Any]:
    """Send a request and reduce the answer to what is compared."""
    content = case.raw
    if content is None and case.method == "POST":
        content = json.dumps(case.body).encode()
    headers = {"Content-Type": case.content_type} if content is not None else {}
    try:
        response = client.request(case.method, url + case.path, content=content, headers=headers)
    except httpx.HTTPError as error:
        return {"status": 0, "failure": type(error).__name__}
    answer: dict[str, Any] = {"status": response.status_code}
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        return {**answer, **_reduce_stream(response.text)}
    try:
        body = response.json()
    except ValueError:
        return {**answer, "tree": "no JSON"}
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        error = body["error"]
        return {**answer, "error": {"type": error.get("type"), "param": error.get("param"),
                                    "code": error.get("code")},
                "tree": tree(body), "message": error.get("message")}  # fmt: skip
    return {**answer, "tree": tree(body), "values": _values(body)}


def tree(value: Any) -> Any:
    """Return the keys and types of a value; items of a list are merged."""
    if isinstance(value, dict):
        # Keys that are token ids or texts are data.
        if value and all(not key.replace("_", "a").isidentifier() for key in value):
            return {"*": tree(next(iter(value.values())))}
        return {key: tree(item) for key, item in value.items()}
    if isinstance(value, list):
        merged: Any = None
        for item in value:
            merged = _merge(merged, tree(item))
        return [merged] if value else []
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "null" if value is None else "string"


def _merge(first: Any, second: Any) -> Any:
    if second is None or second == "null":
        return "null" if first is None and second is not None else first
    if first is None or first == "null":
        return second
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [*first, *(key for key in second if key not in first)]
        return {key: _merge(first.get(key), second.get(key)) for key in keys}
    if isinstance(first, str):
        return first
    if isinstance(first, list) and isinstance(second, list):
        return [_merge(*(side[0] if side else None for side in (first, second)))]
    return first


def _values(body: Any) -> dict[str, Any]:
    """Return what a greedy answer must agree on."""
    if not isinstance(body, dict):
        return {}
    values: dict[str, Any] = {}
    for choice in body.get("choices", ()):
        message = choice.get("message") or {}
        i = choice["index"]
        values[f"text {i}"] = choice.get("text", message.get("content"))
        values[f"finish_reason {i}"] = choice.get("finish_reason")
        values[f"stop_reason {i}"] = choice.get("stop_reason")
        calls = message.get("tool_calls") or ()
        values[f"tool_calls {i}"] = [call["function"]["name"] for call in calls]
        logprobs = choice.get("logprobs") or {}
        if "tokens" in logprobs:
            values[f"logprobs {i}"] = [logprobs["tokens"], logprobs["text_offset"]]
    for name in ("tokens", "count", "prompt", "token_strs"):
        if name in body:
            values[name] = body[name]
    if isinstance(body.get("usage"), dict):
        names = ("prompt_tokens", "completion_tokens", "total_tokens")
        values["usage"] = [body["usage"].get(name) for name in names]
    return values


def _reduce_stream(text: str) -> dict[str, Any]:
    events = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
    chunks = [json.loads(event) for event in events if event != "[DONE]"]
    merged: Any = None
    for chunk in chunks:
        merged = _merge(merged, tree(chunk))
    values: dict[str, Any] = {"done": events[-1:] == ["[DONE]"]}
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            i = choice["index"]
            part = choice.get("text", (choice.get("delta") or {}).get("content")) or ""
            values[f"text {i}"] = values.get(f"text {i}", "") + part
            if choice.get("finish_reason"):
                values[f"finish_reason {i}"] = choice["finish_reason"]
    values["usage chunks"] = sum(bool(chunk.get("usage")) for chunk in chunks) > 1
    values["last chunk has usage only"] = bool(chunks) and not chunks[-1].get("choices", True)
    return {"tree": merged, "values": values}


def differences(case: Case, ours: dict[str, Any], vllm: dict[str, Any]) -> dict[str, list[Any]]:
    """Return what differs: the difference's name -> [ours, vLLM's]."""
    if ours["status"] != vllm["status"]:
        return {f"status {case.name}": [_status(ours), _status(vllm)]}
    found: dict[str, list[Any]] = {}
    mine, theirs = ours.get("error"), vllm.get("error")
    if mine is not None and theirs is not None:
        for field in mine:
            if mine[field] != theirs[field]:
                found[f"error {field} {case.name}"] = [mine[field], theirs[field]]
        return found
    route = case.path if case.method == "POST" else f"{case.method} {case.path}"
    for path, pair in _compare_trees(ours.get("tree"), vllm.get("tree"), ""):
        kind = "null" if pair == ["absent", "null"] else "keys"
        found[f"{kind} {route} {path}"] = pair
    if case.is_deterministic:
        ours_values, vllm_values = ours.get("values", {}), vllm.get("values", {})
        for name in sorted({*ours_values, *vllm_values}):
            pair = [ours_values.get(name), vllm_values.get(name)]
            if pair[0] != pair[1]:
                found[f"value {name} {case.name}"] = pair
    return found


def _status(answer: dict[str, Any]) -> str:
    return f"{answer['status']} {answer.get('message') or answer.get('failure') or ''}".strip()


def _compare_trees(ours: Any, vllm: Any, path: str) -> Iterator[tuple[str, list[Any]]]:
    if isinstance(ours, dict) and isinstance(vllm, dict):
        for key in sorted({*ours, *vllm}):
            if key not in _VOLATILE:
                yield from _compare_trees(
                    ours.get(key, "absent"), vllm.get(key, "absent"), f"{path}.{key}"
                )
    elif isinstance(ours, list) and isinstance(vllm, list):
        yield from _compare_trees(
            ours[0] if ours else "empty", vllm[0] if vllm else "empty", f"{path}[]"
        )
    elif ours != vllm:
        yield path, [_kind(ours), _kind(vllm)]


def _kind(value: Any) -> str:
    return {dict: "object", list: "array"}.get(type(value), value)


@contextmanager
def running_vllm(python: str, folder: Path) -> Iterator[str]:
    """Serve the exported weights with vLLM's CPU build and return the URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        str(Path(python).parent / "vllm"), "serve", str(folder), "--served-model-name", MODEL,
        "--dtype", "float32", "--max-model-len", "2048", "--max-num-seqs", "8", "--host",
        "127.0.0.1", "--port", str(port), "--enforce-eager", "--enable-prompt-tokens-details",
        "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
    ]  # fmt: skip
    variables = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log_path = folder / "vllm.log"
    start = time.perf_counter()
    with log_path.open("w") as log:
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
    try:
        wait_for_first_answer(url, server, start, log_path)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=60)


def compare(ours_url: str, vllm_url: str) -> dict[str, Any]:
    """Ask both servers everything; return the statuses and the differences with their reasons."""
    cases = all_cases()
    assert len({case.name for case in cases}) == len(cases)
    statuses: dict[str, list[int]] = {}
    found: dict[str, dict[str, Any]] = {}
    reasons = json.loads(REASONS.read_text())
    client = httpx.Client(timeout=_TIMEOUT_S)
    for case in cases:
        ours, vllm = ask(client, ours_url, case), ask(client, vllm_url, case)
        statuses[case.name] = [ours["status"], vllm["status"]]
        print(case.name, *statuses[case.name], file=sys.stderr, flush=True)
        for name, pair in differences(case, ours, vllm).items():
            entry = found.setdefault(
                name, {"ours": pair[0], "vllm": pair[1], "case": case.name, "num_cases": 0}
            )
            entry["num_cases"] += 1
            entry["reason"] = next(
                (text for pattern, text in reasons.items() if fnmatch.fnmatchcase(name, pattern)),
                None,
            )
    return {"num_cases": len(cases), "statuses": statuses, "differences": found}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", help="python of an environment with vLLM's CPU build")
    parser.add_argument("--ours", help="URL of our server when it runs")
    parser.add_argument("--vllm", help="URL of vLLM's when it runs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        ours_url = options.ours or stack.enter_context(running_server(folder))
        vllm_url = options.vllm
        if vllm_url is None:
            export_hf(folder, EngineConfig(), dtype=torch.float32)
            vllm_url = stack.enter_context(running_vllm(options.vllm_python, folder))
        version = httpx.get(f"{vllm_url}/version").json()["version"]
        result = compare(ours_url, vllm_url)
    result = {
        "command": "python benchmarks/referee.py --vllm-python PATH",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "vllm": version,
        **result,
    }
    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    write_docs()
    unexplained = {k: v for k, v in result["differences"].items() if v["reason"] is None}
    for name, entry in unexplained.items():
        print(f"{name}\n    ours: {entry['ours']}\n    vllm: {entry['vllm']}")
    print(
        f"{result['num_cases']} requests, {len(result['differences'])} differences, "
        f"{len(unexplained)} without a reason"
    )
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
