"""The safetensors files of a folder and what their headers say. No tensor is read, no torch.

Only safetensors are ever opened: a .bin or .pt file is a pickle, and a pickle is code.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from nsa_serve.errors import ModelError
from nsa_serve.models.config_file import read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """Where one weight lies and what the header says of it.

    dtype: as the header spells it. offset: of its first byte in the file; the bytes are in order,
    little-endian.
    """

    path: Path
    shape: tuple[int, ...]
    num_bytes: int
    dtype: str
    offset: int


def has_safetensors(folder: Path) -> bool:
    """Tell whether the folder has weights under one of the two names that are read."""
    return (folder / INDEX_NAME).is_file() or (folder / SINGLE_NAME).is_file()


def read_weight_index(folder: Path) -> dict[str, StoredWeight]:
    """Return every weight of a checkpoint folder, by its name there, file by file.

    Raises ModelError when there are no safetensors, a shard is missing or damaged, a name occurs
    twice, or a weight is not of a floating dtype.
    """
    index: dict[str, StoredWeight] = {}
    for path in _weight_files(folder):
        try:
            # It checks the whole header: ranges inside the file, gapless, of the right size.
            with safe_open(path, framework="numpy") as file:
                offsets = _offsets(path)
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    if name in index:
                        raise ModelError(f"{name} is in {index[name].path.name} and in {path.name}")
                    view = file.get_slice(name)
                    shape, dtype = view.get_shape(), view.get_dtype()
                    index[name] = _stored(path, name, shape, dtype, offset=offsets[name])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ModelError(f"cannot read {path}: {error}") from None
    return index


def _offsets(path: Path) -> dict[str, int]:
    """Return where each weight begins in a file whose header is known to be sound."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))
    return {
        name: 8 + header_bytes + item["data_offsets"][0]
        for name, item in header.items()
        if name != "__metadata__"
    }


def _stored(
    path: Path, name: str, shape: Iterable[int], dtype: str, *, offset: int
) -> StoredWeight:
    if dtype not in _BYTES:
        raise ModelError(
            f"{name} in {path.name} has dtype {dtype}; expected one of {', '.join(_BYTES)} "
            "(quantized safetensors are not supported)"
        )
    sizes = tuple(shape)
    num_bytes = _BYTES[dtype]
    for size in sizes:
        num_bytes *= size
    return StoredWeight(path, sizes, num_bytes, dtype, offset)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX_NAME).is_file():
        return _shards(folder)
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    names = sorted(path.name for path in folder.iterdir())
    if any(name.endswith(".safetensors") for name in names):
        raise ModelError(
            f"{folder} has safetensors files but neither {SINGLE_NAME} nor {INDEX_NAME}; "
            "complete the download, or rename the only file to model.safetensors"
        )
    pickles = [name for name in names if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise ModelError(
            f"{folder} has its weights only as {pickles[0]}, a pickle file, which is never loaded "
            "because it can run code; convert the checkpoint to safetensors"
        )
    raise ModelError(f"{folder} has no weights: expected {SINGLE_NAME} or {INDEX_NAME}")


def _shards(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{folder / INDEX_NAME} has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        # The index comes with the checkpoint: it must not point outside the checkpoint's folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ModelError(f"{INDEX_NAME} names {name!r}, which is no safetensors file beside it")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(names)} weight files: "
            f"{', '.join(missing[:10])}; complete the download"
        )
    return [folder / name for name in names]
