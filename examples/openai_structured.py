"""Output that must match: a pydantic model, a JSON schema, a choice, a regular expression."""

import argparse
import json
from typing import Literal

import openai
from pydantic import BaseModel, ConfigDict, Field


class City(BaseModel):
    # Without it the schema allows more properties, and a small model may never stop adding them.
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=20)
    continent: Literal["Africa", "America", "Asia", "Australia", "Europe"]
    is_capital: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.base_url, api_key="none")
    model = client.models.list().data[0].id
    options = {
        "model": model,
        "messages": [{"role": "user", "content": "Describe the city of Paris as JSON."}],
        "max_completion_tokens": 96,
        "temperature": 0,
    }

    parsed = client.chat.completions.parse(response_format=City, **options)
    print("pydantic:", repr(parsed.choices[0].message.parsed))

    schema = {"name": "city", "schema": City.model_json_schema(), "strict": True}
    stream = client.chat.completions.create(
        response_format={"type": "json_schema", "json_schema": schema}, stream=True, **options
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    print("streamed schema:", City.model_validate(json.loads(text)).continent)

    question = [{"role": "user", "content": "Is Paris in Europe?"}]
    for constraint in ({"choice": ["yes", "no"]}, {"regex": "[a-z]{2,3}!"}):
        chat = client.chat.completions.create(
            **{**options, "messages": question},
            extra_body={"structured_outputs": constraint},
        )
        print(f"{next(iter(constraint))}:", chat.choices[0].message.content)


if __name__ == "__main__":
    main()
