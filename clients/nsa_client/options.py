"""The options of a request, by name. An unknown name is refused: a typo must not go unnoticed."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict


class SamplingOptions(TypedDict, total=False):
    """What both endpoints take. Meanings and ranges are those of the OpenAI API and of vLLM.

    response_format: OpenAI's `json_object` or `json_schema`. structured_outputs: one of `json`,
    `regex`, `choice`, `grammar`. nsa_trace: report the blocks that every token selected.
    extra_body: any other field of the request's JSON, sent as it is.
    """

    model: str
    max_tokens: int | None
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[str, float] | None
    seed: int | None
    n: int
    best_of: int
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool
    ignore_eos: bool
    skip_special_tokens: bool
    add_special_tokens: bool
    truncate_prompt_tokens: int | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    prompt_logprobs: int | None
    return_token_ids: bool
    return_tokens_as_token_ids: bool
    nsa_trace: bool | Mapping[str, Any] | None
    priority: int
    cache_salt: str | None
    request_id: str
    user: str | None
    extra_body: Mapping[str, Any]


class CompletionOptions(SamplingOptions, total=False):
    """Options of `complete` and `stream`. logprobs: how many likeliest tokens to report."""

    logprobs: int | None
    echo: bool


class ChatOptions(SamplingOptions, total=False):
    """Options of `chat` and `stream_chat`.

    tools: functions in the form of the OpenAI API. tool_choice: "none", "auto", "required" or one
    function. include_reasoning: False leaves the block of thought out of the answer.
    """

    logprobs: bool
    top_logprobs: int | None
    max_completion_tokens: int | None
    add_generation_prompt: bool
    continue_final_message: bool
    chat_template_kwargs: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool
    reasoning_effort: str | None
    include_reasoning: bool


def request_body(
    options: CompletionOptions | ChatOptions, known: type, **fields: Any
) -> dict[str, Any]:
    """Merge options, `extra_body` and the fields that the client sets itself into one JSON object.

    Raises TypeError for an option that `known` does not declare, ValueError for a field set twice.
    """
    names = known.__annotations__
    extra_body = dict(options.get("extra_body", {}))
    body = dict(fields)
    for name, value in options.items():
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "use extra_body={...} to send it"
            raise TypeError(f"unknown option {name!r}; {hint}")
        if name != "extra_body":
            body[name] = value
    for name, value in extra_body.items():
        if name in body and name != "stream_options":
            raise ValueError(f"extra_body sets {name!r}, which is already set; give it once")
        body[name] = value
    return body
