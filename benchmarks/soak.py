"""A mixed load for minutes or hours: what may not fail does not, and nothing grows.

    python benchmarks/soak.py --minutes 30 --clients 300 --out soak.json [-- --device cuda]
    python benchmarks/soak.py --url http://127.0.0.1:8000 --minutes 30

Clients ask in a loop: prompts of all lengths, some with a beginning in common, streamed or not,
every sampling option, structured output, log-probabilities, n, priorities, bad requests, and some
go away in the middle of a stream. Without --url a server is started, with few pages, so that
requests are preempted; what follows `--` are more flags for it. It must hold that

- no answer is a 5xx, but 503, and none but a bad request is a 4xx;
- no client waits longer than --stall-s for the next byte;
- answers are as long as asked, structured ones match, and a bad request is refused;
- greedy probes give the text that they gave when the server was idle (in float32);
- at the end no request is left and every page is free;
- memory of processes and GPU has not grown since the first third (told from --minutes 3 on).

Exits with 1 when any of it does not.
"""

import argparse
import asyncio
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from cpu import commit, machine
from soak_requests import Answer, Ask, Asks
from workload import ROOT, documentation_text

from nsa_client.sse import SSEDecoder

_FLAGS = ("--dtype", "float32", "--scheduling-policy", "priority")
_START_TIMEOUT_S = 600.0
_PROBE_PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils at a temperature of",
)
_PROBE_TOKENS = 24
_SAMPLE_S = 2.0
# What memory may grow by from the first third to the last tenth: allocators keep what they had.
_GROWTH_SHARE, _GROWTH_BYTES = 0.03, 64 << 20
_MAX_FAILURES = 50


@dataclass
class Outcome:
    """What happened. num: answers by kind and status. failures: what should not have happened."""

    num: Counter[str] = field(default_factory=Counter)
    first_byte_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_probes: int = 0
    longest_wait_s: float = 0.0
    num_failures: int = 0
    failures: list[str] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)

    def fail(self, text: str) -> None:
        """Note that something is wrong."""
        self.num_failures += 1
        if len(self.failures) < _MAX_FAILURES:
            self.failures.append(text)
            print(f"FAILED: {text}", flush=True)


class Soak:
    """Clients of one server. pids: of its processes, when they are on this machine."""

    def __init__(
        self, client: httpx.AsyncClient, model: str, pids: list[int], *, stall_s: float
    ) -> None:
        self.client = client
        self.model = model
        self.pids = pids
        self.stall_s = stall_s
        self.outcome = Outcome()
        self.end_s = 0.0
        self._probes: dict[str, str] = {}

    @property
    def is_over(self) -> bool:
        """True when no more requests are to be sent."""
        return time.monotonic() >= self.end_s

    async def run(self, asks: Asks, num_clients: int, seconds: float) -> None:
        """Run the clients, then look at what is left."""
        for prompt in _PROBE_PROMPTS:
            self._probes[prompt] = await self._probe(prompt)
        self.end_s = time.monotonic() + seconds
        sampler = asyncio.create_task(self._sample_memory())
        clients = [self._ask_forever(asks) for _ in range(num_clients)]
        await asyncio.gather(*clients, *(self._probe_forever(p) for p in _PROBE_PROMPTS))
        await self._wait_until_idle()
        sampler.cancel()
        await asyncio.gather(sampler, return_exceptions=True)

    async def metrics(self) -> dict[str, float]:
        """Return the sums of the server's samples over their labels, by name."""
        samples: dict[str, float] = {}
        for line in (await self.client.get("/metrics")).text.splitlines():
            match = re.fullmatch(r"(?:nsa_serve:)?(\w+)(?:\{.*\})? ([\d.e+-]+)", line)
            if match and not line.startswith("vllm:"):
                samples[match[1]] = samples.get(match[1], 0.0) + float(match[2])
        return samples

    async def _ask_forever(self, asks: Asks) -> None:
        while not self.is_over:
            ask = asks.draw()
            try:
                await self._ask(ask)
            except httpx.TimeoutException:
                self.outcome.fail(f"{ask.kind}: nothing came for {self.stall_s} s")
            except httpx.HTTPError as error:
                self.outcome.fail(f"{ask.kind}: {type(error).__name__}: {error}")

    async def _ask(self, ask: Ask) -> None:
        body = {"model": self.model, **ask.body}
        if body.get("stream"):
            body["stream_options"] = {"include_usage": True}
        start_s = time.monotonic()
        answer, num_events, is_whole = Answer(), 0, False
        async with self.client.stream("POST", "/v1/completions", json=body) as response:
            self._note_status(ask, response.status_code)
            if response.status_code != 200:
                text = (await response.aread()).decode()
                if not self._is_expected(ask, response.status_code):
                    self.outcome.fail(f"{ask.kind}: {response.status_code} {text[:300]}")
                if response.status_code == 503:
                    await asyncio.sleep(float(response.headers.get("retry-after", 1)))
                return
            async for message in _messages(response, is_stream=bool(body.get("stream"))):
                if num_events == 0:
                    self.outcome.first_byte_s.append(time.monotonic() - start_s)
                if message is None:
                    is_whole = True
                    break
                if "error" in message:
                    self.outcome.fail(f"{ask.kind}: {message}")
                    return
                answer.add(message)
                num_events += 1
                if ask.cancel_after is not None and num_events > ask.cancel_after:
                    return
        if ask.is_bad:
            self.outcome.fail(f"a bad request was answered: {json.dumps(ask.body)}")
        elif not is_whole:
            self.outcome.fail(f"{ask.kind}: the answer has no end")
        else:
            self._check(ask, answer)

    def _check(self, ask: Ask, answer: Answer) -> None:
        self.outcome.num_tokens += answer.num_tokens
        wrong = ask.check(answer)
        if set(answer.reasons) != set(range(ask.n)):
            wrong = f"choices {sorted(answer.reasons)} of {ask.n} ended"
        elif not set(answer.reasons.values()) <= {"stop", "length"}:
            wrong = f"finish reasons {answer.reasons}"
        if wrong is not None:
            self.outcome.fail(f"{ask.kind}: {wrong}; {json.dumps(ask.body)[:500]}")

    def _note_status(self, ask: Ask, status: int) -> None:
        self.outcome.num[f"{ask.kind} {status}"] += 1

    def _is_expected(self, ask: Ask, status: int) -> bool:
        return status == 503 or (ask.is_bad and 400 <= status < 500)

    async def _probe(self, prompt: str) -> str:
        """Return the greedy text of a prompt; tries again while the server is full."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": _PROBE_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "priority": -2,
        }
        while True:
            response = await self.client.post("/v1/completions", json=body)
            if response.status_code == 200:
                text: str = response.json()["choices"][0]["text"]
                return text
            if response.status_code != 503:
                raise httpx.HTTPError(f"a probe got {response.status_code} {response.text[:300]}")
            await asyncio.sleep(0.2)

    async def _probe_forever(self, prompt: str) -> None:
        while not self.is_over:
            try:
                text = await self._probe(prompt)
            except httpx.HTTPError as error:
                self.outcome.fail(f"probe: {type(error).__name__}: {error}")
                continue
            self.outcome.num_probes += 1
            if text != self._probes[prompt]:
                self.outcome.fail(f"probe {prompt!r}: {text!r}, not {self._probes[prompt]!r}")
            await asyncio.sleep(0.5)

    async def _wait_until_idle(self) -> None:
        deadline_s = time.monotonic() + 30
        left: dict[str, float] = {}
        while time.monotonic() < deadline_s:
            metrics = await self.metrics()
            names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
            left = {name: metrics[name] for name in names}
            if not any(left.values()):
                return
            await asyncio.sleep(0.2)
        self.outcome.fail(f"after all clients are gone, the server has {left}")

    async def _sample_memory(self) -> None:
        start_s = time.monotonic()
        while True:
            sample = {"t_s": round(time.monotonic() - start_s, 1)}
            for number, pid in enumerate(self.pids):
                sample[f"rss_{number}"] = float(rss_bytes(pid))
            gpu = await asyncio.to_thread(gpu_bytes)
            if gpu is not None:
                sample["gpu"] = float(gpu)
            self.outcome.memory.append(sample)
            await asyncio.sleep(_SAMPLE_S)


async def _messages(
    response: httpx.Response, *, is_stream: bool
) -> AsyncIterator[dict[str, Any] | None]:
    """Yield the chunks of an answer, then None if it came to its end."""
    if not is_stream:
        yield json.loads(await response.aread())
        yield None
        return
    # Not aiter_lines: it also ends a line at U+0085 or U+2028, which an answer may hold.
    decoder = SSEDecoder()
    async for data in response.aiter_bytes():
        for event in decoder.feed(data):
            yield None if event.data == "[DONE]" else json.loads(event.data)


def rss_bytes(pid: int) -> int:
    """Return the memory of a process that is not shared with files; 0 when it has ended."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    match = re.search(r"RssAnon:\s+(\d+) kB", text) or re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(match[1]) << 10 if match else 0


def gpu_bytes() -> int | None:
    """Return the memory in use on the first GPU; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        text = subprocess.check_output(query, text=True, timeout=10)
        return int(text.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def growth(memory: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the first bytes, the last ones and whether that is growth, by what was measured.

    first: the most up to a third of the time, since much is built when it is first needed.
    """
    found = {}
    for name in memory[-1].keys() - {"t_s"} if memory else ():
        values = [sample[name] for sample in memory if name in sample]
        first = max(values[: max(1, len(values) // 3)])
        last = statistics.median(values[-max(1, len(values) // 10) :])
        allowed = max(_GROWTH_SHARE * first, _GROWTH_BYTES)
        found[name] = {"first": first, "last": last, "has_grown": float(last > first + allowed)}
    return found


@asynccontextmanager
async def serving(
    arguments: argparse.Namespace, log_path: Path
) -> AsyncIterator[tuple[str, list[int]]]:
    """Yield the address and the process ids of the server: the one given, or one of our own."""
    if arguments.url is not None:
        yield arguments.url.rstrip("/"), []
        return
    command = [
        *(sys.executable, "-m", "nsa_http", "serve"),
        *((arguments.model,) if arguments.model else ()),
        *("--port", "0", "--page-memory", arguments.page_memory),
        *_FLAGS,
        *arguments.server_flags,
    ]
    path = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "server"))
    with log_path.open("w") as log:
        server = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}
        )
    try:
        url = await _wait_ready(server, log_path)
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
        yield url, [server.pid, *map(int, children)]
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(timeout=60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


async def _wait_ready(server: "subprocess.Popen[bytes]", log_path: Path) -> str:
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s and server.poll() is None:
        match = re.search(r"ready on (https?://\S+)", log_path.read_text())
        if match:
            return match[1]
        await asyncio.sleep(0.2)
    raise SystemExit(f"the server did not get ready:\n{log_path.read_text()[-3000:]}")


def quantiles(values: list[float]) -> dict[str, float]:
    """Return the median, the 99th percentile and the largest."""
    ordered = sorted(values) or [0.0]
    return {
        name: round(ordered[min(len(ordered) - 1, int(len(ordered) * share))], 4)
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0))
    }


async def soak(arguments: argparse.Namespace, log_path: Path) -> dict[str, Any]:
    """Run it; return the report."""
    async with serving(arguments, log_path) as (url, pids):
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        timeout = httpx.Timeout(arguments.stall_s, pool=None)
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=timeout) as client:
            card = (await client.get("/v1/models")).json()["data"][0]
            answer = await client.post("/tokenize", json={"prompt": documentation_text()[:60_000]})
            run = Soak(client, card["id"], pids, stall_s=arguments.stall_s)
            asks = Asks(
                answer.raise_for_status().json()["tokens"],
                arguments.seed,
                max_prompt_tokens=min(
                    arguments.max_prompt_tokens,
                    card["max_model_len"] - arguments.max_output_tokens - 10,
                ),
                max_output_tokens=arguments.max_output_tokens,
            )
            before = await run.metrics()
            start_s = time.monotonic()
            await run.run(asks, arguments.clients, 60 * arguments.minutes)
            seconds = time.monotonic() - start_s
            after = await run.metrics()
        outcome = run.outcome
        changes = {name: after[name] - before.get(name, 0.0) for name in after}
        _judge(outcome, arguments, changes, has_own_server=bool(pids))
    log = log_path.read_text() if pids else ""
    for line in re.findall(r".*(?:Traceback|CUDA error).*", log)[:5]:
        outcome.fail(f"in the server's log: {line}")
    return {
        "command": " ".join(sys.argv),
        "commit": commit(),
        "machine": machine(),
        "seconds": round(seconds, 1),
        "num_clients": arguments.clients,
        "answers": dict(sorted(outcome.num.items())),
        "num_generated_tokens": int(changes["generation_tokens_total"]),
        "num_preemptions": int(changes["num_preemptions_total"]),
        "num_prefix_hit_tokens": int(changes["prefix_cache_hits_total"]),
        "num_probes": outcome.num_probes,
        "first_byte_s": quantiles(outcome.first_byte_s),
        "memory_bytes": growth(outcome.memory),
        "memory_samples": outcome.memory[:: max(1, len(outcome.memory) // 100)],
        "num_failures": outcome.num_failures,
        "failures": outcome.failures,
    }


def _judge(
    outcome: Outcome,
    arguments: argparse.Namespace,
    changes: dict[str, float],
    *,
    has_own_server: bool,
) -> None:
    """Note what can only be told at the end."""
    if outcome.num_probes == 0:
        outcome.fail("no probe was answered")
    if not changes["prefix_cache_hits_total"]:
        outcome.fail("no prefix was found in the cache")
    if has_own_server and not changes["num_preemptions_total"]:
        outcome.fail("no request was preempted: lower --page-memory")
    if arguments.minutes >= 3:
        for name, item in growth(outcome.memory).items():
            if item["has_grown"]:
                outcome.fail(f"{name} grew from {item['first']:.0f} to {item['last']:.0f} bytes")


def parse() -> argparse.Namespace:
    """Read the command line; what follows `--` is for the server."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a server that runs; default: one is started")
    parser.add_argument("--model", help="of the server that is started")
    parser.add_argument("--page-memory", default="160MiB", help="of the server that is started")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--max-prompt-tokens", type=int, default=1000)
    parser.add_argument("--max-output-tokens", type=int, default=60)
    parser.add_argument("--stall-s", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the report, as JSON")
    parser.add_argument("server_flags", nargs="*", help="flags for the server, after --")
    return parser.parse_args()


def main() -> int:
    """Run the soak; return the exit code."""
    arguments = parse()
    with tempfile.TemporaryDirectory() as folder:
        report = asyncio.run(soak(arguments, Path(folder) / "server.log"))
    shown = {name: value for name, value in report.items() if name != "memory_samples"}
    print(json.dumps(shown, indent=2))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if report["num_failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
