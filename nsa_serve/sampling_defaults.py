"""Sampling parameters that a checkpoint recommends, for requests that leave them out."""

from pathlib import Path
from typing import Any

from nsa_serve.config import EngineConfig
from nsa_serve.errors import ModelError, RequestError
from nsa_serve.model_source import BUILT_IN_MODELS, read_asset, resolve_model
from nsa_serve.models.config_file import read_json
from nsa_serve.request import SamplingParams

FIELDS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What is read of generation_config.json, as by vLLM; its lengths and token ids are not."""


def load_sampling_defaults(config: EngineConfig) -> dict[str, Any]:
    """Return the recommended parameters of the model that `config.model` names.

    From `generation_config.json` of a folder or hub id, or packaged with a built-in model; a GGUF
    file recommends nothing. Raises ModelError for values out of range.
    """
    origin, values = _recommended(config)
    found = {name: values[name] for name in FIELDS if values.get(name) is not None}
    for name, value in found.items():
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        if not (is_integer or (isinstance(value, float) and name != "top_k")):
            raise ModelError(f"{origin}: {name} must be a number, got {value!r}")
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise ModelError(f"{origin}: {error}; --generation-config none ignores it") from None
    return found


def _recommended(config: EngineConfig) -> tuple[str, dict[str, Any]]:
    """Return where recommendations come from, and all of them."""
    if config.model in BUILT_IN_MODELS:
        # Not through `resolve_model`, which would hash the weights once more.
        return config.model, read_asset(config.model)["generation_config"]
    named = Path(config.model).expanduser() / "config.json"
    if named.is_file() and "base" in (recipe := read_json(named)):
        return str(named), recipe.get("generation_config", {})
    folder = resolve_model(config).folder
    path = None if folder is None else folder / "generation_config.json"
    return str(path), read_json(path) if path is not None and path.is_file() else {}
