"""The quality benchmark end to end, at its smallest, and its tables."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import quality
from report_quality import chat_section, fill_card, quality_section

PROSE = "The old man went to the sea. He said nothing! And why should he?\nNobody asked him. "


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("books") / "heldout.txt"
    path.write_text("\n\n<|endoftext|>\n\n".join([PROSE * 30, PROSE[20:] * 40]))
    return path


@pytest.fixture(scope="module")
def result(heldout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("results") / "quality.json"
    options = [
        "--tiny",
        "--device",
        "cpu",
        "--page-memory",
        "256MiB",
        "--parts",
        "ppl,passkey,chat",
    ]
    found = quality.main(["--heldout", str(heldout), "--out", str(out), *options])
    assert json.loads(out.read_text()) == json.loads(json.dumps(found))
    return found


def test_below_the_selected_blocks_training_free_is_dense(result: dict[str, Any]) -> None:
    """16 blocks of 64 are everything that 160 tokens see, but for rounding in bfloat16."""
    dense, sparse = (result["models"][name]["ppl"] for name in ("dense", "training-free"))
    for context in ("64", "160"):
        assert math.isfinite(dense[context]["ppl"]) and dense[context]["ppl"] > 1
        assert sparse[context]["ppl"] == pytest.approx(dense[context]["ppl"], rel=0.02)
    assert dense["160"]["ppl"] != dense["64"]["ppl"]


def test_the_dense_model_agrees_with_itself(result: dict[str, Any]) -> None:
    chat = result["models"]["dense"]["chat"]
    assert (chat["equal"], chat["prefix"]) == (1.0, 8.0)
    # Decode and prefill round differently: a near tie may turn.
    assert chat["next_token"] >= 0.8
    assert len(chat["answers"]) == 2


def test_every_depth_is_asked(result: dict[str, Any]) -> None:
    row = result["models"]["dense"]["passkey"]["256"]
    assert row["num"] == 5 and set(row["by_depth"]) == {"0.1", "0.3", "0.5", "0.7", "0.9"}


def test_tables_have_what_was_run(result: dict[str, Any], tmp_path: Path) -> None:
    assert quality_section(tmp_path) == ""
    student = result["models"]["dense"] | {"branches": [[0.2, 0.5, 0.3], [0.1, 0.6, 0.3]]}
    whole = result | {"models": {**result["models"], "student": student}}
    whole["ablation"] = {"without cmp": {"ppl": {"160": {"ppl": 12.3456}}}}
    (tmp_path / "quality.json").write_text(json.dumps(whole))
    text = quality_section(tmp_path)
    assert "| without cmp | 12.346 |" in text and "| cmp | 0.20 | 0.10 |" in text
    assert "| tokens | 64 | 160 |" in text and "Key-value" not in text
    assert chat_section(result).count("> ") >= 4


def test_a_part_that_fails_is_reported(heldout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("a cause")

    monkeypatch.setattr(quality.Evaluation, "cloze", fail)
    options = ["--tiny", "--device", "cpu", "--page-memory", "256MiB", "--parts", "cloze"]
    with pytest.raises(SystemExit, match="dense cloze: ValueError: a cause"):
        quality.main(["--heldout", str(heldout), "--models", "dense", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--parts", "speed"], "speed unknown"), (["--contexts", "16"], "longer than the 16 targets")],
)
def test_wrong_options_are_named(heldout: Path, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        quality.main(["--heldout", str(heldout), "--tiny", *options])


def test_a_model_card_is_filled_in_again_and_again(result: dict[str, Any]) -> None:
    text = "# A\n\n<!-- figures -->\nold\n<!-- end of figures -->\n\nB\n<!-- chats -->"
    with pytest.raises(ValueError, match="chats"):
        fill_card(text, result)
    once = fill_card(text + "<!-- end of chats -->\nC\n", result)
    assert "old" not in once and "| training-free |" in once and "**What is the capital" in once
    assert once.startswith("# A") and once.endswith("C\n")
    assert fill_card(once, result) == once


def test_a_model_that_does_not_load_is_reported(heldout: Path, tmp_path: Path) -> None:
    """The others are measured all the same."""
    out = tmp_path / "result.json"
    (tmp_path / "student").mkdir()
    sizes = ["--tiny", "--device", "cpu", "--page-memory", "256MiB", "--parts", "chat"]
    models = ["--models", "dense,student", "--student", str(tmp_path / "student")]
    (tmp_path / "student" / "config.json").write_text('{"nsa": {}}')
    with pytest.raises(SystemExit, match="student: "):
        quality.main(["--heldout", str(heldout), "--out", str(out), *sizes, *models])
    assert "chat" in json.loads(out.read_text())["models"]["dense"]
