"""The command line of train.py."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nsa_serve.config import DEFAULT_MODEL
from nsa_serve.model_source import BUILT_IN_MODELS, read_asset

AMPLE_GIB = 64
"""Memory of a GPU in which what 32k tokens leave for the backward pass fits (README.md)."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; --tiny changes what is not named there."""
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description="Train an NSA student of a dense Llama.")
    add = parser.add_argument
    add("--data", type=Path, required=True, help="what data.py wrote")
    add("--out", type=Path, required=True, help="folder of the run")
    add("--base", default=DEFAULT_MODEL, help="a built-in model's base, a .gguf file or a folder")
    add("--init", type=Path, help="adapter folder of an earlier run to start from")
    add("--phases", nargs="+", help="names of those to run (schedule.py; default: all)")
    add("--rope", default="theta:250000", help="yarn:FACTOR, theta:NUMBER or none")
    add("--max-length", type=int, default=16384, help="the student's context, unless yarn says it")
    add("--minutes", type=float, help="wall time of training; the recipe scales (default: 10)")
    add("--steps", type=int, help="a number of steps instead of a time")
    add("--seed", type=int, default=0)
    add("--rank", type=int, default=32, help="of the low-rank updates")
    add("--gates", type=float, nargs=3, default=[0.1, 0.65, 0.35], help="cmp, slc, swa at first")
    add("--lr", type=float, default=5e-4, help="of the low-rank updates")
    add("--gate-lr-scale", type=float, default=2.0, help="learning rate of the gates, of --lr")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--ce-weight", type=float, default=1.0, help="of the next-token loss of answers")
    add("--ce-beyond", type=float, default=0.5, help="of it past the teacher's context")
    add("--ce-mix", type=float, default=0.1, help="of it beside the teacher, on books and texts")
    add("--share-floor", type=float, default=0.1, help="below it a branch is pushed up")
    add("--share-weight", type=float, default=0.2, help="of that push")
    add(
        "--selection-weight",
        type=float,
        default=1.0,
        help="of the error of the block scores against full attention; 0: not computed",
    )
    add(
        "--selection-kinds",
        nargs="*",
        choices=("books", "text", "chat", "retrieval"),
        default=["retrieval"],
        help="of rows on which that error is taken (default: retrieval alone)",
    )
    add("--tokens-per-batch", type=int, default=32768, help="of each GPU")
    add("--loss-tokens", type=int, help="of a batch, chosen by chance (default: all that count)")
    add("--longest", type=int, help="longer rows of the schedule are made as short as this")
    add("--checkpoint-every", type=float, default=60.0, help="seconds")
    add("--print-every", type=int, default=20, help="steps")
    add("--resume", action="store_true", help="go on from OUT's checkpoint")
    add(
        "--rehearse",
        action=argparse.BooleanOptionalAction,
        default=has_gpu,
        help="take a step of each length first, and print what it needs (default: on a GPU)",
    )
    add("--tiny", action="store_true", help="sizes for a CPU")
    add("--device", choices=("cuda", "cpu"), default="cuda" if has_gpu else "cpu")
    add("--dtype", choices=("bfloat16", "float32"), help="of the base; default: bfloat16 on a GPU")
    add(
        "--attention",
        choices=("triton", "sdpa", "plain"),
        help="default: triton on a GPU, sdpa on a CPU",
    )
    add(
        "--recompute",
        action=argparse.BooleanOptionalAction,
        help=f"layers in the backward pass: slower, a fraction of the memory (default: on a GPU of "
        f"less than {AMPLE_GIB} GiB, and on a CPU)",
    )
    first, _ = parser.parse_known_args(arguments)
    if first.tiny:
        parser.set_defaults(rank=4, lr=2e-2, tokens_per_batch=960, print_every=5)
    args = parser.parse_args(arguments)
    if args.init is not None and args.resume:
        parser.error(
            "--resume goes on from OUT's checkpoint, --init from an adapter: leave one out"
        )
    if args.steps is not None and args.minutes is not None:
        parser.error("--steps and --minutes both say when to end: leave one out")
    if args.steps is None and args.minutes is None:
        if args.tiny:
            args.steps = 30
        else:
            args.minutes = 10.0
    if args.attention == "sdpa" and args.device == "cuda":
        parser.error(
            "--attention sdpa is for CPUs: PyTorch 2.11 computes some last queries as 0 on a GPU "
            "with such masks; use triton or plain"
        )
    args.attention = args.attention or ("triton" if args.device == "cuda" else "sdpa")
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    if args.recompute is None:
        memory = torch.cuda.get_device_properties(0).total_memory if args.device == "cuda" else 0
        args.recompute = memory < AMPLE_GIB << 30
    return args


def make_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments as JSON has them, and the sampling defaults of the adapter."""
    settings = {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
    }
    asset = read_asset(args.base) if args.base in BUILT_IN_MODELS else {}
    settings["generation_config"] = asset.get("generation_config", {})
    return settings
