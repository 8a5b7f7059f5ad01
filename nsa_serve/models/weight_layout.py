"""How the weights of a model lie on a device: fused matrices, and where each weight goes in them.

No torch. Canonical names as in `weight_shapes`; a fused matrix stacks the rows of several weights:
`self_attn.qkvg` is q, all keys, all values and (when learned) the gates or the first layer of their
MLP; `gate_up` is gate and up. Experts are stacked once more: `mlp.experts.gate_up` [E, 2I, hidden]
and `mlp.experts.down` [E, hidden, I], E experts of width I.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nsa_serve.config import ModelConfig
from nsa_serve.errors import ConfigError
from nsa_serve.models.weight_shapes import KV_BRANCHES, expected_weights

Quantization = Literal["fp8"]

SCALE_BYTES = 4
"""Of the fp32 scale that each row of a quantized matrix has."""

_QKVG = (
    "q_proj",
    "k_proj",
    *(f"k_{branch}_proj" for branch in KV_BRANCHES),
    "v_proj",
    *(f"v_{branch}_proj" for branch in KV_BRANCHES),
    "g_proj",
    "gate.fc1",
)
# In the order of rows. A model has some of the parts of a matrix.
_FUSED: Mapping[str, tuple[str, ...]] = {
    "self_attn.qkvg": tuple(f"self_attn.{part}" for part in _QKVG),
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.shared_experts.gate_up": (
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
    ),
    "mlp.experts.gate_up": ("mlp.experts.gate_proj", "mlp.experts.up_proj"),
    "mlp.experts.down": ("mlp.experts.down_proj",),
}
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.")
# Where a token's time goes. Embedding and head stay as they are: the one is looked up, not
# multiplied, and errors of the other reach the logits unaveraged. Norms, biases, compression and
# gate MLPs are small.
_QUANTIZED = (
    "self_attn.qkvg.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_up.weight",
    "mlp.down_proj.weight",
)
# Of both sides of a matrix that is multiplied in 8 bits.
_FP8_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a canonical weight goes: its rows begin at `first_row` of the tensor `name`.

    Rows of a tensor of experts [E, N, K] are counted as if it were [E * N, K].
    """

    name: str
    first_row: int


@dataclass(frozen=True, slots=True)
class WeightLayout:
    """The tensors of a model on a device.

    shapes: of every tensor, by name. slots: by canonical name. quantized: tensors in e4m3, each
    with a scale by row.
    """

    shapes: Mapping[str, tuple[int, ...]]
    slots: Mapping[str, Slot]
    quantized: frozenset[str]


def weight_layout(config: ModelConfig, quantization: Quantization | None = None) -> WeightLayout:
    """Lay out every weight of `expected_weights`.

    With "fp8" the matrices of attention and MLP are quantized, those whose sides are multiples of
    16; the others stay in the run dtype. Raises ConfigError for "fp8" and a mixture of experts.
    """
    if quantization == "fp8" and config.moe is not None:
        raise ConfigError(
            "quantization fp8 is not supported for a mixture of experts (n_routed_experts): its "
            "experts are multiplied in the run dtype only; leave --quantization out"
        )
    expected = expected_weights(config)
    shapes: dict[str, tuple[int, ...]] = {}
    slots: dict[str, Slot] = {}
    for name, shape in expected.items():
        place = _fused_place(name, expected)
        if place is None:
            shapes[name], slots[name] = shape, Slot(name, 0)
            continue
        num_rows, first_row = place.num_rows, place.first_row
        shapes[place.name] = (num_rows, *shape[1:])
        if place.expert is not None:
            assert config.moe is not None, "only a mixture has experts"
            shapes[place.name] = (config.moe.num_experts, *shapes[place.name])
            first_row += place.expert * num_rows
        slots[name] = Slot(place.name, first_row)
    quantized = frozenset[str]()
    if quantization == "fp8":
        quantized = frozenset(
            name
            for name, shape in shapes.items()
            if name.endswith(_QUANTIZED) and not any(size % _FP8_MULTIPLE for size in shape)
        )
    return WeightLayout(shapes, slots, quantized)


def layout_bytes(layout: WeightLayout, element_size: int) -> int:
    """Return the bytes of a layout's tensors, with `element_size` bytes an unquantized number."""
    return sum(
        math.prod(shape) + SCALE_BYTES * shape[0]
        if name in layout.quantized
        else math.prod(shape) * element_size
        for name, shape in layout.shapes.items()
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """Of a weight in a fused matrix of num_rows rows; of one expert where there are several."""

    name: str
    num_rows: int
    first_row: int
    expert: int | None


def _fused_place(name: str, expected: Mapping[str, tuple[int, ...]]) -> _Place | None:
    """Return where a weight is fused, None where it stays on its own."""
    prefix, part, kind = _split(name)
    match = _EXPERT.match(part)
    expert = None if match is None else int(match[1])
    generic = _EXPERT.sub("mlp.experts.", part)
    fused = next((fused for fused, parts in _FUSED.items() if generic in parts), None)
    if fused is None:
        return None
    num_rows = first_row = 0
    # Rows are those of the matrix for a bias too: where some of the parts have none, there are
    # zeros.
    for other in _FUSED[fused]:
        if expert is not None:
            other = other.replace("mlp.experts.", f"mlp.experts.{expert}.")
        if other == part:
            first_row = num_rows
        num_rows += expected.get(f"{prefix}{other}.weight", (0,))[0]
    return _Place(f"{prefix}{fused}.{kind}", num_rows, first_row, expert)


def _split(name: str) -> tuple[str, str, str]:
    """Return ("model.layers.0.", "mlp.up_proj", "weight"); prefix and part are empty elsewhere."""
    pieces = name.split(".")
    if pieces[:2] != ["model", "layers"]:
        return "", "", ""
    return ".".join(pieces[:3]) + ".", ".".join(pieces[3:-1]), pieces[-1]
