"""Quality of the default model beside its dense base, all through `LLM` in one run.

    python benchmarks/quality.py --heldout FILE [--student FOLDER] --out RESULT.json

Models: "dense" (the base with full attention), "training-free" (the base under the student's NSA
dialect with constant gates (0, 1, 0)) and, with --student, "student". The first two run past the
context that the base was made for, without any extension of it, where a part asks for that.

Parts: ppl, passkey, pairs, cloze, chat for every model; ablation and branches for the student.
Every part is written to the JSON as it ends, and one that fails is reported there and in the exit
status.
"""

import argparse
import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from export_hf import export_hf
from gpu_common import environment, resolve_device, write_result
from quality_branches import branch_shares
from quality_tasks import (
    CHAT_PROMPTS,
    DEPTHS,
    Retrieval,
    is_right,
    make_cloze,
    make_retrievals,
    make_spans,
)
from report_quality import quality_tables

from nsa_serve import LLM, SamplingParams
from nsa_serve.config import DEFAULT_MODEL, EngineConfig
from nsa_serve.model_source import load_tokenizer, read_asset, resolve_model

PARTS = ("ppl", "passkey", "pairs", "cloze", "chat", "ablation", "branches")
MODEL_PARTS = PARTS[:5]
BRANCHES = ("cmp", "slc", "swa")
_COMPARED_TOKENS = 64
_ANSWER_TOKENS = 16
_TRAINING_FREE: dict[str, Any] = {"gate": "constant", "gate_constant": [0.0, 1.0, 0.0]}


@dataclass(frozen=True)
class Sizes:
    """How much is asked.

    contexts: of perplexity, in tokens, of which the last num_targets of num_spans spans are scored.
    lengths: of retrieval prompts with their answers, num_samples a depth. num_cloze items of
    context_words words.
    """

    contexts: tuple[int, ...] = (512, 2048, 8192, 16384)
    num_spans: int = 40
    num_targets: int = 256
    lengths: tuple[int, ...] = (2048, 8192, 16384, 32768)
    num_samples: int = 8
    num_cloze: int = 200
    context_words: int = 120
    chat_tokens: int = 160
    num_chat: int = len(CHAT_PROMPTS)
    ablation_contexts: tuple[int, ...] = (2048, 8192)


TINY = Sizes(
    contexts=(64, 160),
    num_spans=2,
    num_targets=16,
    lengths=(256,),
    num_samples=1,
    num_cloze=2,
    context_words=30,
    chat_tokens=8,
    num_chat=2,
    ablation_contexts=(160,),
)


class Evaluation:
    """The questions, the models and the result file of one run."""

    def __init__(self, args: argparse.Namespace, sizes: Sizes, folder: Path) -> None:
        self.sizes = sizes
        self.folder = folder
        self.device = resolve_device(args.device)
        self.student: str | None = args.student
        self.out: Path | None = args.out
        self.base: str = args.base
        # A token comes after a scored span; a question and its answer are of a length together.
        self.max_len = max(max(sizes.contexts) + 1, *sizes.lengths)
        self.page_memory: str = args.page_memory
        self.texts = _read_books(args.heldout)
        self.section = _nsa_section(self.student or DEFAULT_MODEL)
        self.result: dict[str, Any] = {
            **environment(args.commit),
            "sizes": asdict(sizes),
            "heldout": {"file": args.heldout.name, "books": len(self.texts)},
            "models": {},
            "ablation": {},
            "errors": [],
        }
        self.dense_answers: list[list[int]] = []
        self._books: list[list[int]] = []

    def open(self, name: str, *, branches: Sequence[str] | None = None) -> LLM:
        """Load a model; `branches` leaves the others out."""
        section = {
            "dense": {
                **_TRAINING_FREE, "gate_constant": [0.0, 0.0, 1.0], "window_size": self.max_len
            },
            "training-free": {**_plain(self.section), **_TRAINING_FREE},
            "student": self.section,
        }[name]  # fmt: skip
        options: dict[str, Any] = {"device": self.device, "enable_prefix_caching": False}
        if self.device == "cuda" or self.page_memory:
            options["page_memory"] = self.page_memory or "40GiB"
        if name == "student":
            model = str(self.student)
            if branches is not None:
                path = self.folder / f"without-{'-'.join(branches)}.json"
                path.write_text(json.dumps({"nsa": {**section, "branches": list(branches)}}))
                options["nsa_config"] = str(path)
        else:
            model = str(self._base_folder(name, section))
        return LLM(model, max_model_len=self.max_len, **options)

    def _base_folder(self, name: str, section: dict[str, Any]) -> Path:
        """Return the base as a Llama folder, with an nsa section and without its length limit."""
        weights = self.folder / "weights"
        if not weights.is_dir():
            weights.mkdir()
            nsa = self.folder / "export.json"
            nsa.write_text(json.dumps({"nsa": {**_TRAINING_FREE}}))
            export_hf(weights, EngineConfig(model=self.base, nsa_config=str(nsa)))
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        config = json.loads((weights / "config.json").read_text())
        config |= {"nsa": section, "max_position_embeddings": self.max_len}
        (folder / "config.json").write_text(json.dumps(config))
        for item in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
            if not (folder / item).exists():
                (folder / item).symlink_to(weights / item)
        return folder

    def run_model(self, name: str, parts: Sequence[str]) -> None:
        """Run the parts that every model has."""
        row = self.result["models"].setdefault(name, {})
        start = time.perf_counter()
        try:
            llm = self.open(name)
        except Exception as error:
            self.result["errors"].append(f"{name}: {type(error).__name__}: {error}")
            print(f"{name:14} FAILED to load: {error}", flush=True)
            write_result(self.out, self.result)
            return
        row["load_s"] = time.perf_counter() - start
        tasks: dict[str, Callable[[LLM], Any]] = {
            "ppl": lambda llm: self.perplexities(llm, self.sizes.contexts),
            "passkey": lambda llm: self.retrieval(llm, "passkey"),
            "pairs": lambda llm: self.retrieval(llm, "pairs"),
            "cloze": self.cloze,
            "chat": lambda llm: self.chat(llm, is_dense=name == "dense"),
        }
        for part in parts:
            if part in tasks:
                self.part(name, part, row, partial(tasks[part], llm))
        if name == "student" and "branches" in parts:
            self.part(name, "branches", row, self.branch_shares)
        _release(llm)

    def part(self, name: str, part: str, row: dict[str, Any], run: Callable[[], Any]) -> None:
        """Run one part, and write what it gave; a failure is noted, and the next part runs."""
        start = time.perf_counter()
        try:
            row[part] = run()
        except Exception as error:
            self.result["errors"].append(f"{name} {part}: {type(error).__name__}: {error}")
            print(f"{name:14} {part:9} FAILED: {error}", flush=True)
        seconds = time.perf_counter() - start
        row.setdefault("seconds", {})[part] = seconds
        write_result(self.out, self.result)
        print(f"{name:14} {part:9} {seconds:7.1f} s  {_short(row.get(part))}", flush=True)

    def perplexities(self, llm: LLM, contexts: Sequence[int]) -> dict[str, Any]:
        """Return perplexity by context, always of the same tokens."""
        sizes = self.sizes
        spans = make_spans(
            self.books(llm),
            num_spans=sizes.num_spans,
            num_targets=sizes.num_targets,
            longest=max(sizes.contexts),
            seed=1,
        )
        found = {}
        for context in contexts:
            prompts = [span[-context:] for span in spans]
            scores = score(llm, prompts, [sizes.num_targets] * len(prompts))
            means = [-sum(values) / len(values) for values in scores]
            found[str(context)] = {
                "ppl": math.exp(sum(means) / len(means)),
                "nll_by_span": [round(mean, 5) for mean in means],
            }
        return found

    def books(self, llm: LLM) -> list[list[int]]:
        """Return the held-out books as ids; every model has the base's tokenizer."""
        if not self._books:
            self._books = llm.tokenizer.encode_batch(self.texts, add_special_tokens=False)
        return self._books

    def retrieval(self, llm: LLM, kind: str) -> dict[str, Any]:
        """Return accuracy of greedy answers by length, in all and by depth."""
        found: dict[str, Any] = {}
        books = self.books(llm)
        params = SamplingParams(temperature=0.0, max_tokens=_ANSWER_TOKENS)
        for length in self.sizes.lengths:
            items: list[Retrieval] = make_retrievals(
                kind,
                llm.tokenizer,
                books,
                length=length - _ANSWER_TOKENS,
                num_samples=self.sizes.num_samples,
                seed=2,
            )
            outputs = llm.generate([item.prompt for item in items], params, use_tqdm=False)
            right = [
                is_right(out.text, item.code) for out, item in zip(outputs, items, strict=True)
            ]
            found[str(length)] = {
                "accuracy": sum(right) / len(right),
                "num": len(right),
                "by_depth": {
                    str(depth): _mean(
                        [ok for ok, item in zip(right, items, strict=True) if item.depth == depth]
                    )
                    for depth in DEPTHS
                },
                "answers": [out.text[:24] for out in outputs[:10]],
            }
        return found

    def cloze(self, llm: LLM) -> dict[str, Any]:
        """Return the share of passages whose last word is the likeliest of the four."""
        items = make_cloze(
            llm.tokenizer,
            self.texts,
            count=self.sizes.num_cloze,
            context_words=self.sizes.context_words,
            seed=3,
        )
        pairs = [(item.prompt, choice) for item in items for choice in item.choices]
        scores = score(
            llm, [prompt + choice for prompt, choice in pairs], [len(choice) for _, choice in pairs]
        )
        sums = [sum(values) for values in scores]
        rows = [sums[i : i + 4] for i in range(0, len(sums), 4)]
        right = [row[0] > max(row[1:]) for row in rows]
        return {"accuracy": _mean(right), "num": len(right)}

    def chat(self, llm: LLM, *, is_dense: bool) -> dict[str, Any]:
        """Return greedy answers, and how far they agree with those of the dense model.

        prefix: first tokens that are equal, of 64 at most. equal: share of equal tokens by place.
        next_token: of the dense answer's tokens, those that are this model's likeliest after the
        dense answer so far.
        """
        prompts = [
            llm.tokenizer.encode(
                llm.tokenizer.apply_chat_template([{"role": "user", "content": text}]),
                add_special_tokens=False,
            )
            for text in CHAT_PROMPTS[: self.sizes.num_chat]
        ]
        params = SamplingParams(temperature=0.0, max_tokens=self.sizes.chat_tokens)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        answers = [output.token_ids for output in outputs]
        if is_dense:
            self.dense_answers = answers
        row: dict[str, Any] = {
            "prompts": list(CHAT_PROMPTS[: self.sizes.num_chat]),
            "answers": [output.text for output in outputs],
        }
        if self.dense_answers:
            wanted = [ids[:_COMPARED_TOKENS] for ids in self.dense_answers]
            places = [
                [a == b for a, b in zip(mine, theirs, strict=False)]
                + [False] * (len(theirs) - len(mine))
                for mine, theirs in zip(answers, wanted, strict=True)
            ]
            ranks = _ranks(
                llm, [p + ids for p, ids in zip(prompts, wanted, strict=True)], map(len, wanted)
            )
            row["prefix"] = _mean([(*ok, False).index(False) for ok in places])
            row["equal"] = _mean([same for ok in places for same in ok])
            row["next_token"] = _mean([rank == 1 for found in ranks for rank in found])
        return row

    def branch_shares(self) -> list[list[float]]:
        """Return each layer's shares of output norm of (cmp, slc, swa) on a held-out book."""
        tokenizer = load_tokenizer(EngineConfig(model=str(self.student)))
        # The first tokens of a book are its title and contents.
        length = min(4096, max(self.sizes.contexts))
        words = self.texts[0][: 16 * length]
        ids = tokenizer.encode(words, add_special_tokens=False)[length : 2 * length]
        shares: list[list[float]] = branch_shares(str(self.student), ids).tolist()
        return shares

    def run_ablation(self) -> None:
        """Run perplexity of the student without each branch."""
        for branch in BRANCHES:
            name = f"without {branch}"
            row = self.result["ablation"].setdefault(name, {})
            kept = [other for other in BRANCHES if other != branch]

            def run(kept: list[str] = kept) -> dict[str, Any]:
                llm = self.open("student", branches=kept)
                try:
                    return self.perplexities(llm, self.sizes.ablation_contexts)
                finally:
                    _release(llm)

            self.part(name, "ppl", row, run)


def score(llm: LLM, prompts: Sequence[list[int]], num_last: Sequence[int]) -> list[list[float]]:
    """Return the log-probabilities of the last tokens of each prompt, given all before them."""
    # The token that is generated costs less than a second way through the engine.
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    found = []
    # One prompt's entries at a time are kept no longer than they are used.
    for start in range(0, len(prompts), 16):
        part = list(prompts[start : start + 16])
        for output, last in zip(
            llm.generate(part, params, use_tqdm=False), num_last[start : start + 16], strict=True
        ):
            entries = output.prompt_logprobs or []
            found.append([entry.logprob for entry in entries[-last:]])
    return found


def _ranks(llm: LLM, prompts: Sequence[list[int]], num_last: Any) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate(list(prompts), params, use_tqdm=False)
    return [
        [entry.rank for entry in (output.prompt_logprobs or [])[-last:]] if last else []
        for output, last in zip(outputs, num_last, strict=True)
    ]


def _read_books(path: Path) -> list[str]:
    import lzma

    if not path.is_file():
        raise SystemExit(f"--heldout {path}: no such file; give a .txt or .txt.xz of whole books")
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8", "replace")
    books = [book.strip() for book in text.split("\n<|endoftext|>\n")]
    return [book for book in books if book]


def _nsa_section(model: str) -> dict[str, Any]:
    """Return the nsa section of an adapter or model folder, or of a built-in name."""
    path = Path(model) / "config.json"
    section: dict[str, Any] = (
        json.loads(path.read_text()) if path.is_file() else read_asset(model)
    )["nsa"]
    return section


def _plain(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section without what says how its gates are learned."""
    return {name: value for name, value in section.items() if not name.startswith("gate")}


def _release(llm: LLM) -> None:
    llm.close()
    # The cache of one model has to go before the next takes its memory.
    llm.__dict__.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _short(value: Any) -> str:
    """Return the figures of a part on one line."""
    if isinstance(value, dict) and "accuracy" in value:
        return f"{value['accuracy']:.3f}"
    if isinstance(value, dict) and "next_token" in value:
        return f"prefix {value['prefix']:.1f}, next token {value['next_token']:.3f}"
    if isinstance(value, dict):
        cells = []
        for name, cell in value.items():
            if isinstance(cell, dict):
                cells.append(f"{name}: {cell.get('ppl', cell.get('accuracy', 0.0)):.3f}")
        return ", ".join(cells)
    return ""


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure the quality of the default model.")
    parser.add_argument("--heldout", type=Path, required=True, help="books as .txt or .txt.xz")
    parser.add_argument("--student", help="adapter folder, model folder or built-in name")
    parser.add_argument("--base", help="dense base: .gguf or Llama folder; default: the built-in")
    parser.add_argument("--models", help="dense,training-free,student; default: all there are")
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--page-memory", default="", help="default on a GPU: 40GiB")
    parser.add_argument("--tiny", action="store_true", help="very little of everything: a trial")
    parser.add_argument("--contexts", type=_numbers)
    parser.add_argument("--lengths", type=_numbers)
    for name in ("spans", "targets", "samples", "cloze", "chat"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--out", type=Path, help="write the JSON to this file")
    parser.add_argument("--commit", help="the commit measured, where git cannot tell")
    return parser


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run what was asked for; print the tables."""
    args = _make_parser().parse_args(arguments)
    sizes = TINY if args.tiny else Sizes()
    asked = {
        "contexts": args.contexts,
        "lengths": args.lengths,
        **{f"num_{name}": getattr(args, name)
           for name in ("spans", "targets", "samples", "cloze", "chat")},
    }  # fmt: skip
    sizes = replace(sizes, **{name: value for name, value in asked.items() if value is not None})
    kept = tuple(item for item in sizes.ablation_contexts if item <= max(sizes.contexts))
    sizes = replace(sizes, ablation_contexts=kept)
    parts = args.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"--parts: {', '.join(sorted(unknown))} unknown; {', '.join(PARTS)} are")
    if min(sizes.contexts) <= sizes.num_targets:
        raise SystemExit(f"every context must be longer than the {sizes.num_targets} targets")
    if args.base is None:
        args.base = str(resolve_model(EngineConfig(model=DEFAULT_MODEL)).gguf)
    names = ["dense", "training-free", *(["student"] if args.student else [])]
    if args.models:
        names = [name for name in names if name in args.models.split(",")]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        evaluation = Evaluation(args, sizes, Path(folder))
        for name in names:
            evaluation.run_model(name, parts)
        if "student" in names and "ablation" in parts and kept:
            evaluation.run_ablation()
    result = evaluation.result
    result["seconds"] = time.perf_counter() - start
    write_result(args.out, result)
    print(quality_tables(result))
    if result["errors"]:
        raise SystemExit("\n".join(["parts that failed:", *result["errors"]]))
    return result


if __name__ == "__main__":
    main()
