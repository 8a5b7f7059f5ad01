"""Text that is held out and trained on is found, wherever it stands."""

import numpy as np
from overlap import run_hashes, shares


def test_a_copied_passage_is_found() -> None:
    rng = np.random.default_rng(0)
    training = rng.integers(0, 49152, 5000).astype(np.uint16)
    fresh = rng.integers(0, 49152, 1000).astype(np.uint16)
    mixed = np.concatenate((fresh[:100], training[1234:1434], fresh[100:300]))
    copied, none, half = shares([training[77:977], fresh, mixed], training, 16)
    assert copied == 1.0 and none == 0.0
    # Of 500 - 15 runs, 200 - 15 lie inside the copy.
    assert half == 185 / 485


def test_order_and_every_token_matter() -> None:
    ids = np.arange(40, dtype=np.uint16)
    hashes = run_hashes(ids, 8)
    assert len(np.unique(hashes)) == len(hashes) == 33
    for place in range(8):
        other = ids[:8].copy()
        other[place] += 100
        assert run_hashes(other, 8)[0] != hashes[0]
    assert run_hashes(ids[:8][::-1], 8)[0] != hashes[0]
    assert len(run_hashes(ids[:7], 8)) == 0
