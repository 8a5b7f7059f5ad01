"""A whole run of the recipe on a CPU: its loss falls, it resumes, and it keeps to its time."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import export
import numpy as np
import options
import plot
import pytest
import schedule
import torch
import train
from safetensors import safe_open
from schedule import PHASES, Clock, Phase, Source

from tests.train.tiny import CONFIG, write_base, write_corpus


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("recipe")
    write_base(root / "base")
    write_corpus(root / "data")
    return root


def start(root: Path, out: str, *more: str) -> None:
    """Train in this process."""
    places = ("--base", str(root / "base"), "--data", str(root / "data"), "--out", str(root / out))
    train.main(["--tiny", "--device", "cpu", *places, *more])


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_tiny_run_learns_and_writes_an_adapter(root: Path) -> None:
    start(root, "out")
    log = read_log(root / "out")
    assert [entry["step"] for entry in log] == list(range(30))
    assert {entry["phase"] for entry in log} == {"warm-up", "main", "long"}
    for phase, name in (("warm-up", "loss"), ("warm-up", "mse"), ("main", "kl")):
        values = [entry[name] for entry in log if entry["phase"] == phase]
        half = len(values) // 2
        assert np.mean(values[half:]) < np.mean(values[:half]), (phase, name, values)
    adapter = root / "out" / "adapter"
    config = json.loads((adapter / "config.json").read_text())
    assert (adapter / config["base"]["path"]).resolve() == (root / "base").resolve()
    assert config["nsa"]["gate"] == "linear" and config["model"]["max_position_embeddings"] == 16384
    with safe_open(adapter / config["adapter"]["file"], framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
        assert file.get_tensor("model.layers.1.self_attn.k_proj.lora_b").abs().sum() > 0
        assert file.get_tensor("model.layers.0.self_attn.g_proj.weight").dtype == torch.bfloat16
    prefix = "model.layers.0.self_attn."
    assert shapes[prefix + "q_proj.lora_a"] == [4, 48]
    assert shapes[prefix + "v_proj.lora_b"] == [32, 4]
    assert shapes[prefix + "g_proj.weight"] == [18, 48] and shapes[prefix + "g_proj.bias"] == [18]
    assert len(shapes) == CONFIG.num_layers * 10


def test_a_rehearsal_changes_nothing(root: Path) -> None:
    for name, option in (("rehearsed", "--rehearse"), ("unrehearsed", "--no-rehearse")):
        start(root, name, "--steps", "3", option)
    ours, theirs = (
        (root / name / "adapter" / export.ADAPTER).read_bytes()
        for name in ("rehearsed", "unrehearsed")
    )
    assert ours == theirs


def test_time_decides_when_it_ends(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that advances by 0.1 s a look; a rehearsal says how many steps to expect."""
    looks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: next(looks) / 10)
    monkeypatch.setattr(train, "time", clock)
    monkeypatch.setattr(schedule, "time", clock)
    start(root, "timed", "--minutes", "0.2", "--rehearse")
    assert "steps of" in capsys.readouterr().out
    log = read_log(root / "timed")
    assert len(log) > 3 and log[-1]["progress"] < 1.0
    assert log[-1]["elapsed_s"] <= 12.0
    assert (root / "timed" / "adapter" / export.ADAPTER).is_file()


def test_a_run_goes_on_where_it_stopped(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle and resumed, it ends with the same numbers."""
    start(root, "whole", "--steps", "8")
    real, calls = train.Trainer._train_step, []

    def stop(self: train.Trainer, *arguments: Any) -> dict[str, Any]:
        calls.append(self.step)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(train.Trainer, "_train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        start(root, "parts", "--steps", "8", "--checkpoint-every", "0")
    start(root, "parts", "--steps", "8", "--resume")
    assert calls == [0, 1, 2, 3, 4, 4, 5, 6, 7]
    whole, parts = (
        (root / name / "adapter" / export.ADAPTER).read_bytes() for name in ("whole", "parts")
    )
    assert whole == parts
    export.main(["--run", str(root / "parts"), "--to", str(root / "again")])
    assert (root / "again" / export.ADAPTER).read_bytes() == parts


def test_a_run_starts_from_an_adapter(root: Path) -> None:
    """One step without learning gives the same numbers again; another rank is refused."""
    start(root, "first", "--steps", "2")
    start(root, "second", "--steps", "1", "--lr", "0", "--init", str(root / "first" / "adapter"))
    first, second = (
        (root / name / "adapter" / export.ADAPTER).read_bytes() for name in ("first", "second")
    )
    assert first == second
    with pytest.raises(SystemExit, match="--rank"):
        start(root, "third", "--rank", "2", "--init", str(root / "first" / "adapter"))
    with pytest.raises(SystemExit, match="give its --rope"):
        start(root, "third", "--rope", "none", "--init", str(root / "first" / "adapter"))
    with pytest.raises(SystemExit, match="adapter folder"):
        start(root, "third", "--init", str(root / "data"))


def test_selection_is_trained_unless_its_weight_is_zero(root: Path) -> None:
    runs = ("--phases", "long", "--steps", "2", "--selection-kinds", "text", "--selection-weight")
    start(root, "unasked", *runs, "0")
    start(root, "asked", *runs, "50")
    assert read_log(root / "unasked")[0]["selection"] is None
    assert read_log(root / "asked")[0]["selection"] > 0.01
    # Of rows of retrieval alone, by default, and there are none.
    start(root, "default", *runs[:4])
    assert read_log(root / "default")[0]["selection"] is None
    asked, unasked = (
        (root / name / "adapter" / export.ADAPTER).read_bytes() for name in ("asked", "unasked")
    )
    assert asked != unasked


def test_time_is_never_overrun() -> None:
    clock = Clock(100.0, None, elapsed_s=95.0)
    assert clock.progress(3, 1.0) == pytest.approx(0.95, abs=0.01)
    assert clock.progress(3, 6.0) == 1.0
    assert Clock(None, 40).progress(10, 1e9) == 0.25


def test_phases_follow_progress_and_have_what_there_is() -> None:
    rng = np.random.default_rng(0)
    phases = schedule.usable_phases(PHASES, ("books", "retrieval"))
    at = {p: schedule.choose(phases, p, rng)[0].name for p in (0.0, 0.11, 0.13, 0.59, 0.61, 0.999)}
    assert list(at.values()) == ["warm-up", "warm-up", "main", "main", "long", "long"]
    assert {s.kind for phase in phases for s in phase.sources} == {"books", "retrieval"}
    with pytest.raises(SystemExit, match="needs one of"):
        schedule.usable_phases(PHASES, ("retrieval",))
    with pytest.raises(SystemExit, match="raise --max-length"):
        schedule.fit(Phase("x", 1.0, 0.0, (Source("books", 65, 1.0),)), 64)
    assert schedule.pick_phases(PHASES, ["long", "main"]) == [PHASES[2], PHASES[1]]
    with pytest.raises(SystemExit, match="warm-up, main, long are"):
        schedule.pick_phases(PHASES, ["short"])
    rates = [schedule.learning_rate(p) for p in (0.0, 0.03, 0.5, 1.0)]
    assert rates[0] < 0.05 and rates[1] == 1.0 and rates[3] == pytest.approx(schedule.FINAL_LR)


def test_fused_attention_is_refused_on_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options.parse(["--data", "x", "--out", "y", "--device", "cuda", "--attention", "sdpa"])
    assert "use triton or plain" in capsys.readouterr().err


def test_a_log_becomes_a_picture(root: Path) -> None:
    pytest.importorskip("matplotlib")
    start(root, "drawn", "--steps", "4")
    plot.main(["--log", str(root / "drawn" / "log.jsonl"), "--out", str(root / "curves.png")])
    assert (root / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_one_thing_says_when_it_ends(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        start(root, "both", "--steps", "3", "--minutes", "1")
    assert "leave one out" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(root: Path) -> None:
    with pytest.raises(SystemExit, match="checkpoint"):
        start(root, "nowhere", "--resume")
    with pytest.raises(SystemExit, match="settings"):
        export.main(["--run", str(root / "base")])
