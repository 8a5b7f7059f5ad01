"""From `nsa-serve serve` to the first token, by phase: with a cold and with a warm Triton cache.

    python benchmarks/gpu_start.py [--model a|b] [--folder FOLDER] [--repeats 2]
                                    [--triton-cache FOLDER] [--out FILE]

The checkpoint is real (random) safetensors, written first unless --folder has them, and read once
before anything is timed: its pages are warm. Times are seconds since the process was started: the
port takes connections, /health says 200, the first token of a completion is here. The phases are
the engine's own, as /server_info has them.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
from gpu_common import (
    device_options,
    engine_options,
    environment,
    make_parser,
    resolve_device,
    server_flags,
    write_result,
)
from gpu_models import MODELS, write_model, write_weights
from gpu_server import running_server

from nsa_client.sse import SSEDecoder

_CHUNK_BYTES = 2**26


def read_files(folder: Path) -> float:
    """Read the weights once; return the bytes per second of it."""
    buffer = bytearray(_CHUNK_BYTES)
    num_bytes = 0
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    return num_bytes / (time.perf_counter() - start)


def first_token_s(url: str, model: str) -> float:
    """Return the seconds from a request to the first event of its stream that has a token."""
    body = {
        "model": model,
        "prompt": [1, 2, 3, 4],
        "max_tokens": 4,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    start = time.perf_counter()
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=body, timeout=120.0, trust_env=False
    ) as answer:
        answer.raise_for_status()
        decoder = SSEDecoder()
        events = (event.data for part in answer.iter_bytes() for event in decoder.feed(part))
        for data in events:
            if data == "[DONE]":
                break
            if any(choice.get("token_ids") for choice in json.loads(data)["choices"]):
                return time.perf_counter() - start
    raise SystemExit("the stream brought no token")


def start_once(
    folder: Path, flags: list[str], *, log: Path, triton_cache: Path, cache: str
) -> dict[str, Any]:
    """Start a server and return its times."""
    environment = {"TRITON_CACHE_DIR": str(triton_cache)}
    with running_server(folder, flags, log=log, environment=environment, timeout_s=500) as server:
        token_s = first_token_s(server.url, server.model)
        total_s = server.age_s()
        info = server.info
    phases = info["startup_s"]
    weight_bytes = info["model"]["weight_bytes"]
    return {
        "triton_cache": cache,
        "listening_s": server.listening_s,
        "healthy_s": server.healthy_s,
        "first_token_s": server.healthy_s + token_s,
        "measured_until_s": total_s,
        "phase_s": phases,
        "other_s": server.healthy_s - sum(phases.values()),
        "weight_bytes": weight_bytes,
        "weight_bytes_per_s": weight_bytes / max(1e-9, phases.get("weights", 0.0)),
        "memory": info["memory"],
    }


def show(row: dict[str, Any]) -> None:
    """Print one start."""
    phases = ", ".join(f"{name} {seconds:.2f}" for name, seconds in row["phase_s"].items())
    print(
        f"{row['triton_cache']} Triton cache: listening {row['listening_s']:.2f} s, healthy "
        f"{row['healthy_s']:.2f} s, first token {row['first_token_s']:.2f} s ({phases}, other "
        f"{row['other_s']:.2f}); weights at {row['weight_bytes_per_s'] / 1e9:.1f} GB/s",
        flush=True,
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", choices=["a", "b", "moe"], default="b")
    parser.add_argument("--folder", type=Path, help="a folder of gpu_models.py, with weights")
    parser.add_argument("--repeats", type=int, default=2, help="starts with a warm cache")
    parser.add_argument(
        "--triton-cache", type=Path, help="one that has every kernel already: no cold start"
    )
    options = parser.parse_args()
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder = options.folder
        if folder is None:
            folder = write_model(scratch / options.model, options.model, is_tiny=options.tiny)
            start = time.perf_counter()
            num_bytes = write_weights(folder, device=device)
            seconds = time.perf_counter() - start
            print(f"wrote {num_bytes / 1e9:.2f} GB in {seconds:.1f} s", flush=True)
        result: dict[str, Any] = {
            "bench": "gpu-start",
            **environment(options.commit),
            "model": options.model,
            "title": MODELS[options.model].title,
            "page_cache_bytes_per_s": read_files(folder),
            "starts": [],
        }
        settings = {**device_options(device), **engine_options(options.option)}
        result["settings"] = settings
        is_warm = options.triton_cache is not None
        for number in range(int(is_warm), 1 + options.repeats):
            row = start_once(
                folder,
                server_flags(settings),
                log=scratch / f"server-{number}.log",
                triton_cache=options.triton_cache or scratch / "triton",
                cache="warm" if number else "cold",
            )
            result["starts"].append(row)
            show(row)
            write_result(options.out, result)


if __name__ == "__main__":
    main()
