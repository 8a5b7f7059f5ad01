"""Log lines: text or JSON, request ids in each, prompts only when asked for."""

import asyncio
import json
import logging
import warnings
from collections.abc import Callable, Iterator

import httpx
import pytest

from nsa_http.app import create_app
from nsa_http.logs import REQUEST_ID, configure_logging
from nsa_http.stats import log_stats_forever
from nsa_serve.log_format import configure_engine_process
from nsa_serve.messages import EngineStats
from tests.e2e.process import Process
from tests.server.fake_engine import FakeEngine, make_app, make_state

ReadLog = Callable[[], str]
NAMES = ("", "nsa_http", "nsa_serve", "uvicorn.error", "py.warnings")


@pytest.fixture
def read_log(capsys: pytest.CaptureFixture[str]) -> Iterator[ReadLog]:
    """Returns what was logged to standard error; the configuration is put back afterwards."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    levels = {name: logging.getLogger(name).level for name in NAMES}
    yield lambda: capsys.readouterr().err
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def client_of(engine: FakeEngine, **options: object) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=make_app(engine, **options))
    return httpx.AsyncClient(transport=transport, base_url="http://server")


async def test_json_lines_carry_the_request(engine: FakeEngine, read_log: ReadLog) -> None:
    configure_logging("info", "json")
    async with client_of(engine) as client:
        headers = {"x-request-id": "mine-1"}
        await client.post("/v1/completions", json={"prompt": "sesame"}, headers=headers)
    log = read_log()
    entry = json.loads(log.splitlines()[-1])
    assert entry["duration_s"] >= 0
    expected = {
        "level": "info",
        "logger": "nsa_http.middleware",
        "request_id": "mine-1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
    }
    assert entry.items() >= expected.items()
    assert entry["time"].endswith("Z")
    assert "sesame" not in log


async def test_errors_and_warnings_have_the_same_form(read_log: ReadLog) -> None:
    configure_logging("info", "json")
    token = REQUEST_ID.set("r")
    try:
        raise ZeroDivisionError("a\nb")
    except ZeroDivisionError:
        logging.getLogger("uvicorn.error").exception("it failed")
    REQUEST_ID.reset(token)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    configure_engine_process("json", "info")
    logging.getLogger("nsa_serve.engine").info("loaded")
    failed, warned, loaded = (json.loads(line) for line in read_log().splitlines())
    assert "ZeroDivisionError: a\nb" in failed["exception"]
    assert failed["request_id"] == "r"
    assert (warned["logger"], warned["level"]) == ("py.warnings", "warning")
    assert "request_id" not in warned
    assert loaded["request_id"] == "engine"


async def test_text_lines_carry_the_id(engine: FakeEngine, read_log: ReadLog) -> None:
    configure_logging("info")
    async with client_of(engine) as client:
        await client.get("/v1/models", headers={"x-request-id": "mine-2"})
    assert "INFO    [mine-2] GET /v1/models 200 in " in read_log()


async def test_the_level_holds_for_ours(read_log: ReadLog) -> None:
    configure_logging("error")
    logging.getLogger("nsa_http.x").warning("hidden")
    logging.getLogger("nsa_serve.x").error("shown")
    log = read_log()
    assert "hidden" not in log
    assert "shown" in log


@pytest.mark.parametrize("prompt", ["open\nsesame", [1, 2, 3]])
async def test_prompts_are_logged_when_asked_for(
    engine: FakeEngine, read_log: ReadLog, prompt: object
) -> None:
    configure_logging("info", "json")
    async with client_of(engine, log_prompts=True) as client:
        response = await client.post("/v1/completions", json={"prompt": prompt})
        assert response.status_code == 200
    entry = json.loads(read_log().splitlines()[0])
    assert entry["prompt"] == prompt
    assert entry["num_prompt_tokens"] == len(prompt)  # type: ignore[arg-type]
    assert entry["request_id"] == response.headers["x-request-id"]


async def test_a_line_tells_what_runs(engine: FakeEngine, caplog: pytest.LogCaptureFixture) -> None:
    state = make_state(engine)
    create_app(state)
    engine.stats = EngineStats(
        num_running=2,
        num_waiting=1,
        num_pages=100,
        num_free_pages=75,
        prefix_cache_queries_total=200,
        prefix_cache_hits_total=50,
    )
    with caplog.at_level("INFO", logger="nsa_http.stats"):
        task = asyncio.create_task(log_stats_forever(state, interval_s=0.02))
        state.metrics.on_first_token(30, 0)
        state.metrics.add_generation_tokens(40)
        while not caplog.messages:
            await asyncio.sleep(0.005)
        task.cancel()
    line = caplog.messages[0]
    assert "running 2, waiting 1, preempted 0, cache 25.0%, prefix hits 25.0%" in line
    assert line.startswith("prompt ")


def test_a_json_log_is_json_from_start_to_end() -> None:
    process = Process("-m", "tests.server.live", "--port", "0", "--log-format", "json")
    try:
        process.wait_ready()
        process.popen.terminate()
        assert process.wait_exit() == 0
    finally:
        process.kill()
    messages = [json.loads(line)["message"] for line in process.log.splitlines()]
    assert any(message.startswith("ready on http://") for message in messages)
