"""The terminal chat: its commands, messages of several lines, and what a script gets."""

import asyncio
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from nsa_client import Client
from nsa_client.chat import Chat, read_message, run_chat
from nsa_client.cli import main
from nsa_client.types import ChatMessage
from nsa_client.write import Written, write_stream
from tests.clients.raw_server import DONE, RawServer, event, usage_event
from tests.clients.test_cli import Terminal, read_lines, respond

ROOT = Path(__file__).parents[2]


def delta_event(**delta: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": None}])


def numbered_client(requests: list[Any]) -> Client:
    """A client whose server numbers its answers, and fails on the word `fail`."""

    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        requests.append(body)
        if body["messages"][-1]["content"] == "fail":
            return httpx.Response(400, json={"error": {"message": "too long"}})
        answer = delta_event(role="assistant", content=f"answer {len(requests)}")
        return httpx.Response(200, content=answer + usage_event(3, 2) + DONE)

    return Client(model="tiny", transport=httpx.MockTransport(handler))


def converse(*lines: str, **settings: Any) -> tuple[list[Any], str, str, int]:
    """Return the requests sent, what was written, the errors, and the exit status."""
    requests: list[Any] = []
    out, err = io.StringIO(), io.StringIO()
    status = run_chat(
        numbered_client(requests),
        read_lines(*lines),
        out,
        err,
        **{"is_interactive": False, **settings},
    )
    return requests, out.getvalue(), err.getvalue(), status


def contents(request: Any) -> list[str]:
    return [message["content"] for message in request["messages"]]


def test_messages_of_several_lines() -> None:
    lines = ['"""', "  one", "", "/reset", '"""', "two\\", "three \\", "four"]
    requests, *_, status = converse(*lines)
    assert status == 0
    assert contents(requests[0]) == ["  one\n\n/reset"]
    assert contents(requests[1])[-1] == "two\nthree \nfour"


@pytest.mark.parametrize(
    ("lines", "prompts"),
    [(["a"], ["> "]), (["a\\", "b"], ["> ", ". "]), (['"""', "a", '"""'], ["> ", ". ", ". "])],
)
def test_a_person_sees_that_a_message_goes_on(lines: list[str], prompts: list[str]) -> None:
    shown: list[str] = []
    read = read_lines(*lines)

    def read_line(prompt: str) -> str:
        shown.append(prompt)
        return read(prompt)

    read_message(read_line, "> ")
    assert shown == prompts


def test_the_end_of_input_within_a_message() -> None:
    assert read_message(read_lines("a\\"), "") == "a"
    requests, _, err, status = converse('"""', "half")
    assert (requests, status) == ([], 1)
    assert "the input ended before the closing" in err


def test_retry_and_undo() -> None:
    requests, out, _, status = converse("one", "two", "/retry", "/undo", "three")
    assert status == 0
    assert contents(requests[2]) == contents(requests[1]) == ["one", "answer 1", "two"]
    assert contents(requests[3]) == ["one", "answer 1", "three"]
    assert "forgot: two\n" in out


def test_a_retry_that_fails_forgets_nothing() -> None:
    requests: list[Any] = []
    chat = Chat(numbered_client(requests), io.StringIO(), is_interactive=True, options={})
    chat.messages = [
        ChatMessage(role="user", content="fail"),
        ChatMessage(role="assistant", content="once"),
    ]
    before = list(chat.messages)
    with pytest.raises(Exception, match="too long"):
        chat.command("/retry")
    assert chat.messages == before


def test_the_system_prompt_is_changed_and_removed() -> None:
    requests, *_ = converse("one", "/system Be kind.", "two", "/reset", "three", "/system", "four")
    assert [contents(request) for request in requests] == [
        ["one"],
        ["Be kind.", "two"],
        ["Be kind.", "three"],
        ["four"],
    ]


def test_sampling_is_set_shown_and_unset() -> None:
    lines = ["one", "/set top-p 0.5", "/set max_tokens 7", "two", "/set top_p default", "three"]
    requests, out, *_ = converse(*lines, max_tokens=3)
    sampling = [(request.get("max_tokens"), request.get("top_p")) for request in requests]
    assert sampling == [(3, None), (7, 0.5), (7, None)]
    assert "top_p 0.5\n" in out
    assert "top_k default\n" in out


def test_the_conversation_is_saved_but_never_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    _, _, err, status = converse("héllo", f"/save {path}", f"/save {path}", is_interactive=True)
    assert status == 0
    assert json.loads(path.read_text(encoding="utf-8")) == {
        "messages": [
            {"role": "user", "content": "héllo"},
            {"role": "assistant", "content": "answer 1"},
        ]
    }
    assert "File exists" in err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/nope", "unknown command /nope; /help lists the commands"),
        ("/reset now", "/reset takes nothing after it, got 'now'"),
        ("/undo", "there is no message yet"),
        ("/retry", "there is no message yet"),
        ("/set", ""),
        ("/set top_p", "expected /set NAME VALUE"),
        ("/set best_of 2", "expected /set NAME VALUE"),
        ("/set top_k 1.5", "top_k must be a number, got '1.5'"),
        ("/save", "expected /save FILE"),
        ("/save /no/such/folder/x", "No such file"),
    ],
)
def test_wrong_commands_tell_a_person_and_stop_a_script(line: str, message: str) -> None:
    for is_interactive in (True, False):
        requests, _, err, status = converse(line, "one", is_interactive=is_interactive)
        assert message in err
        is_stopped = bool(message) and not is_interactive
        assert (status, len(requests)) == ((1, 0) if is_stopped else (0, 1))


def test_a_person_is_told_the_speed() -> None:
    _, out, *_ = converse("one", is_interactive=True)
    assert "(2 tokens, the first after " in out
    assert "tokens, the first" not in converse("one")[1]


@pytest.mark.parametrize(
    ("written", "summary"),
    [
        (
            Written("ab", False, 0.5, 2.5, 5),
            "(5 tokens, the first after 0.50 s, then 2.0 tokens/s)",
        ),
        (Written("a", False, 0.5, 0.5, 1), "(1 tokens, the first after 0.50 s)"),
        (Written("", False, None, 0.5, 1), ""),
        (Written("a", True, 0.5, 0.5, None), ""),
    ],
)
def test_summary(written: Written, summary: str) -> None:
    assert written.summary() == summary


def test_a_thought_is_dim_on_a_terminal_and_absent_from_a_pipe() -> None:
    body = delta_event(reasoning_content="h\x1bm") + delta_event(content="yes") + DONE
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    for out, expected in [(Terminal(), "\x1b[2mh�m\x1b[0myes\n"), (io.StringIO(), "yes\n")]:
        stream = Client(model="tiny", transport=transport).stream_chat([])
        assert write_stream(stream, out).text == "yes"
        assert out.getvalue() == expected


def test_text_that_came_before_an_error_ends_its_line() -> None:
    body = delta_event(content="half") + event(error={"message": "died"})
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    client = Client(model="tiny", transport=transport)
    out, err = io.StringIO(), io.StringIO()
    assert run_chat(client, read_lines("one"), out, err, is_interactive=False) == 1
    assert (out.getvalue(), err.getvalue()) == ("half\n", "error: died\n")


@pytest.mark.parametrize("source", ["flag", "pipe"])
def test_quick_is_one_message(
    source: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("nsa_client.cli.Client", lambda *_, **__: numbered_client(seen))
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    message = {"flag": "a\nb\n", "pipe": "-"}[source]
    flags = ["--system", "S", "--extra-body", '{"top_a": 1}', "--max-tokens", "5"]
    assert main(["chat", "-q", message, *flags]) == 0
    assert capsys.readouterr().out == "answer 1\n"
    assert contents(seen[0]) == ["S", "a\nb\n"]
    assert (seen[0]["top_a"], seen[0]["max_tokens"]) == (1, 5)


async def test_the_key_of_the_local_server_goes_to_no_other(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async with RawServer(respond) as server:
        arguments = ["complete", "hi", "--model", "tiny"]
        local = {"prog": "nsa-serve", "url": server.url, "api_key": "sk-1"}
        assert await asyncio.to_thread(lambda: main(arguments, **local)) == 0
        elsewhere = [*arguments, "--url", server.url + "/v1"]
        assert await asyncio.to_thread(lambda: main(elsewhere, **local)) == 1
    assert capsys.readouterr().err == "nsa-serve: no key\n"
    heads = [exchange.head.lower() for exchange in server.exchanges]
    assert ["authorization" in head for head in heads] == [True, False]


def test_nsa_serve_has_the_clients_commands(tmp_path: Path) -> None:
    path = os.pathsep.join(str(ROOT / name) for name in ("", "kernels", "server", "clients"))
    environment = {**os.environ, "PYTHONPATH": path, "NSA_SERVE_PORT": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "nsa_http", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )

    done = run("--help")
    for name in ("serve", "chat", "complete", "bench", "health"):
        assert f"\n    {name} " in done.stdout
    done = run("bench", "--num-prompts", "1", "--vocab-size", "9", "--model", "tiny")
    assert done.returncode == 1
    assert "http://127.0.0.1:1/v1/completions failed" in done.stdout
