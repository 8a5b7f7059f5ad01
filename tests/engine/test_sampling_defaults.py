"""generation_config.json as the source of sampling defaults."""

import json
from pathlib import Path
from typing import Any

import pytest

from nsa_serve.config import EngineConfig
from nsa_serve.errors import ModelError
from nsa_serve.sampling_defaults import load_sampling_defaults


def defaults_of(tmp_path: Path, content: Any) -> dict[str, Any]:
    (tmp_path / "config.json").write_text("{}")
    if content is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(content))
    return load_sampling_defaults(EngineConfig(model=str(tmp_path)))


def test_known_fields_are_read_and_others_left(tmp_path: Path) -> None:
    content = {"temperature": 0.6, "top_k": 20, "top_p": None, "eos_token_id": 2, "max_length": 9}
    assert defaults_of(tmp_path, content) == {"temperature": 0.6, "top_k": 20}


def test_a_folder_without_the_file_recommends_nothing(tmp_path: Path) -> None:
    assert defaults_of(tmp_path, None) == {}


@pytest.mark.parametrize(
    "content",
    [{"temperature": 3}, {"top_p": "0.9"}, {"top_k": 2.5}, {"min_p": True}, {"top_p": 0}, []],
)
def test_wrong_values_are_named_with_their_file(tmp_path: Path, content: Any) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        defaults_of(tmp_path, content)


def test_the_default_model_brings_its_own() -> None:
    assert load_sampling_defaults(EngineConfig()) == {"temperature": 0.2, "top_p": 0.9}
