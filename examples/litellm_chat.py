"""LiteLLM (pip install litellm): chat, stream and text completion through its vLLM provider."""

import argparse

import litellm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="smollm2-135m-nsa")
    args = parser.parse_args()
    server = {"api_base": args.base_url, "api_key": "none", "temperature": 0}
    messages = [{"role": "user", "content": "What is the capital of France?"}]

    chat = litellm.completion(
        model=f"hosted_vllm/{args.model}", messages=messages, max_tokens=24, **server
    )
    print("chat:", chat.choices[0].message.content)

    stream = litellm.completion(
        model=f"hosted_vllm/{args.model}", messages=messages, max_tokens=24, stream=True, **server
    )
    print("stream:", "|".join(chunk.choices[0].delta.content or "" for chunk in stream))

    # Parameters that LiteLLM does not know are passed on.
    choice = litellm.completion(
        model=f"hosted_vllm/{args.model}",
        messages=[{"role": "user", "content": "Is France in Europe?"}],
        structured_outputs={"choice": ["yes", "no"]},
        **server,
    )
    print("choice:", choice.choices[0].message.content)

    text = litellm.text_completion(
        model=f"text-completion-openai/{args.model}",
        prompt="The capital of France is",
        max_tokens=8,
        **server,
    )
    print("completion:", text.choices[0].text)


if __name__ == "__main__":
    main()
