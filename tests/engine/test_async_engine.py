"""AsyncEngine over a real engine process that runs a fake engine: streams, aborts, every death."""

import asyncio
import contextlib
import gc
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from nsa_serve.async_engine import AsyncEngine
from nsa_serve.config import EngineConfig
from nsa_serve.errors import (
    CapacityError,
    EngineDeadError,
    ModelError,
    NSAServeError,
    QueueFullError,
    RequestError,
)
from nsa_serve.fold import fold
from nsa_serve.messages import LoadProgress
from nsa_serve.metrics import Metrics
from nsa_serve.request import FinishReason, RequestOutput, SamplingParams
from nsa_serve.request_stream import RequestStream
from nsa_serve.tokenizer import Tokenizer

from .byte_tokenizer import make_byte_tokenizer
from .fake_engine import INFO, MAX_MODEL_LEN, POISON_TOKEN, REFUSED_TOKEN, VOCAB_SIZE

SCRIPT = Path(__file__).with_name("fake_engine.py")
PROMPT = [1, 2, 3]
LONG = SamplingParams(max_tokens=400)

StartEngine = Callable[..., Awaitable[AsyncEngine]]


def command(**options: Any) -> tuple[str, ...]:
    return (sys.executable, str(SCRIPT), json.dumps(options))


def load_tokenizer(_config: EngineConfig) -> Tokenizer:
    return make_byte_tokenizer()


def text_of(num_tokens: int) -> str:
    return "".join(chr(ord("a") + i % 26) for i in range(num_tokens))


@pytest.fixture
async def start(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[StartEngine]:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    engines: list[AsyncEngine] = []
    num_fds = len(os.listdir("/proc/self/fd"))

    async def start_engine(
        *, config: dict[str, Any] | None = None, metrics: Metrics | None = None, **options: Any
    ) -> AsyncEngine:
        stall_timeout_s = options.pop("stall_timeout_s", 60.0)
        engine = await AsyncEngine.start(
            EngineConfig(**(config or {})),
            metrics=metrics,
            command=command(**options),
            make_tokenizer=load_tokenizer,
            stall_timeout_s=stall_timeout_s,
        )
        engines.append(engine)
        return engine

    yield start_engine
    for engine in engines:
        await engine.close()
        assert engine.num_requests == 0
        assert not is_alive(engine.pid), "a zombie or an orphan was left"
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= num_fds, "a descriptor leaked"


def is_alive(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


async def read(stream: RequestStream) -> list[RequestOutput]:
    return [output async for output in stream]


async def read_folded(stream: RequestStream) -> RequestOutput:
    return fold(await read(stream))


async def wait_until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_request_streams_its_tokens(start: StartEngine) -> None:
    engine = await start()
    assert engine.info == INFO
    stream = engine.generate(PROMPT, SamplingParams(max_tokens=40), request_id="r1")
    outputs = await read(stream)
    assert outputs[0].prompt_token_ids == PROMPT
    assert all(output.finish_reason is None for output in outputs[:-1])
    whole = fold(outputs)
    assert whole.text == text_of(40) and whole.request_id == "r1"
    assert whole.finish_reason is FinishReason.LENGTH
    assert (whole.num_prompt_tokens, whole.num_output_tokens) == (3, 40)
    assert bytes(whole.token_ids).decode() == whole.text
    engine.check_health()


async def test_requests_with_one_client_id_do_not_meet(start: StartEngine) -> None:
    engine = await start()
    streams = [
        engine.generate(PROMPT, SamplingParams(max_tokens=n), request_id="same")
        for n in (5, 30, 17)
    ]
    results = await asyncio.gather(*map(read_folded, streams))
    assert [result.text for result in results] == [text_of(5), text_of(30), text_of(17)]
    assert {result.request_id for result in results} == {"same"}


async def test_n_samples_are_interleaved_in_one_stream(start: StartEngine) -> None:
    engine = await start(step_s=0.002)
    outputs = await read(
        engine.generate(PROMPT, SamplingParams(max_tokens=25, seed=2**63 - 2), request_id="r", n=4)
    )
    assert [output.index for output in outputs[:8]] != [0] * 8
    for index in range(4):
        sample = fold([output for output in outputs if output.index == index])
        assert sample.text == text_of(25)
        assert sample.prompt_token_ids == PROMPT


async def test_a_stop_string_ends_the_request_in_the_engine(start: StartEngine) -> None:
    engine = await start()
    params = SamplingParams(max_tokens=400, stop=("fgh",))
    result = await read_folded(engine.generate(PROMPT, params, request_id="r"))
    assert (result.text, result.stop_reason) == ("abcde", "fgh")
    assert result.finish_reason is FinishReason.STOP
    await wait_until(lambda: engine.stats.num_running == 0)


async def test_a_slow_reader_gets_folded_outputs(start: StartEngine) -> None:
    engine = await start()
    stream = engine.generate(PROMPT, LONG, request_id="r", n=2)
    await wait_until(lambda: engine.num_requests == 0)
    outputs = await read(stream)
    assert len(outputs) == 2
    for output in outputs:
        assert output.text == text_of(400) and output.finish_reason is FinishReason.LENGTH
        assert output.prompt_token_ids == PROMPT


@pytest.mark.parametrize("how", ["aclose", "cancel", "drop", "unread"])
async def test_a_stream_that_is_left_aborts_its_request(start: StartEngine, how: str) -> None:
    engine = await start(step_s=0.005)
    stream = engine.generate(PROMPT, LONG, request_id="r", n=3)
    await wait_until(lambda: engine.stats.num_running == 3)
    if how == "aclose":
        await anext(stream)
        await stream.aclose()
        assert [output async for output in stream] == []
    elif how == "cancel":
        task = asyncio.create_task(read(stream))
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    elif how == "drop":
        async for _ in stream:
            break
    del stream
    gc.collect()
    await wait_until(lambda: engine.num_requests == 0 and engine.stats.num_running == 0)


async def test_requests_are_checked_by_the_call(start: StartEngine) -> None:
    engine = await start(config={"max_num_queued_requests": 2, "max_num_seqs": 1})
    one = SamplingParams(max_tokens=1)
    bad: list[tuple[list[int], SamplingParams, int, str]] = [
        ([], one, 1, "empty"),
        ([1, VOCAB_SIZE], one, 1, f"token id {VOCAB_SIZE}"),
        ([-1, 1], one, 1, "token id -1"),
        ([1] * MAX_MODEL_LEN, one, 1, f"max_model_len is {MAX_MODEL_LEN}"),
        ([1] * (MAX_MODEL_LEN + 1), SamplingParams(max_tokens=0), 1, "501 tokens, but"),
        (PROMPT, SamplingParams(max_tokens=MAX_MODEL_LEN + 1), 1, "max_tokens is 501, but"),
        ([1], SamplingParams(stop_token_ids=(VOCAB_SIZE,)), 1, "stop_token_ids"),
        ([1], one, 0, "n must be"),
        ([1], one, 4, "n is 4"),
    ]
    for prompt, params, n, message in bad:
        with pytest.raises(RequestError, match=message):
            engine.generate(prompt, params, request_id="r", n=n)
    assert engine.num_requests == 0
    longest = engine.generate([1] * (MAX_MODEL_LEN - 1), one, request_id="r")
    assert (await read_folded(longest)).num_output_tokens == 1


async def test_the_queue_is_bounded_exactly(start: StartEngine) -> None:
    metrics = Metrics("m")
    engine = await start(
        config={"max_num_queued_requests": 4, "max_num_seqs": 2}, metrics=metrics, step_s=0.01
    )
    first = await read_folded(engine.generate(PROMPT, SamplingParams(), request_id="r"))
    assert first.num_output_tokens == 16
    accepted, refused = [], []
    for i in range(64):
        try:
            accepted.append(engine.generate(PROMPT, SamplingParams(), request_id=str(i)))
        except QueueFullError as error:
            refused.append(error)
    assert (len(accepted), len(refused)) == (6, 58)
    assert all(1 <= error.retry_after_s <= 120 for error in refused)
    with pytest.raises(QueueFullError):
        engine.generate(PROMPT, SamplingParams(), request_id="r", n=2)
    results = await asyncio.gather(*map(read_folded, accepted))
    assert all(result.text == text_of(16) for result in results)
    assert b'reason="queue_full"} 59.0' in metrics.render()


async def test_metrics_count_every_token_and_end(start: StartEngine) -> None:
    metrics = Metrics("m")
    engine = await start(metrics=metrics)
    for _ in range(3):
        await read(engine.generate(PROMPT, SamplingParams(max_tokens=7), request_id="r"))
    await engine.generate(PROMPT, LONG, request_id="r").aclose()
    lines = metrics.render().decode().splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    labels = 'engine="0",model_name="m"'
    assert values[f"nsa_serve:generation_tokens_total{{{labels}}}"] == "21.0"
    assert values[f"nsa_serve:time_to_first_token_seconds_count{{{labels}}}"] == "3.0"
    assert values[f"nsa_serve:inter_token_latency_seconds_count{{{labels}}}"] == "18.0"
    assert values[f"nsa_serve:request_queue_time_seconds_sum{{{labels}}}"] == "1.5"
    ends = {
        reason: value
        for key, value in values.items()
        for reason in ("length", "abort")
        if key.startswith("nsa_serve:request_success_total") and f'"{reason}"' in key
    }
    assert ends == {"length": "3.0", "abort": "1.0"}


async def test_what_is_logged_of_a_request_bears_its_callers_context(
    start: StartEngine, caplog: pytest.LogCaptureFixture
) -> None:
    caller: ContextVar[str] = ContextVar("caller", default="nobody")
    engine = await start()
    callers: list[str] = []

    def note_caller(record: logging.LogRecord) -> bool:
        if "failed" in record.getMessage():
            callers.append(caller.get())
        return True

    caplog.handler.addFilter(note_caller)
    for name in ("ann", "bob"):
        token = caller.set(name)
        failing = engine.generate([POISON_TOKEN], LONG, request_id="r")
        caller.reset(token)
        with pytest.raises(NSAServeError):
            await read(failing)
    caplog.handler.removeFilter(note_caller)
    assert callers == ["ann", "bob"]


@pytest.mark.parametrize(
    ("token_id", "kind", "message"),
    [
        (REFUSED_TOKEN, RequestError, "^the fake engine refuses this prompt$"),
        (POISON_TOKEN, NSAServeError, "the request failed in the engine: internal error: ZeroDiv"),
    ],
    ids=["refused", "bug"],
)
async def test_a_request_that_fails_in_the_engine_fails_alone(
    start: StartEngine, token_id: int, kind: type[NSAServeError], message: str
) -> None:
    engine = await start(step_s=0.002)
    good = engine.generate(PROMPT, SamplingParams(max_tokens=30), request_id="good")
    bad = engine.generate([token_id], LONG, request_id="bad", n=2)
    with pytest.raises(NSAServeError, match=message) as raised:
        await read(bad)
    assert type(raised.value) is kind
    if isinstance(raised.value, RequestError):
        assert raised.value.param == "prompt"
    assert (await read_folded(good)).text == text_of(30)
    engine.check_health()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crash_at": 5}, "exited with code 9; its log ends: about to crash"),
        ({"raise_at": 5}, "RuntimeError: step failed"),
    ],
    ids=["exit", "exception"],
)
async def test_the_death_of_the_engine_reaches_every_reader(
    start: StartEngine, options: dict[str, int], message: str
) -> None:
    engine = await start(**options, step_s=0.01)
    streams = [engine.generate(PROMPT, LONG, request_id=str(i), n=2) for i in range(4)]
    results = await asyncio.gather(*map(read, streams), return_exceptions=True)
    for result in results:
        assert isinstance(result, EngineDeadError) and message in str(result)
        assert "\n" not in str(result)
    assert message in str(await engine.wait_dead())
    with pytest.raises(EngineDeadError, match="engine"):
        engine.check_health()
    with pytest.raises(EngineDeadError):
        engine.generate(PROMPT, LONG, request_id="late")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_to_the_whole_group_leaves_running_requests_alone(
    start: StartEngine, number: signal.Signals
) -> None:
    engine = await start(step_s=0.002)
    stream = engine.generate(PROMPT, SamplingParams(max_tokens=40), request_id="r")
    await anext(stream)
    os.kill(engine.pid, number)
    assert (await read_folded(stream)).finish_reason is FinishReason.LENGTH
    again = engine.generate(PROMPT, SamplingParams(max_tokens=5), request_id="r")
    assert (await read_folded(again)).text == text_of(5)
    await engine.close()
    assert not is_alive(engine.pid)


async def test_a_killed_engine_is_noticed_while_idle(start: StartEngine) -> None:
    engine = await start()
    os.kill(engine.pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        assert f"signal {signal.SIGKILL}" in str(await engine.wait_dead())


@pytest.mark.parametrize("options", [{"hang_at": 3}, {"stuck": True}], ids=["hangs", "spins"])
async def test_no_progress_is_bad_health(start: StartEngine, options: dict[str, Any]) -> None:
    engine = await start(stall_timeout_s=0.5, **options)
    engine.check_health()
    stream = engine.generate(PROMPT, LONG, request_id="r")
    engine.check_health()
    await asyncio.sleep(0.7)
    with pytest.raises(EngineDeadError, match="no progress"):
        engine.check_health()
    await stream.aclose()
    # The fixture closes an engine that does not answer: it must be killed, not waited for.
    if "hang_at" in options:
        os.kill(engine.pid, signal.SIGKILL)


async def test_a_slow_engine_is_healthy_and_a_stopped_one_is_not(start: StartEngine) -> None:
    engine = await start(stall_timeout_s=2.0, step_s=0.6)
    stream = engine.generate(PROMPT, SamplingParams(max_tokens=4), request_id="r")
    async for _ in stream:  # longer than the timeout in all, but not without a step
        engine.check_health()
    os.kill(engine.pid, signal.SIGSTOP)

    def is_sick() -> bool:
        try:
            engine.check_health()
        except EngineDeadError as error:
            return "no progress" in str(error)
        return False

    await wait_until(is_sick)
    os.kill(engine.pid, signal.SIGKILL)


async def test_close_ends_what_runs(start: StartEngine) -> None:
    engine = await start(step_s=0.01)
    reader = asyncio.create_task(read(engine.generate(PROMPT, LONG, request_id="r")))
    await asyncio.sleep(0.05)
    await asyncio.gather(engine.close(), engine.close())
    with pytest.raises(EngineDeadError, match="shut down"):
        await reader
    assert not is_alive(engine.pid)
    with pytest.raises(EngineDeadError, match="shut down"):
        engine.generate(PROMPT, LONG, request_id="late")


@pytest.mark.parametrize(
    ("load_error", "error", "message"),
    [
        ("capacity", CapacityError, "^a-model does not fit$"),
        ("bug", EngineDeadError, "KeyError: 'bug'"),
        ("crash", EngineDeadError, "signal 9; its log ends: no such luck"),
    ],
)
async def test_a_failed_start_says_why_and_leaves_nothing(
    start: StartEngine, load_error: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        await start(config={"model": "a-model"}, load_error=load_error)
    assert children_of_this_process() == []


async def test_a_failed_tokenizer_stops_the_start(start: StartEngine) -> None:
    def fail(_config: EngineConfig) -> Tokenizer:
        raise ModelError("no tokenizer")

    with pytest.raises(ModelError, match="no tokenizer"):
        await AsyncEngine.start(EngineConfig(), command=command(load_s=60.0), make_tokenizer=fail)
    assert children_of_this_process() == []


async def test_a_cancelled_start_leaves_nothing(start: StartEngine) -> None:
    progress: list[LoadProgress] = []
    task = asyncio.create_task(
        AsyncEngine.start(
            EngineConfig(),
            on_progress=progress.append,
            command=command(load_s=60.0),
            make_tokenizer=load_tokenizer,
        )
    )
    await wait_until(lambda: len(progress) == 3)
    assert [item.done for item in progress] == [0, 1, 2]
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children_of_this_process() == []


def children_of_this_process() -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{os.getpid()}/task").iterdir():
        # A thread may end in between; its children are then another thread's.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children += map(int, (task / "children").read_text().split())
    return children


async def test_the_engine_follows_a_killed_parent(tmp_path: Path, start: StartEngine) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, sys\n"
        "from nsa_serve.async_engine import AsyncEngine\n"
        "from nsa_serve.config import EngineConfig\n"
        "from tests.engine.byte_tokenizer import make_byte_tokenizer\n"
        "async def main():\n"
        f"    engine = await AsyncEngine.start(EngineConfig(), command={command(step_s=30.0)!r},\n"
        "        make_tokenizer=lambda config: make_byte_tokenizer())\n"
        "    assert 'torch' not in sys.modules\n"
        "    from nsa_serve.request import SamplingParams\n"
        "    stream = engine.generate([1], SamplingParams(), request_id='r')\n"
        "    sys.stdout.write(f'{engine.pid}\\n'); sys.stdout.flush()\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=root,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])},
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        engine_pid = int(await asyncio.to_thread(parent.stdout.readline))
        assert is_alive(engine_pid)
        parent.kill()
    await wait_until(lambda: not is_running(engine_pid))


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (nobody may be there to reap an orphan)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
