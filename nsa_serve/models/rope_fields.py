"""`rope_scaling` of config.json, read strictly: a field that is not known is an error.

What the fields mean is in `rope_scaling.py`. No torch.
"""

import math
from collections.abc import Mapping
from typing import Any

from nsa_serve.config import RopeScaling
from nsa_serve.errors import ModelError

# Numbers that a type needs; "factor" and "original_max_position_embeddings" of the last two follow
# from each other where one is left out.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": (),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
_OPTIONAL: Mapping[str, tuple[str, ...]] = {
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
    ),
    "longrope": ("factor", "attention_factor"),
}
_LISTS = ("short_factor", "long_factor")
# What other types have is harmless in a section of this one; anything else may not be.
_KNOWN = {"rope_type", "type", *RopeScaling.__dataclass_fields__}


def read_rope_scaling(section: Mapping[str, Any], max_positions: int = 0) -> RopeScaling:
    """Read `rope_scaling` in either spelling (`rope_type`, or `type` in old files).

    max_positions: max_position_embeddings, for what is left out: yarn's old context is that, and
    a factor that is not stated is max_positions / original_max_position_embeddings.

    Raises ModelError for a type or field that is not supported, or a number missing or wrong.
    """
    rope_type = section.get("rope_type", section.get("type", "default"))
    if rope_type not in _NEEDED:
        raise ModelError(f"rope scaling {rope_type!r} is not supported; {', '.join(_NEEDED)} are")
    _check_names(section, rope_type)
    names = [
        name for name in (*_NEEDED[rope_type], *_OPTIONAL.get(rope_type, ())) if name in section
    ]
    values = {name: _read(name, section[name]) for name in names if section[name] is not None}
    if rope_type in ("yarn", "longrope"):
        _complete(values, rope_type, max_positions)
    if rope_type == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ModelError("rope scaling: low_freq_factor must be less than high_freq_factor")
    if rope_type == "yarn" and values.get("beta_fast", 32.0) <= values.get("beta_slow", 1.0):
        raise ModelError("rope scaling: beta_fast must be more than beta_slow")
    return RopeScaling(rope_type=rope_type, **values)


def positive_number(name: str, value: Any) -> float:
    """Return a finite number above 0. Raises ModelError naming it."""
    is_number = isinstance(value, int | float) and type(value) is not bool
    if not is_number or not math.isfinite(value) or value <= 0:
        raise ModelError(f"{name} must be a number above 0, got {value!r}")
    return float(value)


def _check_names(section: Mapping[str, Any], rope_type: str) -> None:
    # transformers says whether yarn rounds the borders of its blend; not rounding is not computed.
    if section.get("truncate") is False:
        raise ModelError("rope scaling: truncate false is not supported, only true is")
    unknown = sorted(section.keys() - _KNOWN - {"truncate"})
    if unknown:
        raise ModelError(
            f"rope scaling {rope_type!r} has {', '.join(unknown)}, which may change the rotation "
            f"and is not supported; known are {', '.join(sorted(_KNOWN))}"
        )
    missing = [name for name in _NEEDED[rope_type] if section.get(name) is None]
    if missing:
        raise ModelError(f"rope scaling {rope_type!r} lacks {', '.join(missing)}")


def _read(name: str, value: Any) -> Any:
    if name in _LISTS:
        if not isinstance(value, list) or not value:
            raise ModelError(f"rope scaling: {name} must be a list of numbers, got {value!r}")
        return tuple(positive_number(f"rope scaling: {name}", item) for item in value)
    number = positive_number(f"rope scaling: {name}", value)
    if name == "original_max_position_embeddings":
        if number != int(number):
            raise ModelError(f"rope scaling: {name} must be a count of tokens, got {value!r}")
        return int(number)
    return number


def _complete(values: dict[str, Any], rope_type: str, max_positions: int) -> None:
    """Fill in the old context and the factor, each from the other."""
    old_context = values.setdefault("original_max_position_embeddings", max_positions)
    if "factor" not in values:
        if rope_type == "yarn" and old_context == max_positions:
            raise ModelError(
                "rope scaling 'yarn' lacks factor, and original_max_position_embeddings does not "
                "say it either"
            )
        values["factor"] = max_positions / old_context
