"""Tool calling with the openai package: the model names a function, the program calls it, the
model reads the result. Whole and streamed."""

import argparse
import json

import openai

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 24},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}


def get_weather(city: str, unit: str) -> str:
    return f"18 degrees {unit} and sunny in {city}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=args.base_url, api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    options = {
        "model": model,
        "tools": [WEATHER],
        # With "auto" the model decides; "required" makes even a small model call a tool.
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_completion_tokens": 96,
        "temperature": 0,
    }

    message = client.chat.completions.create(messages=messages, **options).choices[0].message
    for call in message.tool_calls:
        print("call:", call.function.name, json.loads(call.function.arguments))

    messages.append(message.model_dump(exclude_none=True))
    for call in message.tool_calls:
        result = get_weather(**json.loads(call.function.arguments))
        print("result:", result)
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = client.chat.completions.create(
        model=model, messages=messages, max_completion_tokens=48, temperature=0
    )
    print("answer:", answer.choices[0].message.content)

    # A streamed call comes in pieces; `index` says to which call a piece belongs.
    calls: dict[int, list[str]] = {}
    for chunk in client.chat.completions.create(messages=messages[:1], stream=True, **options):
        for delta in chunk.choices[0].delta.tool_calls or () if chunk.choices else ():
            if delta.function.name:
                calls[delta.index] = [delta.function.name]
            calls[delta.index].append(delta.function.arguments or "")
    for name, *pieces in calls.values():
        print(f"streamed call in {len(pieces)} pieces:", name, json.loads("".join(pieces)))


if __name__ == "__main__":
    main()
