"""The openai package with asyncio: streams that run side by side, and one that is cancelled."""

import argparse
import asyncio

import openai


async def tell(client: openai.AsyncOpenAI, model: str, animal: str) -> str:
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": f"Say one sentence about the {animal}."}],
        max_completion_tokens=24,
        temperature=0,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    return "".join(pieces)


async def run(base_url: str) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none") as client:
        model = (await client.models.list()).data[0].id
        animals = ("cat", "whale", "bee")
        answers = await asyncio.gather(*(tell(client, model, animal) for animal in animals))
        for animal, answer in zip(animals, answers, strict=True):
            print(f"{animal}: {answer}")

        # Leaving the block closes the connection, and the server stops generating.
        stream = await client.completions.create(
            model=model, prompt="One, two, three,", max_tokens=400, stream=True
        )
        num_chunks = 0
        async with stream:
            async for _ in stream:
                num_chunks += 1
                if num_chunks == 5:
                    break
        print("cancelled after", num_chunks, "chunks")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    asyncio.run(run(parser.parse_args().base_url))


if __name__ == "__main__":
    main()
