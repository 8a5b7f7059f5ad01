"""The trace over HTTP, and the page: what it is made of, and who may fetch it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp

from nsa_http.playground import PLAYGROUND_PATHS
from tests.server.fake_engine import REPLY, FakeEngine, make_app

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
# 40 bytes, 40 tokens: the first token's query is in block 2 of 16 tokens.
PROMPT = "x" * 40
NAMES = ("app.js", "heatmap.js", "index.html", "panel.js", "stream.js", "style.css", "trace.js")


def connect(app: ASGIApp) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")


def read(name: str) -> str:
    return files("nsa_http.playground").joinpath(name).read_text()


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_a_whole_answer_carries_its_trace(client: httpx.AsyncClient) -> None:
    body = {"prompt": PROMPT, "nsa_trace": True, "max_tokens": 12}
    response = await client.post(COMPLETIONS, json=body)
    trace = response.json()["choices"][0]["nsa_trace"]
    assert trace["position"] == 39
    assert trace["layers"] == [0, 1, 2]
    assert trace["truncated"] is False
    assert (trace["block_size"], trace["num_kv_heads"], trace["num_layers"]) == (16, 2, 3)
    assert (trace["num_init_blocks"], trace["num_local_blocks"]) == (1, 2)
    assert (trace["num_selected_blocks"], trace["window_size"]) == (4, 24)
    # Queries 39 to 50: in block 2 up to 47, in block 3 from 48 on.
    assert trace["tokens"] == [[[[0, 2], [0, 1, 2]]] * 3] * 9 + [[[[0, 3], [0, 1, 3]]] * 3] * 3
    # At length 40: 9 windows of 8 every 4 tokens, 40 selected tokens, 24 in the window; 96 bytes.
    assert trace["read_bytes"][0] == (9 + 40 + 24) * 96
    assert trace["dense_bytes"][:2] == [40 * 96, 41 * 96]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_every_chunk_carries_the_trace_of_its_tokens(
    client: httpx.AsyncClient, path: str
) -> None:
    prompt = (
        {"prompt": PROMPT} if path == COMPLETIONS else {"messages": [{"role": "u", "content": "q"}]}
    )
    asked = {**prompt, "nsa_trace": {"layers": [2, 0], "max_tokens": 5}, "max_tokens": 12}
    whole = (await client.post(path, json=asked)).json()["choices"][0]["nsa_trace"]
    assert whole["truncated"] is True
    assert whole["layers"] == [2, 0]
    assert [len(token) for token in whole["tokens"]] == [2] * 5
    chunks = chunks_of(await client.post(path, json={**asked, "stream": True}))
    choices = [chunk["choices"][0] for chunk in chunks]
    parts = [choice["nsa_trace"] for choice in choices if "nsa_trace" in choice]
    assert [part["position"] for part in parts] == [whole["position"] + i for i in range(12)]
    assert [part["truncated"] for part in parts] == [False] * 5 + [True] * 7
    for name in ("tokens", "read_bytes", "dense_bytes"):
        assert [item for part in parts for item in part[name]] == whole[name]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("value", [None, False, ...])
async def test_without_the_field_there_is_no_trace(
    client: httpx.AsyncClient, path: str, value: object
) -> None:
    field = {} if value is ... else {"nsa_trace": value}
    prompt = {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "u"}]}
    for stream in (False, True):
        response = await client.post(path, json={**prompt, **field, "stream": stream})
        assert response.status_code == 200
        assert REPLY[0] in response.text
        assert "nsa_trace" not in response.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 2, "nsa_trace": True}, "nsa_trace needs n=1, got n=2"),
        ({"prompt": ["a", "b"], "nsa_trace": True}, "nsa_trace needs one prompt, got 2"),
        ({"nsa_trace": {"layers": [0, 3]}}, "layer 3, but the model has layers 0 to 2"),
        ({"nsa_trace": {"layers": [1, 1]}}, "names a layer twice"),
        ({"nsa_trace": {"layers": []}}, "at least 1 item"),
        ({"nsa_trace": {"layers": [-1]}}, "greater than or equal to 0"),
        ({"nsa_trace": {"max_tokens": 513}}, "less than or equal to 512"),
        ({"nsa_trace": {"max_tokens": 0}}, "greater than or equal to 1"),
        ({"nsa_trace": {"heads": [0]}}, "heads"),
        ({"nsa_trace": "yes"}, "boolean"),
        ({"nsa_trace": 1}, "boolean"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_traced_is_a_400(
    client: httpx.AsyncClient, fields: dict[str, Any], message: str, stream: bool
) -> None:
    response = await client.post(COMPLETIONS, json={"prompt": "a", "stream": stream, **fields})
    assert response.status_code == 400
    error = response.json()["error"]
    assert message in error["message"]
    assert error["param"].startswith("nsa_trace")


async def test_a_server_may_refuse_traces(engine: FakeEngine) -> None:
    async with connect(make_app(engine, enable_trace=False)) as client:
        body = {"prompt": "a", "nsa_trace": True}
        response = await client.post(COMPLETIONS, json=body)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "nsa_trace"
        assert "--enable-trace" in response.json()["error"]["message"]
        off = await client.post(COMPLETIONS, json={**body, "nsa_trace": False})
        assert off.status_code == 200


async def test_echo_without_output_has_nothing_to_trace(client: httpx.AsyncClient) -> None:
    body = {"prompt": "ab", "echo": True, "max_tokens": 0, "nsa_trace": True}
    choice = (await client.post(COMPLETIONS, json=body)).json()["choices"][0]
    assert choice["text"] == "ab"
    assert "nsa_trace" not in choice


async def test_the_page_is_served_with_a_strict_policy(client: httpx.AsyncClient) -> None:
    for path in PLAYGROUND_PATHS:
        response = await client.get(path)
        assert response.status_code == 200
        policy = dict(
            part.split(" ", 1) for part in response.headers["content-security-policy"].split("; ")
        )
        assert policy == {
            "default-src": "'none'",
            "script-src": "'self'",
            "style-src": "'self'",
            "connect-src": "'self'",
            "base-uri": "'none'",
            "form-action": "'none'",
            "frame-ancestors": "'none'",
        }
        assert response.headers["x-content-type-options"] == "nosniff"
    types = [
        (await client.get(path)).headers["content-type"] for path in ("/", "/playground/app.js")
    ]
    assert types == ["text/html; charset=utf-8", "text/javascript; charset=utf-8"]
    assert (await client.get("/playground/../app.js")).status_code == 404
    assert (await client.post("/")).status_code == 405
    assert (await client.head("/")).status_code == 200


async def test_the_page_needs_no_key_and_no_model_but_the_api_does(engine: FakeEngine) -> None:
    async with connect(make_app(engine, api_key=["secret"])) as client:
        for path in PLAYGROUND_PATHS:
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/playground/other.js")).status_code == 401
    async with connect(make_app(None)) as client:
        assert (await client.get("/")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 503


async def test_the_page_can_be_switched_off(engine: FakeEngine) -> None:
    async with connect(make_app(engine, playground=False)) as client:
        for path in PLAYGROUND_PATHS:
            assert (await client.get(path)).status_code == 404


async def test_the_page_is_no_part_of_the_api(client: httpx.AsyncClient) -> None:
    schema = (await client.get("/openapi.json")).json()
    assert not PLAYGROUND_PATHS & schema["paths"].keys()


def test_every_file_is_served() -> None:
    present = sorted(
        item.name for item in files("nsa_http.playground").iterdir() if "__" not in item.name
    )
    assert present == sorted(NAMES)
    assert {path.removeprefix("/playground/") for path in PLAYGROUND_PATHS} == {
        "/" if name == "index.html" else name for name in NAMES
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_files_ask_nobody_else_and_insert_no_markup(name: str) -> None:
    text = read(name)
    assert not re.search(
        r"https?:|//[a-z0-9-]+\.[a-z]|@import|url\(|data:", text.replace('"data:"', "")
    )
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|srcdoc", text
    )
    assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", text)


class _Page(HTMLParser):
    """Collects what the tests below ask about."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._open_labels = 0
        self.labelled: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag == "label":
            self._open_labels += 1
            if target := found.get("for"):
                self.labelled.add(target)
        elif self._open_labels and (target := found.get("id")):
            self.labelled.add(target)

    def handle_endtag(self, tag: str) -> None:
        if tag == "label":
            self._open_labels -= 1


def test_the_page_keeps_its_own_policy_and_labels_its_fields() -> None:
    page = _Page()
    page.feed(read("index.html"))
    for tag, attributes in page.elements:
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert tag != "script" or attributes.get("src")
        if tag in ("input", "select", "textarea"):
            assert attributes["id"] in page.labelled, attributes
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = set(re.findall(r'\$\("([\w-]+)"\)', "".join(read(n) for n in NAMES if n[-3:] == ".js")))
    assert named <= set(ids)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".js")])
def test_the_scripts_are_javascript(name: str) -> None:
    node = shutil.which("node")
    if node is None:
        pytest.skip("needs node to check the syntax")
    command = [node, "--input-type=module", "--check"]
    result = subprocess.run(command, input=read(name), capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
