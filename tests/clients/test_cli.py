"""The terminal programs: a conversation, one completion, the benchmark's report."""

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from nsa_client import Client
from nsa_client.chat import run_chat
from nsa_client.cli import main
from nsa_client.write import write_stream
from tests.clients.raw_server import (
    DONE,
    PLAIN_HEAD,
    Exchange,
    RawServer,
    text_event,
    usage_event,
)


class Terminal(io.StringIO):
    """A text stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


class Interrupted(io.StringIO):
    """A text stream during whose first flush Ctrl-C is pressed."""

    is_first = True

    def flush(self) -> None:
        if self.is_first:
            self.is_first = False
            raise KeyboardInterrupt


def echo_client(conversations: list[Any]) -> Client:
    """A client whose server answers with the number of messages, and fails on the word `fail`."""

    def handler(request: httpx.Request) -> httpx.Response:
        messages = json.loads(request.content)["messages"]
        conversations.append(messages)
        if messages[-1]["content"] == "fail":
            return httpx.Response(400, json={"error": {"message": "too long"}})
        delta = {"role": "assistant", "content": f"#{len(messages)}"}
        chunk = {
            "id": "c",
            "model": "tiny",
            "created": 1,
            "choices": [{"index": 0, "delta": delta, "finish_reason": "stop"}],
        }
        return httpx.Response(200, content=f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    return Client(model="tiny", transport=httpx.MockTransport(handler))


def read_lines(*lines: str) -> Callable[[str], str]:
    left = list(lines)

    def read_line(prompt: str) -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return read_line


def test_chat_remembers_resets_and_exits() -> None:
    conversations: list[Any] = []
    out, err = io.StringIO(), io.StringIO()
    lines = read_lines("one", "", "two", "/reset", "three", "/exit", "never")
    client = echo_client(conversations)
    status = run_chat(client, lines, out, err, system="Be brief.", is_interactive=False)
    assert status == 0
    assert out.getvalue() == "#2\n#4\n#2\n"
    assert err.getvalue() == ""
    system = {"role": "system", "content": "Be brief."}
    assert conversations[1] == [
        system,
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "#2"},
        {"role": "user", "content": "two"},
    ]
    assert conversations[2] == [system, {"role": "user", "content": "three"}]


def test_a_failed_answer_is_forgotten_by_a_person_and_fatal_in_a_script() -> None:
    for is_interactive, status, answers in [(True, 0, ["#1", "#3"]), (False, 1, ["#1"])]:
        conversations: list[Any] = []
        out, err = io.StringIO(), io.StringIO()
        lines = read_lines("one", "fail", "two")
        client = echo_client(conversations)
        assert run_chat(client, lines, out, err, is_interactive=is_interactive) == status
        assert [line for line in out.getvalue().splitlines() if line.startswith("#")] == answers
        assert err.getvalue() == "error: too long\n"


def test_help_is_shown_at_the_start_and_on_request() -> None:
    out = io.StringIO()
    run_chat(echo_client([]), read_lines("/help"), out, io.StringIO(), is_interactive=True)
    assert out.getvalue().count("/reset") == 2


@pytest.mark.parametrize(
    ("out", "written"), [(Terminal(), "a�[2J�b\té\n\n"), (io.StringIO(), "a\x1b[2J\x9bb\té\n\n")]
)
def test_a_model_cannot_send_commands_to_the_terminal(out: io.StringIO, written: str) -> None:
    text = "a\x1b[2J\x9bb\té\n"
    body = text_event(text) + DONE
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    stream = Client(model="tiny", transport=transport).stream("x")
    assert write_stream(stream, out).text == text
    assert out.getvalue() == written


def test_an_interrupt_ends_the_answer_and_keeps_what_came() -> None:
    class Body(httpx.SyncByteStream):
        is_closed = False

        def __iter__(self) -> Any:
            yield text_event("half")
            yield text_event("never")

        def close(self) -> None:
            self.is_closed = True

    body = Body()
    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=body))
    stream = Client(model="tiny", transport=transport).stream("x")
    out = Interrupted()
    written = write_stream(stream, out)
    assert (written.text, written.is_interrupted) == ("half", True)
    assert out.getvalue() == "half\n"
    assert body.is_closed


async def respond(exchange: Exchange) -> None:
    prompt = exchange.json["prompt"]
    if "authorization: bearer sk-1" not in exchange.head.lower():
        await exchange.send(b'HTTP/1.1 401 No\r\n\r\n{"error":{"message":"no key"}}')
        return
    text = f"{prompt}|{exchange.json.get('max_tokens')}|{exchange.json.get('stop')}"
    await exchange.send(PLAIN_HEAD, text_event(text), usage_event(3, 1), DONE)


async def run_main(server: RawServer, *args: str) -> int:
    return await asyncio.to_thread(main, [*args, "--url", server.url, "--model", "tiny"])


@pytest.fixture
def key_file(tmp_path: Path) -> str:
    path = tmp_path / "key"
    path.write_text("sk-1\n", encoding="utf-8")
    return str(path)


async def test_complete_writes_the_text(
    key_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--api-key-file", key_file, "--max-tokens", "4", "--stop", "a", "--stop", "b")
    async with RawServer(respond) as server:
        assert await run_main(server, "complete", "hi", *flags) == 0
        assert capsys.readouterr().out == "hi|4|['a', 'b']\n"
        monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
        assert await run_main(server, "complete", "-", "--api-key-file", key_file) == 0
        assert capsys.readouterr().out == "from a pipe|None|None\n"


async def test_failures_are_one_line_and_a_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    async with RawServer(respond) as server:
        assert await run_main(server, "complete", "hi") == 1
        assert capsys.readouterr().err == "nsa-client: no key\n"
        assert await run_main(server, "complete", "hi", "--api-key-file", str(empty)) == 2
        assert "first line must be the API key" in capsys.readouterr().err
        assert await run_main(server, "complete", "hi", "--api-key-file", str(tmp_path / "x")) == 2
        assert "No such file" in capsys.readouterr().err


async def test_bench_ends_with_a_line_of_json(
    key_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("one\n\ntwo\n", encoding="utf-8")
    load = ("--num-prompts", "3", "--max-concurrency", "1", "--output-len", "1")
    source = ("--prompt-file", str(prompts), "--api-key-file", key_file)
    async with RawServer(respond) as server:
        assert await run_main(server, "bench", *load, *source, "--json") == 0
    assert [exchange.json["prompt"] for exchange in server.exchanges] == ["one", "two", "one"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Completed", "requests", "3"]
    result = json.loads(lines[-1])
    assert (result["completed"], result["failed"], result["num_prompts"]) == (3, 0, 3)
    assert result["total_output_tokens"] == 3
    assert result["request_rate"] == "inf"
    assert result["mean_tpot_ms"] is None
    for metric in ("ttft", "tpot", "itl", "e2el"):
        assert {f"{name}_{metric}_ms" for name in ("mean", "median", "std", "p99")} <= set(result)


async def test_bench_with_a_failure_has_status_1(capsys: pytest.CaptureFixture[str]) -> None:
    async with RawServer(respond) as server:
        status = await run_main(server, "bench", "--num-prompts", "2", "--vocab-size", "9")
    assert status == 1
    assert "failed 2 times: StreamError: HTTP 401: no key" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench", "--goodput", "ttft"], "expected METRIC:MS, got 'ttft'"),
        (["bench", "--vocab-size", "9", "--extra-body", "[1]"], "expected a JSON object"),
        (["bench", "--vocab-size", "9", "--extra-body", "{"], "not JSON"),
        (["complete"], "prompt"),
        (["complete", "x", "--max-token", "3"], "unrecognized arguments: --max-token"),
        ([], "COMMAND"),
    ],
)
def test_wrong_arguments_are_status_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(args)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_a_flag_that_would_be_ignored_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts"
    prompts.write_text("one\n", encoding="utf-8")
    source = ["bench", "--prompt-file", str(prompts)]
    for flags, message in [
        ([*source, "--random-input-len", "5"], "--random-input-len is for random prompts"),
        ([*source, "--random-prefix-len", "5"], "--random-prefix-len is for random prompts"),
        (["bench", "--save-detailed"], "--save-detailed needs --result-file or --json"),
        (["bench", "--burstiness", "2"], "burstiness 2.0 needs a request_rate"),
        (["bench", "--goodput", "itl:5"], "goodput knows ttft, tpot, e2el, got 'itl'"),
        (["bench", "--plot", "latency.svg"], "ends in .png"),
        (["bench", "--plot", str(tmp_path / "none" / "x.png")], "is no directory"),
        (["chat", "--history-file", "x"], "--history-file is for a conversation in a terminal"),
    ]:
        assert main(flags) == 2, flags
        assert message in capsys.readouterr().err
