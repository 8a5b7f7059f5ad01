"""What the API process costs: streams of an engine that costs nothing, over real sockets.

    python benchmarks/api_overhead.py [--repeats 3] [--seconds 8] [--output FILE]

The engine is a stub in the API process that hands the token ids of real text to the real
`AsyncEngine` (detokenizer, stop strings, metrics, streams), one step for all streams. Paced: 256
streams of 50 tokens/s each; a gap between two chunks far above 20 ms would be a stall. Saturated:
the next step begins when the streams have taken the last one. A bare Starlette StreamingResponse
under uvicorn sends chunks of the same size in the same way. The clients are raw sockets in this
process. CPU is the server's, user and system.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from cpu import commit, free_port, machine
from load_client import StreamLoad, run_load
from report import write_report
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from workload import ROOT, documentation_text

from nsa_http.config import make_settings
from nsa_http.server import run
from nsa_serve.async_engine import AsyncEngine
from nsa_serve.config import EngineConfig
from nsa_serve.messages import (
    AbortRequests,
    AddRequest,
    CacheComponent,
    EngineInfo,
    EngineReady,
    EngineStats,
    StepOutputs,
    ToEngine,
)
from nsa_serve.model_source import load_tokenizer
from nsa_serve.output import OutputProcessor
from nsa_serve.request import FinishReason, TokenOutput

NUM_STREAMS = 256
TOKENS_PER_S = 50.0
MAX_TOKENS = 1_000_000
# An event of this server in the same run; the bare server's chunks are as long.
_BARE_CHUNK = b"data: " + b"x" * 242 + b"\n\n"


class StubProcess:
    """Stands for the engine process: a step gives each request the next token of a text."""

    def __init__(self, engine: "StubEngine", token_ids: list[int], tokens_per_s: float) -> None:
        self._engine = engine
        self._token_ids = token_ids
        self._period_s = 1 / tokens_per_s if tokens_per_s else 0.0
        self._positions: dict[str, int] = {}
        self._left: dict[str, int] = {}
        self._num_steps = 0
        self._stepping = asyncio.create_task(self._step_forever())

    def send(self, message: ToEngine) -> None:
        """Take a message of the engine client."""
        if isinstance(message, AddRequest):
            request_id = message.request.request_id
            self._positions[request_id] = len(self._positions) * 211 % len(self._token_ids)
            self._left[request_id] = message.request.params.max_tokens or MAX_TOKENS
        elif isinstance(message, AbortRequests):
            for request_id in message.request_ids:
                self._positions.pop(request_id, None)

    async def stop(self, *, timeout_s: float) -> None:
        """End the steps."""
        self._stepping.cancel()
        await asyncio.wait({self._stepping}, timeout=timeout_s)

    async def _step_forever(self) -> None:
        next_s = time.perf_counter()
        while True:
            if not self._positions:
                await asyncio.sleep(0.001)
                next_s = time.perf_counter()
                continue
            self._step()
            next_s += self._period_s
            # Saturated, this lets every reader run once.
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))

    def _step(self) -> None:
        outputs = []
        for request_id, position in list(self._positions.items()):
            self._left[request_id] -= 1
            is_last = self._left[request_id] <= 0
            outputs.append(
                TokenOutput(
                    request_id,
                    [self._token_ids[position]],
                    finish_reason=FinishReason.LENGTH if is_last else None,
                )
            )
            if is_last:
                del self._positions[request_id]
            else:
                self._positions[request_id] = (position + 1) % len(self._token_ids)
        self._num_steps += 1
        stats = EngineStats(num_steps_total=self._num_steps, num_running=len(self._positions))
        self._engine.receive(StepOutputs(outputs, stats))


class StubEngine(AsyncEngine):
    """The real engine client with a stub for the process behind it."""

    tokens_per_s = 0.0

    def receive(self, message: StepOutputs) -> None:
        """Handle a step as if it had come from the engine process."""
        self._on_message(message)

    @classmethod
    async def start(cls, config: EngineConfig, **options: Any) -> "StubEngine":
        """Load the tokenizer; there is nothing else to start."""
        options.pop("command", None)
        self = cls(config, **options)
        self._tokenizer = load_tokenizer(config)
        self._outputs = OutputProcessor(self._tokenizer)
        token_ids = self._tokenizer.encode(documentation_text(), add_special_tokens=False)
        self._process = StubProcess(self, token_ids, cls.tokens_per_s)  # type: ignore[assignment]
        info = EngineInfo(
            family="stub",
            dtype="none",
            device="none",
            num_parameters=0,
            weight_bytes=0,
            max_model_len=2 * MAX_TOKENS,
            max_num_seqs=NUM_STREAMS,
            vocab_size=self._tokenizer.vocab_size,
            page_size=64,
            num_pages=1,
            cache=[CacheComponent("none", 0.0, 0)],
            phase_s={},
        )
        self._on_message(EngineReady(info))
        self._info = await self._ready
        if self._metrics is not None:
            self._metrics.on_engine_ready(info)
        return self


def serve(port: int, tokens_per_s: float) -> int:
    """Run the server over the stub."""
    StubEngine.tokens_per_s = tokens_per_s
    engine = {"max_num_seqs": NUM_STREAMS, "max_num_queued_requests": NUM_STREAMS}
    settings = make_settings({"port": port, "log_requests": False, **engine}, None)
    return run(settings, start_engine=StubEngine.start)


def serve_bare(port: int, tokens_per_s: float) -> None:
    """Run a Starlette application that streams constant chunks, under uvicorn's defaults."""

    async def chunks() -> AsyncIterator[bytes]:
        next_s = time.perf_counter()
        while True:
            yield _BARE_CHUNK
            next_s += 1 / tokens_per_s if tokens_per_s else 0.0
            await asyncio.sleep(max(0.0, next_s - time.perf_counter()))

    async def stream(_request: Request) -> StreamingResponse:
        return StreamingResponse(chunks(), media_type="text/event-stream")

    app = Starlette(routes=[Route("/v1/completions", stream, methods=["POST"])])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        config = uvicorn.Config(app, port=port, log_level="error", access_log=False)
        runner.run(uvicorn.Server(config).serve())


def measure(kind: str, tokens_per_s: float, seconds: float, *, path: str) -> dict[str, Any]:
    """Start a server, load it for `seconds`, and return counts, gaps and CPU time."""
    port = free_port()
    command = [sys.executable, __file__, "--role", kind, "--port", str(port)]
    command += ["--tokens-per-s", str(tokens_per_s)]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        load = run_load(
            StreamLoad(
                port=port,
                path=path,
                num_streams=NUM_STREAMS,
                seconds=seconds,
                max_tokens=MAX_TOKENS,
                pid=server.pid,
            )
        )
    finally:
        server.send_signal(signal.SIGKILL)
        server.wait()
    return load.to_dict()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / "api-overhead.json"
    )
    parser.add_argument("--role", choices=("server", "bare"), help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--tokens-per-s", type=float, default=0.0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "server":
        return serve(options.port, options.tokens_per_s)
    if options.role == "bare":
        serve_bare(options.port, options.tokens_per_s)
        return 0
    runs = []
    for _ in range(options.repeats):
        for path in ("/v1/completions", "/v1/chat/completions"):
            for rate in (TOKENS_PER_S, 0.0):
                run_result = measure("server", rate, options.seconds, path=path)
                runs.append({"server": "nsa-serve", "path": path, "rate": rate, **run_result})
                print(json.dumps(runs[-1]), flush=True)
        for rate in (TOKENS_PER_S, 0.0):
            run_result = measure("bare", rate, options.seconds, path="/v1/completions")
            runs.append({"server": "bare", "path": "-", "rate": rate, **run_result})
            print(json.dumps(runs[-1]), flush=True)
    result = {
        "command": f"python benchmarks/api_overhead.py --repeats {options.repeats} "
        f"--seconds {options.seconds:g}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("nsa-serve", "starlette", "uvicorn")},
        "num_streams": NUM_STREAMS,
        "runs": runs,
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    write_report()
    return 0


if __name__ == "__main__":
    sys.exit(main())
