"""Configuration: frozen, validated once, never written again. All environment reads are here.

`EngineConfig` is what a user sets: each field is a command-line flag, a YAML key, an environment
variable (`NSA_SERVE_` + the name in capitals) and an argument of `LLM`. `ModelConfig` and
`NSAConfig` are what a checkpoint says about itself.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from nsa_kernels.spec import NSASpec
from nsa_serve.errors import ConfigError, ModelError

DEFAULT_MODEL = "smollm2-135m-nsa"
ENV_PREFIX = "NSA_SERVE_"

Compression = Literal["mean", "mlp"]
Gate = Literal["linear", "constant", "mlp"]
RopeType = Literal["default", "linear", "llama3", "yarn", "longrope"]
Branch = Literal["cmp", "slc", "swa"]
NSADialect = Literal["nsa", "ssa", "moba", "full"]
DeviceType = Literal["cpu", "cuda"]

BRANCHES: tuple[Branch, ...] = ("cmp", "slc", "swa")
"""In the order of gates."""

# Share of a GPU's memory that the engine may take, when --gpu-memory-utilization does not say.
DEFAULT_GPU_MEMORY_UTILIZATION = 0.9

_SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(value: object) -> int:
    """Read a memory size: an int of bytes, or text such as "512M", "2GiB", "1.5 gb" (powers of 2).

    Raises ValueError when it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", str(value).strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"expected a size such as 512M or 2GiB, got {value!r}")
    return int(float(match[1]) * _SIZE_UNITS[match[2].upper()])


ConfigT = TypeVar("ConfigT", bound=BaseModel)
MemorySize = Annotated[int, BeforeValidator(parse_bytes)]


def _field(default: Any, group: str, description: str, **kwargs: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"group": group}, **kwargs)


@dataclass(frozen=True, slots=True)
class StepLimits:
    """What bounds a step, with the defaults of the device filled in.

    max_num_batched_tokens: of a step; a prompt that is not cut must fit into it.
    is_async: a step is launched before the tokens of the one before it are known.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    is_async: bool


class EngineConfig(BaseModel):
    """Everything that decides how the engine runs. Unknown names are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = _field(
        DEFAULT_MODEL, "Model", "built-in model name, local folder, .gguf file or hub id"
    )
    revision: str | None = _field(None, "Model", "branch, tag or commit of a hub id")
    nsa_config: str | None = _field(
        None,
        "Model",
        "JSON file with an `nsa` section for a Llama checkpoint that has none, "
        "or to replace the one it has",
    )
    nsa_dialect: NSADialect | None = _field(
        None,
        "Model",
        "what a llama-nsa checkpoint computes, where its config.json leaves it open",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _field(
        "auto", "Model", "run dtype; auto is bfloat16 where the processor has it, else float32"
    )
    device: Literal["auto", "cpu", "cuda"] = _field(
        "auto", "Model", "where the model runs; auto is a GPU where torch sees one"
    )
    load_format: Literal["auto", "dummy"] = _field(
        "auto", "Model", "dummy: random weights of the config's shapes, to measure speed with"
    )
    quantization: Literal["fp8"] | None = _field(
        None, "Model", "fp8: weights in 8 bits, on GPUs that compute in it"
    )
    max_model_len: int | None = _field(
        None,
        "Cache and scheduling",
        "longest prompt plus output, in tokens; auto, as when left out: what the model was made "
        "for, or what fits in the cache if that is less",
        ge=1,
    )
    page_memory: MemorySize | None = _field(
        None,
        "Cache and scheduling",
        "memory for the KV cache, such as 2GiB; default: on a GPU, what gpu_memory_utilization "
        "leaves; else a quarter of the free memory, at most what max_num_seqs requests of "
        "max_model_len tokens can use",
        gt=0,
    )
    gpu_memory_utilization: float | None = _field(
        None,
        "Cache and scheduling",
        "share of the GPU's memory that may be in use, whoever uses it; the KV cache gets what "
        f"the model leaves; page_memory goes before; default: {DEFAULT_GPU_MEMORY_UTILIZATION}",
        gt=0,
        le=1,
    )
    kv_cache_dtype: Literal["auto", "fp8"] = _field(
        "auto", "Cache and scheduling", "auto: the run dtype; fp8: 8 bits (e4m3), on a GPU"
    )
    max_num_seqs: int | None = _field(
        None,
        "Cache and scheduling",
        "most requests that run at once; default: 32, on a GPU 64",
        ge=1,
        le=4096,
    )
    max_num_batched_tokens: int | None = _field(
        None,
        "Cache and scheduling",
        "most tokens in one step: decode rows and prefill chunks; default: 1024, on a GPU 8192",
        ge=1,
    )
    enable_chunked_prefill: bool = _field(
        True,
        "Cache and scheduling",
        "run a long prompt in several steps; without, every prompt is one step, and a step may "
        "have max_model_len tokens",
    )
    async_scheduling: bool | None = _field(
        None,
        "Cache and scheduling",
        "launch a step before the tokens of the last one are known; default: on a GPU only",
    )
    enforce_eager: bool = _field(
        False, "Cache and scheduling", "launch every kernel by itself: no CUDA graphs"
    )
    max_num_queued_requests: int = _field(
        1024, "Cache and scheduling", "requests that may wait; more are answered 503", ge=1
    )
    scheduling_policy: Literal["fcfs", "priority"] = _field(
        "fcfs", "Cache and scheduling", "first come first served, or lowest `priority` value first"
    )
    enable_prefix_caching: bool = _field(
        True, "Cache and scheduling", "share the pages of equal prompt prefixes"
    )
    num_threads: int | None = _field(
        None, "Model", "CPU threads of the engine; default: the cores this process may use", ge=1
    )

    @field_validator("max_model_len", mode="before")
    @classmethod
    def _read_auto(cls, value: object) -> object:
        return None if value == "auto" else value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.device == "cpu":
            self._check_cpu()
        return self

    def check_device(self, device: DeviceType) -> None:
        """Raise ConfigError when a setting cannot work on the device that auto came to be."""
        if device == "cpu":
            try:
                self._check_cpu()
            except ValueError as error:
                raise ConfigError(f"{error}; torch sees no CUDA device here") from None

    def _check_cpu(self) -> None:
        for name, is_set in (
            ("quantization", self.quantization is not None),
            ("kv_cache_dtype", self.kv_cache_dtype != "auto"),
            ("gpu_memory_utilization", self.gpu_memory_utilization is not None),
        ):
            if is_set:
                flag = name.replace("_", "-")
                raise ValueError(
                    f"{name} is {getattr(self, name)} but the device is a cpu, where it has no "
                    f"meaning: leave --{flag} out or serve on a GPU (--device cuda)"
                )

    def limits(self, device: DeviceType, max_model_len: int) -> StepLimits:
        """Return the bounds of a step on a device, for requests of up to `max_model_len` tokens.

        Raises ConfigError when prompts must not be cut and do not fit a step.
        """
        is_cuda = device == "cuda"
        max_num_batched_tokens = self.max_num_batched_tokens
        if max_num_batched_tokens is None:
            max_num_batched_tokens = 8192 if is_cuda else 1024
            if not self.enable_chunked_prefill:
                max_num_batched_tokens = max(max_num_batched_tokens, max_model_len)
        if not self.enable_chunked_prefill and max_num_batched_tokens < max_model_len:
            raise ConfigError(
                f"without chunked prefill a prompt runs in one step, but max_num_batched_tokens is "
                f"{max_num_batched_tokens} and max_model_len is {max_model_len}: leave "
                f"--max-num-batched-tokens out or raise it to {max_model_len}, lower "
                f"--max-model-len to {max_num_batched_tokens}, or leave chunked prefill on"
            )
        return StepLimits(
            max_num_seqs=self.max_num_seqs or (64 if is_cuda else 32),
            max_num_batched_tokens=max_num_batched_tokens,
            is_async=is_cuda if self.async_scheduling is None else self.async_scheduling,
        )


def make_config(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a config, turning pydantic's report into one ConfigError line per wrong field."""
    try:
        return cls.model_validate(dict(values))
    except ValidationError as error:
        lines = []
        for item in error.errors(include_url=False):
            message = item["msg"].removeprefix("Value error, ")
            if not item["loc"]:
                # About several fields: the input would be all of them, keys included.
                lines.append(message)
                continue
            name = ".".join(str(part) for part in item["loc"])
            field = cls.model_fields.get(str(item["loc"][0]))
            is_secret = field is not None and "Secret" in repr(field.annotation)
            echo = "a secret" if is_secret else repr(item["input"])
            lines.append(f"{name}: {message}, got {echo}")
        raise ConfigError("; ".join(lines)) from None


def read_environment(cls: type[BaseModel]) -> dict[str, str]:
    """Return the fields of `cls` that are set as `NSA_SERVE_<FIELD>` in the environment."""
    names = {name: ENV_PREFIX + name.upper() for name in cls.model_fields}
    return {name: os.environ[env] for name, env in names.items() if env in os.environ}


def child_environment() -> dict[str, str]:
    """Environment of the engine process: this process's own, less our settings and secrets.

    What was set there already reached the config, which the engine gets as a message.
    """
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}


def num_usable_cpus() -> int:
    """Cores this process may run on (containers and taskset respected)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, slots=True, kw_only=True)
class NSAConfig(NSASpec):
    """One checkpoint's NSA dialect: the operator's spec and what its layers hold.

    compression: "mean", or "mlp" (learnable, with intra-block position encoding).
    cmp_hidden_size: width of the compression MLP's hidden layer; ignored by "mean".
    gate: "linear" (one sigmoid gate per query head and branch, from the layer's input), "mlp" (the
        same through a hidden layer of gate_hidden_size with silu; both layers have a bias) or
        "constant" (`gate_constant`, no weights).
    gate_bias: the projection of gate "linear" has a bias.
    gate_constant: weights of (cmp, slc, swa) when gate is "constant".
    branches: those whose outputs are added up. The others' gates are learned all the same.
    window_gate: whose gate weighs the swa branch: its own, or that of slc, where a window as long
        as the longest context stands for attention to everything.
    """

    compression: Compression = "mean"
    cmp_hidden_size: int = 256
    gate: Gate = "linear"
    gate_hidden_size: int = 256
    gate_bias: bool = False
    gate_constant: tuple[float, float, float] = (1.0, 1.0, 1.0)
    branches: tuple[Branch, ...] = BRANCHES
    window_gate: Literal["swa", "slc"] = "swa"

    def __post_init__(self) -> None:
        # Not super(): a slots dataclass is a new class, and the zero-argument form would miss it.
        NSASpec.__post_init__(self)
        if self.compression not in ("mean", "mlp"):
            raise ValueError(f"compression must be 'mean' or 'mlp', got {self.compression!r}")
        if self.gate not in ("linear", "constant", "mlp"):
            raise ValueError(f"gate must be 'linear', 'mlp' or 'constant', got {self.gate!r}")
        if self.gate_hidden_size < 1:
            raise ValueError(f"gate_hidden_size must be at least 1, got {self.gate_hidden_size}")
        if self.cmp_hidden_size < 1:
            raise ValueError(f"cmp_hidden_size must be at least 1, got {self.cmp_hidden_size}")
        if len(self.gate_constant) != 3:
            raise ValueError(
                f"gate_constant must hold three numbers (cmp, slc, swa), got {self.gate_constant}"
            )
        self._check_branches()

    def _check_branches(self) -> None:
        in_order = tuple(branch for branch in BRANCHES if branch in self.branches)
        if not self.branches or self.branches != in_order:
            raise ValueError(
                f"branches must name at least one of {', '.join(BRANCHES)}, in this order, got "
                f"{self.branches}"
            )
        if self.branches == ("swa",) and not self.window_size:
            raise ValueError("window_size must be at least 1 where swa is the only branch, got 0")
        if self.window_gate not in ("swa", "slc"):
            raise ValueError(f"window_gate must be 'swa' or 'slc', got {self.window_gate!r}")
        if self.window_gate == "slc" and (self.gate != "linear" or self.branches != ("swa",)):
            raise ValueError(
                "window_gate 'slc' needs gate 'linear' and branches ('swa',), got gate "
                f"{self.gate!r} and branches {self.branches}"
            )

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> "NSAConfig":
        """Read the `nsa` section of a config.json. Raises ModelError naming a wrong field."""
        known = set(cls.__dataclass_fields__)
        unknown = sorted(set(section) - known)
        if unknown:
            raise ModelError(
                f"the nsa section has unknown fields: {', '.join(unknown)}; "
                f"known are: {', '.join(sorted(known))}"
            )
        values = {name: _read_nsa_field(name, value) for name, value in section.items()}
        try:
            return cls(**values)
        except ValueError as error:
            raise ModelError(f"the nsa section is invalid: {error}") from None


def _read_nsa_field(name: str, value: object) -> Any:
    """Return a JSON value as NSAConfig wants it; by exact type, for a bool is an int otherwise."""
    if name == "gate_constant":
        items = value if isinstance(value, list | tuple) else []
        numbers = [float(x) for x in items if type(x) in (int, float) and math.isfinite(x)]
        if len(items) != 3 or len(numbers) != 3:
            raise ModelError(
                f"nsa.{name} must be a list of three finite numbers (cmp, slc, swa), got {value!r}"
            )
        return tuple(numbers)
    if name == "branches":
        if not isinstance(value, list) or not all(type(item) is str for item in value):
            raise ModelError(f"nsa.{name} must be a list of cmp, slc and swa, got {value!r}")
        return tuple(value)
    expected = type(NSAConfig.__dataclass_fields__[name].default)
    if type(value) is not expected:
        raise ModelError(f"nsa.{name} must be of type {expected.__name__}, got {value!r}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Rotary scaling, with the fields of transformers (`models/rope_scaling.py` has the formulas).

    "linear" divides positions by factor; "llama3" and "yarn" rescale low frequencies; "longrope"
    divides each frequency by a factor of its own. attention_factor: of cosines and sines; None =
    what the type computes.
    """

    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class MoEConfig:
    """A DeepSeekMoE feed-forward: softmax over all experts, top-k, weights not renormalised.

    num_shared_experts: that every token takes: one gated MLP of so many times
    expert_intermediate_size. num_dense_layers: first layers with a dense MLP instead.
    """

    num_experts: int
    num_experts_per_token: int
    num_shared_experts: int
    expert_intermediate_size: int
    num_dense_layers: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder with NSA attention, whatever family its checkpoint is of.

    kv_per_branch: compression, selection and window have keys and values of their own. moe: None
    for dense layers. embedding_scale, residual_scale, logit_scale (muP): of embeddings, of what
    every branch adds to the residual stream, and of the hidden state before the head.
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    intermediate_size: int
    nsa: NSAConfig
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    kv_per_branch: bool = False
    moe: MoEConfig | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    checkpoint_dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_q_heads % self.num_kv_heads:
            raise ModelError(
                f"num_kv_heads must divide the number of query heads, got {self.num_q_heads} "
                f"query heads and {self.num_kv_heads} KV heads"
            )
        if self.head_dim % 2:
            raise ModelError(f"head_dim must be even for rotary embedding, got {self.head_dim}")
        if self.rope_scaling.rope_type == "longrope":
            for name in ("short_factor", "long_factor"):
                num_factors = len(getattr(self.rope_scaling, name))
                if num_factors != self.head_dim // 2:
                    raise ModelError(
                        f"rope_scaling.{name} must have {self.head_dim // 2} numbers, one for each "
                        f"pair of head_dim {self.head_dim}, got {num_factors}"
                    )

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def softmax_scale(self) -> float:
        """1 / sqrt(head_dim)."""
        return float(self.head_dim**-0.5)
