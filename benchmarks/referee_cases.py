"""The requests that both servers get: route x parameter x valid and invalid values."""

from dataclasses import dataclass
from typing import Any

MODEL = "smollm2-135m-nsa"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
_HELLO = [{"role": "user", "content": "Say hello."}]
_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "add", "parameters": _SCHEMA}}
_JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}


@dataclass(frozen=True)
class Case:
    """One request. is_deterministic: its text must be the same from both servers."""

    name: str
    method: str
    path: str
    body: Any = None
    raw: bytes | None = None
    content_type: str = "application/json"
    is_deterministic: bool = True


def all_cases() -> list[Case]:
    """Return every request."""
    return [*_plain(), *_both(), *_completions(), *_chat(), *_tokenize(), *_malformed()]


def _completion(name: str, **fields: Any) -> Case:
    body = {"model": MODEL, "prompt": "The capital of France is", "max_tokens": 6, "temperature": 0}
    return _case(name, COMPLETIONS, body, fields)


def _chat_case(name: str, **fields: Any) -> Case:
    body = {"model": MODEL, "messages": _HELLO, "max_tokens": 6, "temperature": 0}
    return _case(name, CHAT, body, fields)


def _case(name: str, path: str, body: dict[str, Any], fields: dict[str, Any]) -> Case:
    sampled = fields.get("temperature", 0) != 0
    left_out = {key for key, value in fields.items() if value is ...}
    merged = {key: value for key, value in {**body, **fields}.items() if key not in left_out}
    route = path.rsplit("/v1/", 1)[1].replace("/", "-")
    return Case(f"{route}: {name}", "POST", path, merged, is_deterministic=not sampled)


def _plain() -> list[Case]:
    paths = ("/v1/models", f"/v1/models/{MODEL}", "/v1/models/none", "/health", "/ping", "/version",
             "/load", "/nothing")  # fmt: skip
    return [Case(f"GET {path}", "GET", path) for path in paths] + [
        Case("GET /v1/completions", "GET", COMPLETIONS),
        Case("POST /health", "POST", "/health", {}),
    ]


# Parameter -> values; both generation routes get each.
_VALUES: dict[str, tuple[Any, ...]] = {
    "model": ("none", None),
    "max_tokens": (1, 0, -1, None, "x", 1.5, 100_000),
    "temperature": (1, 2, 2.1, -0.1, None, "x"),
    "top_p": (0.5, 0, 1.1, -1),
    "top_k": (5, 0, -1, -2, 1.5),
    "min_p": (0.5, 1.1, -0.1),
    "repetition_penalty": (1.2, 0, -1),
    "presence_penalty": (1, 2.1),
    "frequency_penalty": (-1, -2.1),
    "logit_bias": ({"5": 10}, {"5": 101}, {"999999": 1}, {"x": 1}),
    "seed": (7, "x", 2**70),
    "n": (0, 2, -1, 1_000_000),
    "stop": (".", [" Paris"], [], "", [1], ["a", "b", "c", "d", "e"]),
    "stop_token_ids": ([3], ["x"], [-1]),
    "ignore_eos": (True,),
    "min_tokens": (3, 100, -1),
    "skip_special_tokens": (False,),
    "include_stop_str_in_output": (True,),
    "stream_options": ({"include_usage": True},),
    "truncate_prompt_tokens": (3, -1, -2),
    "allowed_token_ids": ([5, 6], [], [999_999]),
    "bad_words": ([" Paris"], [], [""]),
    "prompt_logprobs": (1, -2, 50),
    "priority": (0, 1),
    "cache_salt": ("x", ""),
    "request_id": ("abc",),
    "return_token_ids": (True,),
    "return_tokens_as_token_ids": (True,),
    "user": ("me",),
    "unknown_field": (1,),
    "use_beam_search": (False,),
    "response_format": ({"type": "text"}, {"type": "json_object"}, _JSON_SCHEMA, {"type": "x"},
                        {"type": "json_schema"}),
    "structured_outputs": ({"regex": "[0-9]{3}"}, {"choice": ["yes", "no"]}, {"regex": "("},
                           {"grammar": 'start: "a" | "b"'}, {"regex": "a", "choice": ["b"]}),
}  # fmt: skip


def _both() -> list[Case]:
    cases = []
    for make in (_completion, _chat_case):
        for field, values in _VALUES.items():
            cases += [make(f"{field}={_show(value)}", **{field: value}) for value in values]
        cases += [
            make("minimal", max_tokens=4),
            make("stop over tokens", stop="aris", max_tokens=12),
            make("stop included", stop=" Paris", include_stop_str_in_output=True, max_tokens=12),
            make("n=2 sampled", n=2, temperature=1, seed=1),
            make("stream", stream=True),
            make("stream usage", stream=True, stream_options={"include_usage": True}),
            make(
                "stream continuous usage",
                stream=True,
                stream_options={"include_usage": True, "continuous_usage_stats": True},
            ),
            make("stream n=2", stream=True, n=2, temperature=1, seed=1),
            make("stream stop", stream=True, stop="aris", max_tokens=12),
            make("stream json", stream=True, response_format=_JSON_SCHEMA, max_tokens=24),
            make("stream invalid", stream=True, temperature=3),
            make("stream prompt_logprobs", stream=True, prompt_logprobs=1),
        ]
    return cases


def _completions() -> list[Case]:
    return [
        _completion("no prompt", prompt=...),
        _completion("prompt ids", prompt=[504, 3575, 282]),
        _completion("prompt batch", prompt=["The sky is", "The sun is"]),
        _completion("prompt id batch", prompt=[[504, 3575], [504, 2]]),
        _completion("prompt empty", prompt=""),
        _completion("prompt empty list", prompt=[]),
        _completion("prompt id outside", prompt=[999_999]),
        _completion("prompt id negative", prompt=[-1]),
        _completion("prompt mixed", prompt=["a", 1]),
        _completion("prompt too long", prompt=[504] * 3000),
        _completion("echo", echo=True),
        _completion("echo max_tokens=0", echo=True, max_tokens=0),
        _completion("echo logprobs", echo=True, logprobs=2),
        _completion("echo logprobs max_tokens=0", echo=True, logprobs=1, max_tokens=0),
        _completion("stream echo logprobs", echo=True, logprobs=1, stream=True),
        _completion("logprobs=0", logprobs=0),
        _completion("logprobs=3", logprobs=3),
        _completion("logprobs=21", logprobs=21),
        _completion("logprobs=-2", logprobs=-2),
        _completion("logprobs token ids", logprobs=1, return_tokens_as_token_ids=True),
        _completion("stream logprobs", logprobs=1, stream=True),
        _completion("suffix", suffix="x"),
        _completion("best_of=2", best_of=2),
        _completion("max_tokens left out", max_tokens=...),
    ]


def _chat() -> list[Case]:
    return [
        _chat_case("no messages", messages=...),
        _chat_case("messages empty", messages=[]),
        _chat_case("message without role", messages=[{"content": "x"}]),
        _chat_case(
            "content parts",
            messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        ),
        _chat_case("content null", messages=[{"role": "user", "content": None}]),
        _chat_case("unknown role", messages=[{"role": "x", "content": "Hi"}]),
        _chat_case(
            "image part",
            messages=[
                {
                    "role": "user",
                    "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/x"}}],
                }
            ],
        ),
        _chat_case("max_completion_tokens=3", max_completion_tokens=3, max_tokens=...),
        _chat_case("max_completion_tokens=0", max_completion_tokens=0, max_tokens=...),
        _chat_case("logprobs", logprobs=True),
        _chat_case("top_logprobs=2", logprobs=True, top_logprobs=2),
        _chat_case("top_logprobs alone", top_logprobs=2),
        _chat_case("top_logprobs=21", logprobs=True, top_logprobs=21),
        _chat_case("stream logprobs", logprobs=True, top_logprobs=1, stream=True),
        _chat_case("echo", echo=True),
        _chat_case("add_generation_prompt=false", add_generation_prompt=False),
        _chat_case(
            "continue_final_message",
            messages=[*_HELLO, {"role": "assistant", "content": "Hello"}],
            add_generation_prompt=False,
            continue_final_message=True,
        ),
        _chat_case("both prompts", continue_final_message=True, add_generation_prompt=True),
        _chat_case("chat_template", chat_template="{{ messages }}"),
        _chat_case("tools empty", tools=[]),
        _chat_case("tools auto", tools=[_TOOL]),
        _chat_case("tools none", tools=[_TOOL], tool_choice="none"),
        _chat_case("tools required", tools=[_TOOL], tool_choice="required", max_tokens=48),
        _chat_case(
            "tools named",
            tools=[_TOOL],
            tool_choice={"type": "function", "function": {"name": "add"}},
            max_tokens=24,
        ),
        _chat_case(
            "stream tools named",
            tools=[_TOOL],
            tool_choice={"type": "function", "function": {"name": "add"}},
            max_tokens=24,
            stream=True,
        ),
        _chat_case(
            "tools unknown name",
            tools=[_TOOL],
            tool_choice={"type": "function", "function": {"name": "other"}},
        ),
        _chat_case("tool_choice without tools", tool_choice="auto"),
        _chat_case("tool_choice bad", tools=[_TOOL], tool_choice="x"),
    ]


def _tokenize() -> list[Case]:
    def post(name: str, path: str, **body: Any) -> Case:
        return Case(f"{path[1:]}: {name}", "POST", path, {"model": MODEL, **body})

    return [
        post("prompt", "/tokenize", prompt="Hello world"),
        post("messages", "/tokenize", messages=_HELLO),
        post("strings", "/tokenize", prompt="Hello world", return_token_strs=True),
        post("nothing", "/tokenize"),
        post("ids", "/detokenize", tokens=[504, 3575]),
        post("ids outside", "/detokenize", tokens=[999_999]),
        post("ids negative", "/detokenize", tokens=[-1]),
        post("nothing", "/detokenize"),
        post("minimal", "/v1/responses", input="Say hello.", max_output_tokens=6, temperature=0),
        post("no input", "/v1/responses"),
        post("previous", "/v1/responses", input="x", previous_response_id="resp_1"),
    ]


def _malformed() -> list[Case]:
    def raw(name: str, data: bytes, content_type: str = "application/json") -> Case:
        return Case(f"malformed: {name}", "POST", COMPLETIONS, None, data, content_type)

    return [
        raw("not JSON", b"{"),
        raw("empty", b""),
        raw("array", b"[]"),
        raw("NaN", b'{"prompt": "x", "temperature": NaN}'),
        raw("text/plain", b'{"prompt": "x"}', "text/plain"),
        raw("surrogate", b'{"prompt": "\\ud800"}'),
    ]


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
