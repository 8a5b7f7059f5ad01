"""Full garbage collections are rare while requests run, and the process's own otherwise."""

import gc
from pathlib import Path

import pytest

from nsa_serve.collector import rare_full_collections
from nsa_serve.llm import LLM
from nsa_serve.request import SamplingParams
from tests.util import write_checkpoint


def test_thresholds_are_put_back() -> None:
    before = gc.get_threshold()
    with pytest.raises(RuntimeError, match="stop"), rare_full_collections():
        inside = gc.get_threshold()
        raise RuntimeError("stop")
    assert inside[:2] == before[:2] and inside[2] > before[2]
    assert gc.get_threshold() == before


def test_generate_runs_few_full_collections(tmp_path: Path) -> None:
    """As many young collections as ever, and no full one for them."""
    generations: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            generations.append(info["generation"])

    llm = LLM(str(write_checkpoint(tmp_path / "model")), device="cpu", page_memory="4MiB")
    before = gc.get_threshold()
    gc.callbacks.append(note)
    try:
        # Any allocation of a container starts a collection of one generation or another.
        gc.set_threshold(1, 1, 1)
        llm.generate("one two three", SamplingParams(max_tokens=8, ignore_eos=True))
        assert gc.get_threshold() == (1, 1, 1)
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(note)
        llm.close()
    assert len(generations) > 100
    assert generations.count(2) < len(generations) / 50
