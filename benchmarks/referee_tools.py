"""Other people's tools against the server with the default model, unchanged.

    python benchmarks/referee_tools.py [--lm-eval PATH] [--aiperf PATH] [--guidellm PATH]

Each PATH is the tool's command in an environment of its own (lm_eval 0.4.13 with its api and hf
extras, aiperf 0.13, guidellm 0.8.1 over torch 2.13). Those that are given are run and replace their
entry in benchmarks/results/referee-tools.json. lm-eval runs the tasks of benchmarks/lm_eval_tasks
twice, through the server and through its own transformers backend, on the same float32 weights; its
samples are compared one by one.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from cpu import commit, free_port, machine, wait_for_first_answer
from export_hf import export_hf
from report import write_report
from workload import ROOT

from nsa_serve.config import EngineConfig

MODEL = "smollm2-135m-nsa"
TASKS = ("nsa_facts", "nsa_answers")
OUTPUT = ROOT / "benchmarks" / "results" / "referee-tools.json"
# The default model's attention is dense below this length, as that of transformers' Llama.
MAX_LENGTH = 1024


@contextmanager
def running_server(folder: Path) -> Iterator[str]:
    """Serve the default model in float32 and return the URL."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "nsa_http", "serve", "--port", str(port), "--dtype", "float32",
        "--max-num-seqs", "8", "--max-model-len", "2048", "--num-threads", "1",
    ]  # fmt: skip
    log_path = folder / "server.log"
    start = time.perf_counter()
    with log_path.open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        wait_for_first_answer(url, server, start, log_path)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=60)


def run_tool(command: list[str], shown: str, folder: Path, **environment: str) -> dict[str, Any]:
    """Run a command in the repository's root; return what it was, how it ended and how long."""
    start = time.perf_counter()
    # HF_HOME: a tool must not depend on, nor leave, anything in the user's own folder.
    variables = {**os.environ, "HF_HOME": str(folder / "hf"), **environment}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{shown} ended with {done.returncode}:\n{done.stdout[-4000:]}")
    return {"command": shown, "exit_code": 0, "seconds": time.perf_counter() - start}


def run_lm_eval(program: str, url: str, folder: Path) -> dict[str, Any]:
    """Run the tasks through both backends and compare every sample."""
    backends = {
        "hf": f"pretrained=MODEL_FOLDER,dtype=float32,max_length={MAX_LENGTH}",
        "local-completions": f"model={MODEL},base_url=URL/v1/completions,tokenizer=MODEL_FOLDER,"
        f"tokenizer_backend=huggingface,num_concurrent=4,max_length={MAX_LENGTH}",
    }
    result: dict[str, Any] = {"tasks": {}}
    samples: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for backend, arguments in backends.items():
        output = folder / f"lm-eval-{backend}"
        shown = (
            f"lm_eval --model {backend} --model_args {arguments} --include_path "
            f"benchmarks/lm_eval_tasks --tasks {','.join(TASKS)} --output_path OUT --log_samples"
        )
        command = [
            word.replace("MODEL_FOLDER", str(folder))
            .replace("URL", url)
            .replace("OUT", str(output))
            for word in shown.split()
        ]
        entry = run_tool([program, *command[1:], "--device", "cpu"], shown, folder)
        scores = json.loads(next(output.rglob("results_*.json")).read_text())["results"]
        entry["scores"] = {
            task: {
                name.partition(",")[0]: value
                for name, value in scores[task].items()
                if isinstance(value, float) and "stderr" not in name
            }
            for task in TASKS
        }
        result[backend] = entry
        samples[backend] = {task: _read_samples(output, task) for task in TASKS}
    for task in TASKS:
        result["tasks"][task] = compare_samples(
            samples["hf"][task], samples["local-completions"][task]
        )
    return result


def compare_samples(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the responses of two runs of a task, sample by sample."""
    assert [a["doc_id"] for a in ours] == [b["doc_id"] for b in theirs]
    pairs = [
        (a, b)
        for first, second in zip(ours, theirs, strict=True)
        for a, b in zip(first["resps"], second["resps"], strict=True)
    ]
    if isinstance(ours[0]["resps"][0][0], str):
        num_equal = sum(a == b for a, b in pairs)
        return {"num_samples": len(ours), "num_responses": len(pairs), "num_equal_texts": num_equal}
    differences = [abs(float(a[0][0]) - float(b[0][0])) for a, b in pairs]
    return {
        "num_samples": len(ours),
        "num_responses": len(pairs),
        "max_loglikelihood_difference": max(differences),
        "num_equal_is_greedy": sum(str(a[0][1]) == str(b[0][1]) for a, b in pairs),
    }


def _read_samples(output: Path, task: str) -> list[dict[str, Any]]:
    lines = next(output.rglob(f"samples_{task}_*.jsonl")).read_text().splitlines()
    return sorted(map(json.loads, lines), key=lambda sample: sample["doc_id"])


def run_aiperf(program: str, url: str, folder: Path) -> dict[str, Any]:
    """Run aiperf with streamed completions."""
    shown = (
        f"aiperf profile -m {MODEL} --url URL --endpoint-type completions --streaming --tokenizer "
        "MODEL_FOLDER --concurrency 4 --request-count 40 --isl 64 --osl 32 --extra-inputs "
        "ignore_eos:true --output-artifact-dir OUT --ui none"
    )
    output = folder / "aiperf"
    command = [
        word.replace("MODEL_FOLDER", str(folder)).replace("URL", url).replace("OUT", str(output))
        for word in shown.split()
    ]
    entry = run_tool([program, *command[1:]], shown, folder)
    report = json.loads(next(output.rglob("profile_export_aiperf.json")).read_text())
    names = ("request_count", "error_request_count", "request_throughput",
             "output_token_throughput", "time_to_first_token", "inter_token_latency",
             "output_sequence_length")  # fmt: skip
    entry["result"] = {
        name: {key: report[name][key] for key in ("unit", "avg", "p99") if report[name].get(key)}
        for name in names
        if report.get(name)
    }
    entry["scraped_metrics"] = any(output.rglob("server_metrics_export*"))
    return entry


def run_guidellm(program: str, url: str, folder: Path) -> dict[str, Any]:
    """Run guidellm with both endpoints."""
    result: dict[str, Any] = {}
    for route in ("/v1/completions", "/v1/chat/completions"):
        output = folder / f"guidellm-{route.count('/')}.json"
        shown = (
            f"guidellm run --backend kind=openai_http,target=URL,model={MODEL},"
            f"request_format={route} --profile kind=concurrent,streams=4 --tokenizer "
            "kind=huggingface_auto,model=MODEL_FOLDER --data kind=synthetic_text,prompt_tokens=64,"
            "output_tokens=32 --constraint kind=max_requests,count=40 --output kind=json,path=OUT "
            "--disable-progress"
        )
        command = [
            word.replace("MODEL_FOLDER", str(folder))
            .replace("URL", url)
            .replace("OUT", str(output))
            for word in shown.split()
        ]
        entry = run_tool([program, *command[1:]], shown, folder, HF_HUB_OFFLINE="1")
        benchmark = json.loads(output.read_text())["benchmarks"][0]
        metrics = benchmark["metrics"]
        entry["requests"] = metrics["request_totals"]
        entry["result"] = {
            name: {key: metrics[name]["successful"][key] for key in ("mean", "median")}
            for name in ("requests_per_second", "output_tokens_per_second",
                         "time_to_first_token_ms", "inter_token_latency_ms")
        }  # fmt: skip
        result[route] = entry
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    tools = {"lm-eval": run_lm_eval, "aiperf": run_aiperf, "guidellm": run_guidellm}
    for name in tools:
        parser.add_argument(f"--{name}", metavar="PATH", help=f"the command of {name}")
    options = vars(parser.parse_args())
    result = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {"tools": {}}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        export_hf(folder, EngineConfig(), dtype=torch.float32)
        with running_server(folder) as url:
            for name, run in tools.items():
                program = options[name.replace("-", "_")]
                if program is not None:
                    facts = {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
                    result["tools"][name] = {**facts, **run(program, url, folder)}
                    result["machine"] = machine()
                    OUTPUT.write_text(json.dumps(result, indent=1) + "\n")
    write_report()


if __name__ == "__main__":
    main()
