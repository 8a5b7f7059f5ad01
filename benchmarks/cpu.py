"""CPU benchmark: nsa-serve's HTTP server beside transformers, and vLLM if given, in one run.

    python benchmarks/cpu.py [--vllm-python PATH] [--repeats 3] [--output FILE]

All engines get the same token ids, the same dequantised bf16 weights and the same threads, one
after the other on an otherwise idle machine. Prefix caching is off, or repeats would measure it.
"""

import argparse
import asyncio
import json
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import torch
from export_hf import export_hf
from peers.measure import measure, read_workload
from report import summarize, write_report
from workload import ROOT, make_scenarios, write_workload

from nsa_client.bench import BenchConfig, run_bench
from nsa_serve.config import EngineConfig, num_usable_cpus
from nsa_serve.model_source import load_tokenizer

PEERS = Path(__file__).parent / "peers"


def run_nsa_serve(workload: dict[str, Any], num_threads: int, log_path: Path) -> dict[str, Any]:
    """Start the server, time its start to a first answer, and run the workload over HTTP."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "nsa_http", "serve", "--port", str(port),
        "--num-threads", str(num_threads), "--no-enable-prefix-caching",
        "--page-memory", "3GiB", "--max-num-seqs", "16",
    ]  # fmt: skip
    start = time.perf_counter()
    with log_path.open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    try:
        first_answer_s = wait_for_first_answer(url, server, start, log_path)

        def run(prompts: list[list[int]], output_len: int) -> list[tuple[float, float]]:
            config = BenchConfig(
                base_url=url,
                num_prompts=len(prompts),
                prompts=tuple(prompts),
                output_len=output_len,
            )
            result = asyncio.run(run_bench(config))
            if result.num_failed:
                raise SystemExit(f"requests failed: {result.to_dict()['errors']}")
            return [(record.ttft_s, record.e2el_s) for record in result.completed]

        scenarios = measure(workload, run)
    finally:
        server.terminate()
        server.wait(timeout=60)
    versions = {name: version(name) for name in ("nsa-serve", "torch")}
    return {"versions": versions, "first_answer_s": first_answer_s, "scenarios": scenarios}


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_first_answer(
    url: str, server: subprocess.Popen[bytes], start: float, log_path: Path
) -> float:
    """Return how long after `start` the server first answered a completion."""
    body = {"prompt": "The sky is", "max_tokens": 1}
    while time.perf_counter() - start < 120:
        if server.poll() is not None:
            raise SystemExit(f"the server ended:\n{log_path.read_text()}")
        try:
            if httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200:
                return time.perf_counter() - start
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"the server did not answer in 120 s:\n{log_path.read_text()}")


def run_peer(python: str, script: str, arguments: list[str]) -> dict[str, Any]:
    """Run a peer's script in its own process; return the JSON of its last line."""
    done = subprocess.run(
        [python, str(PEERS / script), *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    # Some engines still log to stdout after they are done.
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"versions"')]
    if not lines:
        raise SystemExit(f"{script} printed no result:\n{done.stdout[-2000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def read_bandwidth(num_threads: int) -> float:
    """Return the bytes per second at which the machine reads memory: the floor's denominator."""
    torch.set_num_threads(num_threads)
    data = torch.ones(2**28)  # 1 GiB, far beyond the caches
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.numel() * data.element_size() / statistics.median(seconds)


def machine() -> dict[str, Any]:
    """Describe where the figures were measured."""
    name = platform.processor()
    flags = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
        if line.startswith("flags"):
            flags = line
    features = [f for f in ("avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in flags]
    return {"cpu": name, "num_cpus": num_usable_cpus(), "features": features}


def commit() -> str:
    """Return the commit measured, marked when the tree differs from it."""
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
    dirty = subprocess.check_output(["git", "status", "--porcelain", "nsa_serve", "kernels",
                                     "server", "clients"], cwd=ROOT, text=True)  # fmt: skip
    return head.strip() + ("-dirty" if dirty.strip() else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", help="python of an environment with vLLM's CPU build")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=num_usable_cpus())
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "cpu.json")
    options = parser.parse_args()
    config = EngineConfig()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workload_path = folder / "workload.json"
        write_workload(
            workload_path, make_scenarios(load_tokenizer(config)), repeats=options.repeats
        )
        export_hf(folder, config)
        workload = read_workload(str(workload_path))
        arguments = [str(folder), str(workload_path), str(options.threads)]
        engines = {
            "nsa-serve": run_nsa_serve(workload, options.threads, folder / "server.log"),
            "transformers": run_peer(sys.executable, "transformers_cpu.py", arguments),
        }
        if options.vllm_python:
            engines["vllm"] = run_peer(options.vllm_python, "vllm_cpu.py", arguments)
        weight_bytes = (folder / "model.safetensors").stat().st_size
    result = {
        "command": f"python benchmarks/cpu.py --repeats {options.repeats}"
        + (" --vllm-python PATH" if options.vllm_python else ""),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "repeats": options.repeats,
        "num_threads": options.threads,
        "weight_bytes": weight_bytes,
        "read_bandwidth_bytes_per_s": read_bandwidth(options.threads),
        "engines": engines,
    }
    result["summary"] = summarize(result, workload)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    write_report()
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    sys.exit(main())
