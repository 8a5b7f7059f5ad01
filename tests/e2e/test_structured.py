"""Structured output of a real server process, through the `openai` SDK."""

import json
from typing import Any

import openai
import pytest

pytestmark = pytest.mark.e2e

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False, "whitespace_pattern": None},
}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}
MESSAGES: list[Any] = [{"role": "user", "content": "Describe a person as JSON."}]


def model_of(client: openai.OpenAI) -> str:
    return client.models.list().data[0].id


def check_person(text: str | None) -> None:
    person = json.loads(text or "")
    assert list(person) == ["name", "age"] and 0 <= person["age"] <= 120


def test_every_sample_matches_the_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=model_of(client),
        messages=MESSAGES,
        response_format=FORMAT,
        n=3,
        seed=1,
        max_tokens=100,
        logprobs=True,
        top_logprobs=2,
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        check_person(choice.message.content)
        assert choice.logprobs is not None and choice.logprobs.content


def test_a_stream_matches_the_schema(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=model_of(client),
        messages=MESSAGES,
        response_format=FORMAT,
        temperature=0,
        max_tokens=100,
        stream=True,
    )
    check_person("".join(chunk.choices[0].delta.content or "" for chunk in stream))


def test_a_choice_completes_a_prompt(client: openai.OpenAI) -> None:
    options = {"structured_outputs": {"choice": ["good", "bad"]}}
    answer = client.completions.create(
        model=model_of(client), prompt="The film was", extra_body=options
    )
    (choice,) = answer.choices
    assert choice.text in ("good", "bad") and choice.finish_reason == "stop"


def test_a_schema_that_cannot_be_enforced_is_refused(client: openai.OpenAI) -> None:
    hostile: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    with pytest.raises(openai.BadRequestError, match="Unimplemented keys"):
        client.chat.completions.create(
            model=model_of(client), messages=MESSAGES, response_format=hostile
        )
