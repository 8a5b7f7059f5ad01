"""Text files to token arrays on disk, and batches out of them.

    python examples/train_nsa/data.py --books BOOKS... [--text TEXT...] [--chat FILE] --out DIR

A kind of data ("books", "text", "chat") is two arrays in DIR: `KIND.npy`, uint16 [tokens], all
documents one after the other without end tokens, and `KIND.ends.npy`, int64 [documents], where each
document ends. "chat" has a third, `chat.weight.npy`, uint8 [tokens]: 1 on what the assistant says.
`meta.json` says what they were made of. The fourth kind, "retrieval", is made while it is read, in
haystacks of "books".

B rows of a batch, T tokens of a row.
"""

import argparse
import fnmatch
import json
import lzma
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nsa_serve.config import DEFAULT_MODEL, EngineConfig, make_config
from nsa_serve.model_source import load_tokenizer
from nsa_serve.tokenizer import Tokenizer

Ids = NDArray[np.int64]
Weights = NDArray[np.float32]
Batch = tuple[Ids, Weights]
# Token ids of a document, and which of them count (None: all).
Document = tuple[NDArray[np.uint16], NDArray[np.uint8] | None]

SEPARATOR = "<|endoftext|>"
"""The line between two documents of a file."""

_worker_tokenizer: list[Tokenizer] = []


class Corpus:
    """Token arrays in a folder, as batches of rows of one exact length.

    folder: what `main` wrote. tokens_per_batch: a batch has as many rows as fit, at least one.
    Raises SystemExit when something is missing there.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokens_per_batch: int = 32768,
    ) -> None:
        self.folder = Path(folder)
        self.tokens_per_batch = tokens_per_batch
        path = self.folder / "meta.json"
        if not path.is_file():
            raise SystemExit(f"{path} is missing: write the folder with data.py --out {folder}")
        self.meta: dict[str, Any] = json.loads(path.read_text())
        self.end_id = int(self.meta["end_id"])
        self._kinds = {kind: _Kind(self.folder, kind) for kind in self.meta["kinds"]}

    @property
    def kinds(self) -> tuple[str, ...]:
        """What `batch` can give."""
        extra = ("retrieval",) if "books" in self._kinds else ()
        return (*self._kinds, *extra)

    def all_tokens(self) -> NDArray[np.uint16]:
        """Return the tokens of all books and texts, one after the other."""
        kinds = [self._kinds[kind] for kind in ("books", "text") if kind in self._kinds]
        return np.concatenate([kind.ids for kind in kinds])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the arrays were made with."""
        return _load(self.meta["model"])

    def batch(
        self,
        kind: str,
        length: int,
        rng: np.random.Generator,
        *,
        batch_size: int | None = None,
    ) -> Batch:
        """Return ids int64 [B, T] and loss_weight float32 [B, T], T = length.

        loss_weight[b, t] weighs the prediction of ids[b, t] from the tokens before it, so the
        first column is 0. batch_size: B, instead of what tokens_per_batch gives. Rows depend on
        the state of `rng` alone. Raises SystemExit for a kind that the folder lacks.
        """
        num_rows = batch_size or max(1, self.tokens_per_batch // length)
        if kind == "retrieval" and "books" in self._kinds:
            rows = [self._retrieval.make(length, rng) for _ in range(num_rows)]
        elif kind in self._kinds:
            rows = [self._kinds[kind].row(length, rng, self.end_id) for _ in range(num_rows)]
        else:
            raise SystemExit(f"{self.folder} has no {kind!r}; it has {', '.join(self.kinds)}")
        ids = np.stack([row for row, _ in rows])
        weight = np.stack([row for _, row in rows])
        weight[:, 0] = 0.0
        return ids, weight

    @cached_property
    def _retrieval(self) -> Any:
        # It reads this module's types.
        from retrieval import RetrievalMaker

        return RetrievalMaker(self.tokenizer, self._kinds["books"].ids)


def open_corpus(folder: str | Path, *, tokens_per_batch: int = 32768) -> Corpus:
    """Open what `main` wrote."""
    return Corpus(folder, tokens_per_batch=tokens_per_batch)


class _Kind:
    """The arrays of one kind, mapped from disk."""

    def __init__(self, folder: Path, kind: str) -> None:
        # Not numpy.load, which may unpickle; this refuses arrays of objects.
        self.ids = _map(folder / f"{kind}.npy")
        self.ends = np.asarray(_map(folder / f"{kind}.ends.npy"))
        self.starts = np.concatenate(([0], self.ends[:-1]))
        weight = folder / f"{kind}.weight.npy"
        self.weight = _map(weight) if weight.is_file() else None

    def row(self, length: int, rng: np.random.Generator, end_id: int) -> Batch:
        """Return one row: a cut of a document, or several with the end token after each."""
        ids = np.empty(length, dtype=np.int64)
        weight = np.ones(length, dtype=np.float32)
        filled = 0
        while filled < length:
            # A document is chosen by its length: every token of the corpus is equally likely.
            place = int(rng.integers(self.ends[-1]))
            document = int(np.searchsorted(self.ends, place, side="right"))
            start, end = int(self.starts[document]), int(self.ends[document])
            room = length - filled
            if end - start > room:
                # What is cut starts anywhere if it fills the row, else at its beginning.
                first = int(rng.integers(start, end - room + 1)) if filled == 0 else start
                end = first + room
            else:
                first = start
            count = end - first
            ids[filled : filled + count] = self.ids[first:end]
            if self.weight is not None:
                weight[filled : filled + count] = self.weight[first:end]
            filled += count
            if filled < length:
                ids[filled] = end_id
                filled += 1
        return ids, weight


def read_documents(path: Path) -> Iterator[str]:
    """Yield the documents of a .txt, .txt.xz or .json file (a list or object of texts)."""
    data = path.read_bytes()
    text = (lzma.decompress(data) if path.suffix == ".xz" else data).decode("utf-8", "replace")
    parts: Iterable[str]
    if path.suffix == ".json":
        parts = _strings(json.loads(text))
    else:
        parts = text.replace("\r\n", "\n").split(f"\n{SEPARATOR}\n")
    for part in parts:
        if document := part.removesuffix(SEPARATOR).strip():
            yield document


def find_files(paths: Sequence[Path], *, skip: str) -> list[Path]:
    """Return the text files among `paths` and below folders, sorted, without names like `skip`.

    Raises SystemExit for a path that does not exist, or when nothing is left.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            patterns = ("*.txt", "*.txt.xz", "*.json")
            found += sorted(file for pattern in patterns for file in path.rglob(pattern))
        elif path.is_file():
            found.append(path)
        else:
            raise SystemExit(f"{path} does not exist; expected a text file or a folder of them")
    kept = [path for path in found if not (skip and fnmatch.fnmatch(path.name, skip))]
    for path in found:
        if path not in kept:
            print(f"skipped, by --skip {skip!r}: {path}")
    if not kept:
        raise SystemExit(f"no .txt, .txt.xz or .json files in {', '.join(map(str, paths))}")
    return kept


def write_kind(folder: Path, kind: str, documents: Iterable[Document]) -> dict[str, int]:
    """Write the arrays of one kind; return how many documents and tokens."""
    parts, weights, ends, total = [], [], [], 0
    for ids, weight in documents:
        if not len(ids):
            continue
        total += len(ids)
        parts.append(ids)
        ends.append(total)
        if weight is not None:
            weights.append(weight)
    if not parts:
        raise SystemExit(f"nothing to write as {kind!r}: the files hold no text")
    np.save(folder / f"{kind}.npy", np.concatenate(parts), allow_pickle=False)
    np.save(folder / f"{kind}.ends.npy", np.array(ends, dtype=np.int64), allow_pickle=False)
    if weights:
        np.save(folder / f"{kind}.weight.npy", np.concatenate(weights), allow_pickle=False)
    return {"documents": len(ends), "tokens": total}


def encode_documents(model: str, texts: Iterable[str], *, processes: int) -> Iterator[Document]:
    """Tokenize documents in their order, without special tokens added."""
    if processes == 1:
        _start_worker(model)
        yield from map(_encode, texts)
        return
    # Not forked: the tokenizer's threads do not survive that.
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, _start_worker, (model,)) as pool:
        yield from pool.imap(_encode, texts, chunksize=1)


def encode_chat(tokenizer: Tokenizer, messages: Sequence[dict[str, str]]) -> Document:
    """Tokenize one conversation; weights are 1 on the assistant's words and its end marker."""
    ids: list[int] = []
    weights: list[int] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # What the template writes up to the answer, and with it: the difference is the answer.
        before = tokenizer.apply_chat_template(messages[:index], add_generation_prompt=True)
        after = tokenizer.apply_chat_template(messages[: index + 1], add_generation_prompt=False)
        head = tokenizer.encode(before, add_special_tokens=False)[len(ids) :]
        answer = tokenizer.encode(after.removeprefix(before), add_special_tokens=False)
        ids += head + answer
        weights += [0] * len(head) + [1] * len(answer)
    return np.array(ids, dtype=np.uint16), np.array(weights, dtype=np.uint8)


def read_conversations(path: Path) -> Iterator[list[dict[str, str]]]:
    """Yield the conversations of a JSON-lines file of {"messages": [...]} objects."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)["messages"]


def _encode(text: str) -> Document:
    ids = _worker_tokenizer[0].encode(text, add_special_tokens=False)
    return np.array(ids, dtype=np.uint16), None


def _start_worker(model: str) -> None:
    _worker_tokenizer[:] = [_load(model)]


def _load(model: str) -> Tokenizer:
    tokenizer = load_tokenizer(make_config(EngineConfig, {"model": model}))
    if tokenizer.vocab_size > 2**16:
        raise SystemExit(f"{model} has {tokenizer.vocab_size} tokens; uint16 arrays hold 65536")
    return tokenizer


def _map(path: Path) -> NDArray[Any]:
    if not path.is_file():
        raise SystemExit(f"{path} is missing: write the folder again with data.py --out")
    return np.lib.format.open_memmap(path, mode="r")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the arrays."""
    parser = argparse.ArgumentParser(description="Tokenize text for train.py.")
    parser.add_argument("--books", type=Path, nargs="+", required=True, help="files or folders")
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="shorter documents")
    parser.add_argument("--chat", type=Path, help="what chat.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer")
    parser.add_argument("--skip", default="*heldout*", help="file names to leave out")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = _load(args.model)
    if tokenizer.eos_token_id is None:
        raise SystemExit(f"the tokenizer of {args.model} has no end token")
    kinds: dict[str, Any] = {}
    for kind, paths in (("books", args.books), ("text", args.text)):
        if not paths:
            continue
        start = time.perf_counter()
        files = find_files(paths, skip=args.skip)
        texts = (text for path in files for text in read_documents(path))
        documents = encode_documents(args.model, texts, processes=args.processes)
        kinds[kind] = write_kind(args.out, kind, documents)
        kinds[kind]["files"] = [path.name for path in files]
        print(f"{kind}: {kinds[kind]} in {time.perf_counter() - start:.1f} s", flush=True)
    if args.chat is not None:
        conversations = (encode_chat(tokenizer, item) for item in read_conversations(args.chat))
        kinds["chat"] = write_kind(args.out, "chat", conversations)
        print(f"chat: {kinds['chat']}", flush=True)
    end_id = tokenizer.encode(SEPARATOR, add_special_tokens=False)
    meta = {
        "model": args.model,
        # The end of a document, where the vocabulary has such a token, else of an answer.
        "end_id": end_id[0] if len(end_id) == 1 else tokenizer.eos_token_id,
        "kinds": kinds,
    }
    (args.out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")


if __name__ == "__main__":
    main()
