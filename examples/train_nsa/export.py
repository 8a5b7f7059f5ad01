"""The student's adapter as the engine loads it, and the checkpoint that training resumes from.

    python examples/train_nsa/export.py --run OUT [--to FOLDER]

writes the adapter of a run's last checkpoint, which train.py also does when it ends.

adapter.safetensors, bf16: `model.layers.{i}.self_attn.{q,k,v,o}_proj.lora_a` [rank, in] and
`.lora_b` [out, rank], with W' = W + lora_b @ lora_a, and `.g_proj.weight`, `.g_proj.bias`.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from student import DIALECT, PROJECTIONS, Base, Student, open_base, student_config
from torch import Tensor

ADAPTER = "adapter.safetensors"
CHECKPOINT = "checkpoint.safetensors"
SETTINGS = "settings.json"
MAX_BYTES = 12 << 20
"""Most that an adapter may take: it is packaged with the server."""


def write_adapter(
    student: Student, folder: Path, model: Mapping[str, Any], generation: Mapping[str, Any]
) -> int:
    """Write config.json and the weights; return the bytes of the latter.

    model: what `student_config` returned. generation: sampling defaults, "generation_config".
    Raises SystemExit when they are more than MAX_BYTES.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ADAPTER
    save_file(adapter_weights(student), path)
    # It is written for its owner only, and a package is read by everyone.
    path.chmod(0o644)
    num_bytes = path.stat().st_size
    if num_bytes > MAX_BYTES:
        raise SystemExit(
            f"{path} has {num_bytes} bytes, at most {MAX_BYTES} may be packaged: lower --rank"
        )
    base = student.base
    config = {
        "base": base.section or {"path": os.path.relpath(base.path.resolve(), folder.resolve())},
        "adapter": {"file": ADAPTER, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()},
        "model": dict(model),
        "nsa": DIALECT,
        "generation_config": dict(generation),
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return num_bytes


def adapter_parameters(student: Student) -> dict[str, Tensor]:
    """Return what is trained under its names in the adapter."""
    weights: dict[str, Tensor] = {}
    for index, updates in enumerate(student.updates):
        prefix = f"model.layers.{index}.self_attn."
        for name in PROJECTIONS:
            weights[f"{prefix}{name}_proj.lora_a"] = updates.a[name]
            weights[f"{prefix}{name}_proj.lora_b"] = updates.b[name]
        weights[prefix + "g_proj.weight"] = updates.gate_weight
        weights[prefix + "g_proj.bias"] = updates.gate_bias
    return weights


def adapter_weights(student: Student) -> dict[str, Tensor]:
    """Return the trained numbers under their names in the adapter, bf16 on the CPU."""
    return {
        name: value.detach().to("cpu", torch.bfloat16).contiguous()
        for name, value in adapter_parameters(student).items()
    }


def read_adapter(folder: Path, student: Student, model: Mapping[str, Any]) -> None:
    """Start the student from the numbers that `write_adapter` wrote.

    model: what `student_config` returned. Raises SystemExit when there are none, or when they are
    of a student of another shape or rotary embedding.
    """
    path = folder / ADAPTER
    if not path.is_file():
        raise SystemExit(f"{path} is missing: expected the adapter folder of a run of train.py")
    theirs = json.loads((folder / "config.json").read_text())["model"]
    for field in ("rope_theta", "rope_scaling"):
        if theirs.get(field) != model.get(field):
            raise SystemExit(
                f"{folder} was trained with {field} {theirs.get(field)}, and --rope says "
                f"{model.get(field)}: give its --rope"
            )
    with safe_open(path, framework="pt") as file, torch.no_grad():
        for name, parameter in adapter_parameters(student).items():
            if name not in file.keys():  # noqa: SIM118
                raise SystemExit(f"{path}: expected {name}, found nothing")
            value = file.get_tensor(name)
            if value.shape != parameter.shape:
                raise SystemExit(
                    f"{path}: expected {name} {list(parameter.shape)}, found {list(value.shape)}; "
                    "give the --rank that it was trained with"
                )
            parameter.copy_(value)


def save_checkpoint(
    folder: Path, student: Student, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]
) -> None:
    """Write parameters, optimizer state and `state`, in place of an earlier checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        tensors[f"value.{name}"] = parameter.detach().cpu()
        for key in ("exp_avg", "exp_avg_sq", "step"):
            value = optimizer.state.get(parameter, {}).get(key)
            if value is not None:
                tensors[f"{key}.{name}"] = value.detach().cpu()
    part = folder / f"{CHECKPOINT}.part"
    save_file(tensors, part, metadata={"state": json.dumps(state)})
    part.replace(folder / CHECKPOINT)


def load_checkpoint(
    path: Path, student: Student, optimizer: torch.optim.Optimizer | None = None
) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote into the student, and the optimizer; return its state.

    Raises SystemExit when there is none, or when it is of a student of another shape.
    """
    if not path.is_file():
        raise SystemExit(f"{path} is missing: expected a checkpoint of train.py")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state: dict[str, Any] = json.loads(file.metadata()["state"])
    for name, parameter in student.named_parameters():
        value = tensors.get(f"value.{name}")
        if value is None or value.shape != parameter.shape:
            found = "nothing" if value is None else list(value.shape)
            raise SystemExit(f"{path}: expected {name} {list(parameter.shape)}, found {found}")
        with torch.no_grad():
            parameter.copy_(value)
        if optimizer is not None and f"exp_avg.{name}" in tensors:
            optimizer.state[parameter] = {
                "step": tensors[f"step.{name}"],
                "exp_avg": tensors[f"exp_avg.{name}"].to(parameter.device),
                "exp_avg_sq": tensors[f"exp_avg_sq.{name}"].to(parameter.device),
            }
    return state


def make_student(
    settings: Mapping[str, Any], base: Base, **more: Any
) -> tuple[Student, dict[str, Any]]:
    """Return the student of a run's settings, and the "model" section of its adapter."""
    config, model = student_config(base.config, settings["rope"], settings["max_length"])
    gates = tuple(settings["gates"])
    return Student(base, config, rank=settings["rank"], gates=gates, **more), model


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the adapter of a run's last checkpoint."""
    parser = argparse.ArgumentParser(description="Write the adapter of a run of train.py.")
    parser.add_argument("--run", type=Path, required=True, help="train.py's --out")
    parser.add_argument("--to", type=Path, help="folder of the adapter (default: RUN/adapter)")
    args = parser.parse_args(arguments)
    path = args.run / SETTINGS
    if not path.is_file():
        raise SystemExit(f"{path} is missing: expected the --out of a run of train.py")
    settings = json.loads(path.read_text())
    base = open_base(settings["base"], torch.device("cpu"), torch.float32)
    student, model = make_student(settings, base)
    state = load_checkpoint(args.run / CHECKPOINT, student)
    folder = args.to or args.run / "adapter"
    num_bytes = write_adapter(student, folder, model, settings["generation_config"])
    print(f"{folder}: {num_bytes / 2**20:.2f} MiB, after step {state['step']}")


if __name__ == "__main__":
    main()
