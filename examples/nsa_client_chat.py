"""Our own client (pip install ./clients): chat, stream, tools, and which blocks NSA read."""

import argparse

from nsa_client import Client, join_tool_calls

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 9},
                "b": {"type": "integer", "minimum": 0, "maximum": 9},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    args = parser.parse_args()
    with Client(args.base_url) as client:
        print("ready:", client.ready(), "version:", client.version())
        messages = [{"role": "user", "content": "What is the capital of France?"}]
        print("chat:", client.chat(messages, max_tokens=24, temperature=0).text)

        print("stream: ", end="")
        with client.stream_chat(messages, max_tokens=24, temperature=0) as stream:
            for chunk in stream:
                print(chunk.text, end="", flush=True)
        print()

        question = [{"role": "user", "content": "How much is 2 + 3?"}]
        with client.stream_chat(
            question, tools=[ADD], tool_choice="required", max_tokens=64, temperature=0
        ) as stream:
            calls = join_tool_calls(delta for chunk in stream for delta in chunk.tool_calls)
        print("tools:", calls)

        prompt = "The quick brown fox jumps over the lazy dog. " * 150
        traced = client.complete(prompt, max_tokens=4, temperature=0, nsa_trace={"layers": [0, 15]})
        trace = traced.choices[0].nsa_trace
        print(f"trace: {traced.usage.prompt_tokens} tokens, blocks of {trace.block_size}")
        for layer, heads in zip(trace.layers, trace.tokens[-1], strict=True):
            print(f"  layer {layer}, KV head 0 read blocks {list(heads[0])}")


if __name__ == "__main__":
    main()
