"""Conversations written by the dense base model, to train its NSA student on.

    python examples/train_nsa/chat.py --num 2000 --out chat.jsonl

Prompts are made of templates and topics; none of them is among the twenty that
`benchmarks/quality.py` asks. Each line of the output is {"messages": [user, assistant]}, which
`data.py --chat` reads. The teacher is the default model's base as `LLM` computes it when its only
branch is a window longer than its context: that is full attention, on CPUs and GPUs.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nsa_serve import LLM, SamplingParams
from nsa_serve.config import DEFAULT_MODEL, EngineConfig
from nsa_serve.model_source import resolve_model

TOPICS = (
    "the moon", "honey bees", "the Roman roads", "making bread", "volcanoes", "learning to swim",
    "the printing press", "growing tomatoes", "whales", "chess", "the water cycle", "bicycles",
    "sleep", "rainbows", "the Silk Road", "playing the guitar", "glaciers", "coffee", "budgeting",
    "photosynthesis", "job interviews", "deserts", "the human heart", "recycling", "magnets",
    "earthquakes", "running a marathon", "dinosaurs", "maps", "the Great Wall", "cooking rice",
    "public speaking", "penguins", "electricity", "forests", "time zones", "writing poems",
    "vaccines", "the alphabet", "trains", "soap", "camping", "spiders", "bridges", "tea",
    "computer programs", "the ocean floor", "music theory", "sourdough", "owls",
)  # fmt: skip

TEMPLATES = (
    "Explain {topic} to a ten-year-old.",
    "Write a short paragraph about {topic}.",
    "Give me five interesting facts about {topic}.",
    "What are common mistakes people make about {topic}?",
    "Write a short story in which {topic} plays a part.",
    "Why does {topic} matter? Answer in a few sentences.",
    "Make a list of questions that a beginner might ask about {topic}.",
    "Summarize what is known about {topic}.",
    "Write an email to a friend about {topic}.",
    "Compare {topic} with {other}.",
    "I have to give a talk on {topic}. How should I begin?",
    "Write a dialogue between two people who disagree about {topic}.",
    "What is the history of {topic}?",
    "Describe {topic} step by step.",
    "Give advice to somebody who wants to know more about {topic}.",
)


def make_prompts(count: int, *, seed: int) -> list[str]:
    """Return `count` prompts in a random order, all different as long as there are enough."""
    rng = random.Random(seed)
    pairs = [(template, topic) for template in TEMPLATES for topic in TOPICS]
    rng.shuffle(pairs)
    chosen = [pairs[i % len(pairs)] for i in range(count)]
    return [
        template.format(topic=topic, other=rng.choice([item for item in TOPICS if item != topic]))
        for template, topic in chosen
    ]


def dense_section(max_model_len: int) -> dict[str, Any]:
    """Return an `nsa` section that is full attention up to so many tokens."""
    return {
        "nsa": {
            "window_size": max_model_len,
            "gate": "constant",
            "gate_constant": [0.0, 0.0, 1.0],
        }
    }


def open_teacher(model: str, folder: Path, **options: Any) -> LLM:
    """Load the dense base of a built-in model, or a .gguf file. `folder` gets its nsa section."""
    source = resolve_model(EngineConfig(model=model))
    base = model if source.gguf is None else str(source.gguf)
    options = {"max_model_len": 2048, **options}
    path = folder / "dense.json"
    path.write_text(json.dumps(dense_section(options["max_model_len"])))
    return LLM(base, nsa_config=str(path), **options)


def write_chat(llm: LLM, prompts: Sequence[str], out: Path, *, seed: int, max_tokens: int) -> int:
    """Answer the prompts; write what ended by itself or is long; return the tokens generated."""
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    params = [
        SamplingParams(temperature=0.7, top_p=0.95, max_tokens=max_tokens, seed=seed + index)
        for index in range(len(prompts))
    ]
    outputs = llm.chat(messages, params)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8") as file:
        for asked, output in zip(messages, outputs, strict=True):
            answer = {"role": "assistant", "content": output.text.strip()}
            file.write(json.dumps({"messages": [*asked, answer]}) + "\n")
    return sum(output.num_output_tokens for output in outputs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate the conversations."""
    parser = argparse.ArgumentParser(description="Let the dense base answer prompts.")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--num", type=int, default=2000, help="conversations")
    parser.add_argument("--max-tokens", type=int, default=384, help="of an answer")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-num-seqs", type=int, default=256, help="answers at a time")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--page-memory", default="", help="of the cache, where others share a GPU")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    prompts = make_prompts(args.num, seed=args.seed)
    start = time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        open_teacher(
            args.model,
            Path(folder),
            device=args.device,
            max_num_seqs=args.max_num_seqs,
            page_memory=args.page_memory,
        ) as llm,
    ):
        loaded = time.perf_counter()
        num_tokens = write_chat(
            llm, prompts, args.out, seed=args.seed * 1_000_000, max_tokens=args.max_tokens
        )
    seconds = time.perf_counter() - loaded
    print(
        f"{len(prompts)} answers, {num_tokens} tokens, {num_tokens / seconds:.0f} tokens/s; "
        f"loading {loaded - start:.1f} s, generating {seconds:.1f} s"
    )


if __name__ == "__main__":
    main()
