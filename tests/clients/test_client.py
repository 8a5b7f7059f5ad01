"""Both clients over a mock transport: what they send, what they read, what they raise, what they
try again."""

import asyncio
import inspect
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import nsa_client
from nsa_client import AsyncClient, Client, CompletionOptions, TokenLogprob, Usage
from nsa_client.core import parse_retry_after_s, retry_delay_s

Handler = Callable[[httpx.Request], httpx.Response]
COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 7,
    "model": "tiny",
    "choices": [{"index": 0, "text": " world", "logprobs": None, "finish_reason": "length"}],
    "usage": {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    },
}


class BothClients:
    """Call a method of `Client` or of `AsyncClient`; the tests do not care which."""

    def __init__(self, kind: str, handler: Handler, **settings: Any) -> None:
        self.client: Any
        transport = httpx.MockTransport(handler)
        cls: Any = {"sync": Client, "async": AsyncClient}[kind]
        self.client = cls(transport=transport, **{"model": "tiny", **settings})

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = getattr(self.client, name)(*args, **kwargs)
            if inspect.isawaitable(result):
                return asyncio.run(_value(result))
            if hasattr(result, "__aiter__"):
                return asyncio.run(_items(result))
            return list(result) if isinstance(result, Iterator) else result

        return call


async def _value(awaitable: Any) -> Any:
    return await awaitable


async def _items(stream: Any) -> list[Any]:
    return [item async for item in stream]


@pytest.fixture(params=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Callable[..., BothClients]:
    return lambda handler, **settings: BothClients(request.param, handler, **settings)


@pytest.fixture
def waits_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Record the waits between tries instead of waiting."""
    waits: list[float] = []

    async def sleep(delay_s: float) -> None:
        waits.append(delay_s)

    monkeypatch.setattr("nsa_client.client.time.sleep", waits.append)
    monkeypatch.setattr("nsa_client.async_client.asyncio.sleep", sleep)
    return waits


def error_response(status: int, headers: dict[str, str] | None = None, **error: Any) -> Handler:
    body = {"error": {"message": "no", "type": "T", "param": None, "code": None} | error}
    return lambda request: httpx.Response(status, json=body, headers=headers)


def test_complete_sends_the_options_and_reads_the_answer(make: Callable[..., BothClients]) -> None:
    seen = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=COMPLETION, headers={"x-request-id": "req-1"})

    client = make(handler, base_url="http://host:9/prefix/v1/", api_key="sk-1")
    answer = client.complete(
        [1, 2, 3], max_tokens=2, temperature=0.0, stop=["a"], extra_body={"top_a": 0.5}
    )
    (request,) = seen
    assert (request.method, str(request.url)) == ("POST", "http://host:9/prefix/v1/completions")
    assert request.headers["authorization"] == "Bearer sk-1"
    assert request.headers["content-type"] == "application/json"
    assert json.loads(request.content) == {
        "model": "tiny",
        "prompt": [1, 2, 3],
        "max_tokens": 2,
        "temperature": 0.0,
        "stop": ["a"],
        "top_a": 0.5,
    }
    assert answer.text == " world"
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage == Usage(3, 2, 5, num_prefix_hit_tokens=1)
    assert answer.request_id == "req-1"
    assert answer.raw == COMPLETION


def test_without_a_model_the_first_one_is_asked_for_once(make: Callable[..., BothClients]) -> None:
    paths = []

    def handler(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "one", "max_model_len": 64}]})
        assert json.loads(request.content)["model"] == "one"
        return httpx.Response(200, json=COMPLETION)

    client = make(handler, model=None)
    client.complete("a")
    client.complete("b")
    assert paths == ["/v1/models", "/v1/completions", "/v1/completions"]


def test_a_server_without_models_is_an_error(make: Callable[..., BothClients]) -> None:
    client = make(lambda request: httpx.Response(200, json={"data": []}), model=None)
    with pytest.raises(nsa_client.InvalidResponseError, match="offers no model"):
        client.complete("a")


def test_chat_reads_the_message_and_its_logprobs(make: Callable[..., BothClients]) -> None:
    top = [{"token": "no", "logprob": -2.0}, {"token": "hé", "logprob": -0.5}]
    entry = {"token": "hé", "logprob": -0.5, "bytes": [104, 195, 169], "top_logprobs": top}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "hé"},
        "logprobs": {"content": [entry]},
        "finish_reason": "stop",
        "stop_reason": 2,
    }
    client = make(lambda request: httpx.Response(200, json={**COMPLETION, "choices": [choice]}))
    answer = client.chat([{"role": "user", "content": "a"}], logprobs=True, top_logprobs=2)
    assert answer.text == "hé"
    assert answer.choices[0].stop_reason == 2
    assert answer.choices[0].logprobs == (
        TokenLogprob("hé", -0.5, (("hé", -0.5), ("no", -2.0)), utf8="hé".encode()),
    )


def test_completion_logprobs_and_choices_are_put_in_order(make: Callable[..., BothClients]) -> None:
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {"c": -0.5, "b": -1.0}],
        "text_offset": [0, 1],
    }
    choices = [
        {"index": 1, "text": "second", "finish_reason": "stop"},
        {"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": logprobs},
    ]
    client = make(lambda request: httpx.Response(200, json={**COMPLETION, "choices": choices}))
    answer = client.complete("a", n=2, logprobs=1)
    assert [choice.text for choice in answer.choices] == ["ab", "second"]
    assert answer.choices[0].logprobs == (
        TokenLogprob("a", None, text_offset=0),
        TokenLogprob("b", -1.0, (("c", -0.5), ("b", -1.0)), text_offset=1),
    )


def test_small_endpoints(make: Callable[..., BothClients]) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content) if request.content else {}
        match request.url.path:
            case "/tokenize":
                assert body["model"] == "tiny"
                ids = [1] if "prompt" in body else [1, 2]
                return httpx.Response(200, json={"tokens": ids, "max_model_len": 64})
            case "/detokenize":
                return httpx.Response(200, json={"prompt": "+".join(map(str, body["tokens"]))})
            case "/v1/models":
                return httpx.Response(200, json={"data": [{"id": "a", "max_model_len": 8}]})
            case "/metrics":
                return httpx.Response(200, text="up 1\n")
        return httpx.Response(404, json={"error": {"message": request.url.path}})

    client = make(handler)
    assert client.tokenize("a").token_ids == (1,)
    assert client.tokenize([{"role": "user", "content": "a"}]).token_ids == (1, 2)
    assert client.detokenize([4, 5]) == "4+5"
    assert [(model.id, model.max_model_len) for model in client.models()] == [("a", 8)]
    assert client.metrics() == "up 1\n"


@pytest.mark.parametrize(("status", "is_healthy"), [(200, True), (503, False)])
def test_health_is_the_status_and_never_retries(
    make: Callable[..., BothClients], waits_s: list[float], status: int, is_healthy: bool
) -> None:
    assert make(lambda request: httpx.Response(status)).health() is is_healthy
    assert waits_s == []


def test_health_of_something_else_is_an_error(make: Callable[..., BothClients]) -> None:
    with pytest.raises(nsa_client.NotFoundError):
        make(lambda request: httpx.Response(404, text="nginx")).health()


@pytest.mark.parametrize(
    ("status", "cls"),
    [
        (400, nsa_client.BadRequestError),
        (401, nsa_client.AuthenticationError),
        (403, nsa_client.PermissionDeniedError),
        (404, nsa_client.NotFoundError),
        (413, nsa_client.RequestTooLargeError),
        (418, nsa_client.APIStatusError),
        (429, nsa_client.RateLimitError),
        (500, nsa_client.InternalServerError),
        (503, nsa_client.ServiceUnavailableError),
    ],
)
def test_each_status_has_its_exception(
    make: Callable[..., BothClients], status: int, cls: type[nsa_client.APIError]
) -> None:
    handler = error_response(status, {"x-request-id": "r"}, param="top_p", code=status)
    with pytest.raises(nsa_client.APIStatusError) as caught:
        make(handler, max_retries=0).complete("a")
    error = caught.value
    assert type(error) is cls
    assert (error.message, error.type, error.param, error.code) == ("no", "T", "top_p", status)
    assert (error.status, error.request_id) == (status, "r")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"object":"error","message":"flat"}', "flat"),
        (b'{"error":"Unauthorized"}', "Unauthorized"),
        (b"<html>bad gateway</html>", "HTTP 400 Bad Request: <html>bad gateway</html>"),
        (b'["odd"]', 'HTTP 400 Bad Request: ["odd"]'),
    ],
)
def test_errors_of_other_shapes_keep_their_message(
    make: Callable[..., BothClients], body: bytes, message: str
) -> None:
    with pytest.raises(nsa_client.BadRequestError) as caught:
        make(lambda request: httpx.Response(400, content=body)).complete("a")
    assert caught.value.message == message


@pytest.mark.parametrize(
    "body", [b"not json", b"[]", b'{"choices":[]}', b'{"choices":[{}]}', b'{"id":"x"}', b"\xff"]
)
def test_a_malformed_answer_is_an_invalid_response(
    make: Callable[..., BothClients], body: bytes
) -> None:
    with pytest.raises(nsa_client.InvalidResponseError, match="unexpected answer"):
        make(lambda request: httpx.Response(200, content=body)).complete("a")


@pytest.mark.parametrize("method", ["complete", "stream"])
def test_busy_server_is_tried_again_after_the_wait_it_asks_for(
    make: Callable[..., BothClients], waits_s: list[float], method: str
) -> None:
    refusals = iter([{"retry-after": "3"}, {"retry-after-ms": "250", "retry-after": "9"}])

    def handler(request: httpx.Request) -> httpx.Response:
        headers = next(refusals, None)
        if headers is not None:
            return httpx.Response(503, json={"error": {"message": "full"}}, headers=headers)
        if method == "stream":
            return httpx.Response(200, content=b"data: [DONE]\n\n")
        return httpx.Response(200, json=COMPLETION)

    getattr(make(handler), method)("a")
    assert waits_s == [3.0, 0.25]


def test_retries_end_with_the_last_error(
    make: Callable[..., BothClients], waits_s: list[float]
) -> None:
    with pytest.raises(nsa_client.InternalServerError):
        make(error_response(500), max_retries=2).complete("a")
    assert len(waits_s) == 2
    assert 0.375 <= waits_s[0] <= 0.5
    assert 0.75 <= waits_s[1] <= 1.0


@pytest.mark.parametrize(
    ("error", "cls"),
    [
        (httpx.ConnectError("refused"), nsa_client.APIConnectionError),
        (httpx.ReadTimeout(""), nsa_client.APITimeoutError),
    ],
)
def test_lost_connections_are_tried_again_and_then_reported(
    make: Callable[..., BothClients],
    waits_s: list[float],
    error: httpx.RequestError,
    cls: type[nsa_client.APIError],
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(nsa_client.APIConnectionError, match=r"127\.0\.0\.1:8000") as caught:
        make(handler).complete("a")
    assert type(caught.value) is cls
    assert len(waits_s) == 2


@pytest.mark.parametrize(
    ("status", "headers", "is_retried"),
    [
        (400, {}, False),
        (401, {}, False),
        (404, {"retry-after": "1"}, False),
        (408, {}, True),
        (409, {}, True),
        (429, {}, True),
        (500, {}, True),
        (503, {"retry-after": "120"}, True),
        (503, {"retry-after": "121"}, False),
        (503, {"x-should-retry": "false"}, False),
        (400, {"x-should-retry": "true"}, True),
    ],
)
def test_which_answers_are_tried_again(
    status: int, headers: dict[str, str], is_retried: bool
) -> None:
    delay_s = retry_delay_s(1, httpx.Response(status, headers=headers))
    assert (delay_s is not None) is is_retried


def test_backoff_grows_to_its_bound() -> None:
    for num_tries, most_s in [(1, 0.5), (2, 1.0), (3, 2.0), (5, 8.0), (6, 8.0), (5000, 8.0)]:
        delay_s = retry_delay_s(num_tries, None)
        assert delay_s is not None
        assert 0.75 * most_s <= delay_s <= most_s


def test_retry_after_may_be_a_date_and_may_be_nonsense(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    date = {"retry-after": "Tue, 14 Nov 2023 22:13:50 GMT"}  # 1 700 000 030 s
    assert parse_retry_after_s(date) == 30.0
    for text in ("", "soon", "nan", "inf"):
        assert parse_retry_after_s({"retry-after": text}) is None


def test_unknown_and_doubled_options_are_refused_before_anything_is_sent(
    make: Callable[..., BothClients],
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise AssertionError("sent")

    client = make(handler)
    with pytest.raises(TypeError, match="'max_token'; did you mean 'max_tokens'"):
        client.complete("a", max_token=1)
    with pytest.raises(TypeError, match="'guided_json'; use extra_body"):
        client.stream("a", guided_json="{}")
    with pytest.raises(TypeError, match="'echo'"):
        client.chat([], echo=True)
    with pytest.raises(ValueError, match="extra_body sets 'seed'"):
        client.complete("a", seed=1, extra_body={"seed": 2})
    with pytest.raises(ValueError, match="JSON"):
        client.complete("a", temperature=float("nan"))


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="http://"):
        Client("localhost:8000")
    with pytest.raises(ValueError, match="max_retries"):
        Client(max_retries=-1)


def test_both_clients_have_the_same_methods_and_options() -> None:
    def signatures(cls: type) -> dict[str, str]:
        public = inspect.getmembers(cls, inspect.isfunction)
        names = ((name, value) for name, value in public if not name.startswith("_"))
        return {
            name.removeprefix("a") if name == "aclose" else name: ", ".join(
                f"{parameter}" for parameter in inspect.signature(value).parameters.values()
            )
            for name, value in names
        }

    assert signatures(Client) == signatures(AsyncClient)
    assert "temperature" in CompletionOptions.__annotations__
