"""What the config.json of every family has in common, read strictly and without executing it.

The file comes with a checkpoint and is as trustworthy as the checkpoint: types and ranges are
checked, unknown fields are ignored, and nothing in it (`auto_map`) is ever run or imported.
Both spellings are read: `rope_theta`, `rope_scaling`, `torch_dtype` of transformers 4, and
`rope_parameters`, `dtype` of transformers 5.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nsa_serve.config import NSAConfig, RopeScaling
from nsa_serve.errors import ModelError
from nsa_serve.models.refusals import refuse_unsupported
from nsa_serve.models.rope_fields import positive_number, read_rope_scaling

PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
NonNegativeInt = Annotated[int, Field(ge=0, lt=2**31)]
NumLayers = Annotated[int, Field(ge=1, le=4096)]
PositiveFloat = Annotated[float, Field(gt=0)]


class CheckpointFields(BaseModel):
    """Fields that every family spells alike; a family adds its own."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: NumLayers
    hidden_act: str = "silu"
    rope_theta: PositiveFloat | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    max_position_embeddings: PositiveInt = 2048
    tie_word_embeddings: bool = False
    torch_dtype: str | None = None
    dtype: str | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    architectures: list[str] | None = None

    def common(self) -> dict[str, Any]:
        """Return the arguments of `ModelConfig` that are read alike in every family."""
        if self.hidden_act not in ("silu", "swish"):
            raise ModelError(f"hidden_act must be 'silu' or 'swish', got {self.hidden_act!r}")
        rope_theta, rope_scaling = self._rope()
        dtype = self.dtype or self.torch_dtype or "float32"
        return {
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_hidden_layers,
            "rope_theta": rope_theta,
            "rope_scaling": rope_scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "checkpoint_dtype": dtype.removeprefix("torch."),
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": read_token_ids(self.eos_token_id, "config.json"),
        }

    def _rope(self) -> tuple[float, RopeScaling]:
        merged = {**(self.rope_scaling or {}), **(self.rope_parameters or {})}
        nested = [name for name, value in merged.items() if isinstance(value, dict)]
        if nested:
            raise ModelError(f"rope_parameters per layer type ({nested[0]}) are not supported")
        partial = merged.pop("partial_rotary_factor", self.partial_rotary_factor)
        if partial != 1.0:
            raise ModelError(f"partial_rotary_factor must be 1.0, got {partial!r}")
        theta = merged.pop("rope_theta", self.rope_theta)
        theta = 10000.0 if theta is None else positive_number("rope_theta", theta)
        return theta, read_rope_scaling(merged, self.max_position_embeddings)


FieldsT = TypeVar("FieldsT", bound=CheckpointFields)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ModelError naming the file when it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def parse_fields(cls: type[FieldsT], raw: Mapping[str, Any]) -> FieldsT:
    """Validate config.json as `cls`.

    Raises ModelError naming every missing and wrong field, or one that the family does not have
    and that would change what the model computes.
    """
    refuse_unsupported(raw, known=cls.model_fields)
    try:
        return cls.model_validate(dict(raw))
    except ValidationError as error:
        items = error.errors(include_url=False)
        missing = [str(item["loc"][0]) for item in items if item["type"] == "missing"]
        problems = [f"missing {', '.join(missing)}"] if missing else []
        problems += [
            f"{item['loc'][0]}: {item['msg']}, got {item['input']!r}"
            for item in items
            if item["type"] != "missing"
        ]
        raise ModelError(f"config.json is unusable: {'; '.join(problems)}") from None


def read_token_ids(value: object, where: str) -> tuple[int, ...]:
    """Read a token id field: one id, several or none. Raises ModelError naming `where`."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(item) is int for item in ids):
        raise ModelError(f"{where}: eos_token_id must be an integer or a list, got {value!r}")
    return tuple(ids)


def read_nsa_section(section: object) -> NSAConfig:
    """Read an `nsa` section, whose fields are those of NSAConfig. Raises ModelError naming one."""
    if not isinstance(section, Mapping):
        raise ModelError(f"the nsa section must be an object, got {section!r}")
    return NSAConfig.from_dict(section)


def make_nsa_config(**values: Any) -> NSAConfig:
    """Build the `NSAConfig` of a family that spells it differently; a misfit is a ModelError."""
    try:
        return NSAConfig(**values)
    except ValueError as error:
        raise ModelError(f"config.json is unusable: {error}") from None
