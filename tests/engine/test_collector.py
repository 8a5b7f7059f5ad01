"""Full garbage collections are rare while requests run, and the process's own otherwise."""

import gc
from pathlib import Path
from unittest.mock import patch

import pytest

from nsa_serve.collector import rare_full_collections, set_aside, tame_collector
from nsa_serve.llm import LLM
from nsa_serve.request import SamplingParams, TokenOutput
from tests.util import write_checkpoint


def test_thresholds_are_put_back() -> None:
    before = gc.get_threshold()
    with pytest.raises(RuntimeError, match="stop"), rare_full_collections():
        inside = gc.get_threshold()
        raise RuntimeError("stop")
    assert inside[:2] == before[:2] and inside[2] > before[2]
    assert gc.get_threshold() == before


@pytest.mark.parametrize("rarer", [1, 100])
def test_what_a_process_loaded_is_left_out(rarer: int) -> None:
    before = gc.get_threshold()
    try:
        tame_collector(rarer)
        assert gc.get_freeze_count() > 1000
        assert gc.get_threshold() == (*before[:2], rarer * before[2])
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def test_what_is_set_aside_is_not_walked_until_the_end() -> None:
    young: list[object] = []
    assert gc.get_freeze_count() == 0
    with pytest.raises(RuntimeError, match="stop"), set_aside():
        assert not any(item is young for item in gc.get_objects())
        raise RuntimeError("stop")
    assert gc.get_freeze_count() == 0
    assert any(item is young for item in gc.get_objects())


def test_what_a_process_set_aside_stays_so() -> None:
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        with set_aside():
            pass
        # Objects may have ended meanwhile, none came back.
        assert before / 2 < gc.get_freeze_count() <= before
    finally:
        gc.unfreeze()


def test_generate_walks_no_prompt(tmp_path: Path) -> None:
    """Neither the caller's list nor a copy of it, once its own step has run."""
    lengths: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            items = gc.get_objects(generation=info["generation"])
            lengths.append(max((len(item) for item in items if type(item) is list), default=0))

    llm = LLM(str(write_checkpoint(tmp_path / "model")), device="cpu", page_memory="4MiB")
    prompt = [5 + token % 50 for token in range(200)]
    before = gc.get_threshold()
    gc.collect()
    try:
        gc.set_threshold(700)
        original = llm._engine.step

        def step() -> list[TokenOutput]:
            outputs = original()
            if note not in gc.callbacks:
                gc.callbacks.append(note)
                gc.set_threshold(20)
            return outputs

        with patch.object(llm._engine, "step", step):
            llm.generate([prompt], SamplingParams(max_tokens=8, ignore_eos=True))
    finally:
        gc.set_threshold(*before)
        if note in gc.callbacks:
            gc.callbacks.remove(note)
        llm.close()
    assert lengths and max(lengths) < len(prompt)


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
