"""The openai package: a completion, a chat, a streamed chat, and what an error looks like."""

import argparse

import openai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    args = parser.parse_args()

    # The package wants a key; the server looks at it only when it was started with --api-key.
    client = openai.OpenAI(base_url=args.base_url, api_key="none")
    model = client.models.list().data[0].id
    print("model:", model)

    completion = client.completions.create(
        model=model, prompt="The capital of France is", max_tokens=8, temperature=0
    )
    print("completion:", completion.choices[0].text)

    messages = [{"role": "user", "content": "What is the capital of France?"}]
    chat = client.chat.completions.create(
        model=model,
        messages=messages,
        max_completion_tokens=24,
        temperature=0,
        # Parameters that the package does not know go here.
        extra_body={"top_k": 40, "repetition_penalty": 1.05},
    )
    print("chat:", chat.choices[0].message.content)

    print("stream: ", end="")
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        max_completion_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        elif chunk.usage:
            print(f"\nusage: {chunk.usage.completion_tokens} tokens")

    try:
        client.completions.create(model=model, prompt="x", temperature=3)
    except openai.BadRequestError as error:
        print("error:", error.body["message"])


if __name__ == "__main__":
    main()
