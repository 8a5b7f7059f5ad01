"""How much of a held-out text occurs word for word in the training data.

    python examples/train_nsa/overlap.py --data DATA --heldout FILE

DATA is what data.py wrote. Prints, for each document of FILE, the share of its runs of --run tokens
that occur in DATA's books or text, whatever the position. Books of one language share phrases; a
book that is in both has a share near 1.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from data import Corpus, read_documents
from numpy.typing import NDArray

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def run_hashes(ids: NDArray[np.uint16], run: int) -> NDArray[np.uint64]:
    """Return a 64-bit hash of every run of `run` tokens: [tokens - run + 1], or none."""
    count = len(ids) - run + 1
    hashes = np.zeros(max(0, count), dtype=np.uint64)
    for offset in range(run if count > 0 else 0):
        # Multiplication modulo 2^64; the shift lets high bits reach low ones.
        hashes = (hashes ^ ids[offset : offset + count]) * _MULTIPLIER
        hashes ^= hashes >> np.uint64(29)
    return hashes


def shares(
    documents: Sequence[NDArray[np.uint16]], training: NDArray[np.uint16], run: int
) -> list[float]:
    """Return for each document the share of its runs that occur in the training tokens."""
    known = np.unique(run_hashes(training, run))
    found = []
    for ids in documents:
        hashes = run_hashes(ids, run)
        places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
        found.append(float((known[places] == hashes).mean()) if len(hashes) else 0.0)
    return found


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Print the shares."""
    parser = argparse.ArgumentParser(description="Compare held-out text with training data.")
    parser.add_argument("--data", type=Path, required=True, help="what data.py wrote")
    parser.add_argument("--heldout", type=Path, required=True, help=".txt or .txt.xz")
    parser.add_argument("--run", type=int, default=16, help="tokens")
    args = parser.parse_args(arguments)
    corpus = Corpus(args.data)
    texts = list(read_documents(args.heldout))
    ids = corpus.tokenizer.encode_batch(texts, add_special_tokens=False)
    found = shares([np.array(item, dtype=np.uint16) for item in ids], corpus.all_tokens(), args.run)
    for text, share in zip(texts, found, strict=True):
        print(f"{share:8.4%} of {args.run}-token runs: {text[:60].splitlines()[0]!r}")
    return found


if __name__ == "__main__":
    main()
