"""`nsa-serve convert`: a checkpoint in another layout, as one in ours."""

import argparse
import sys
from pathlib import Path
from typing import get_args

from nsa_serve.config import EngineConfig, NSADialect, make_config, parse_bytes
from nsa_serve.errors import ConfigError

CONVERT_FLAGS = ("layout", "nsa_config", "nsa_dialect", "revision", "gates", "shard_size")
"""Names of its flags, for a hint at a misspelt one."""


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `convert` takes."""
    parser.add_argument("source", metavar="SOURCE", help="folder, .gguf file or hub id")
    parser.add_argument("target", metavar="TARGET", type=Path, help="folder, new or empty")
    parser.add_argument(
        "--layout",
        choices=("native", "nsa_moe"),
        default="native",
        help="of TARGET: a Llama with an nsa section, or the paper's, with keys and values of its "
        "own for every branch (default: %(default)s)",
    )
    parser.add_argument(
        "--nsa-config",
        metavar="FILE",
        help="JSON file with the `nsa` section for a dense Llama, or to replace the one it has",
    )
    parser.add_argument(
        "--nsa-dialect",
        choices=get_args(NSADialect),
        help="what a llama-nsa checkpoint computes, where its config.json leaves it open",
    )
    parser.add_argument("--revision", metavar="TEXT", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--gates",
        nargs=3,
        type=float,
        metavar=("CMP", "SLC", "SWA"),
        help="for a checkpoint without gate weights: the gates that every token starts with, "
        "between 0 and 1",
    )
    parser.add_argument(
        "--shard-size",
        default="4GiB",
        metavar="SIZE",
        help="of a safetensors file, about (default: %(default)s)",
    )


def convert_command(parsed: argparse.Namespace) -> int:
    """Convert, and say what was written."""
    # Here and not at the top: torch takes a second, and `--help` needs none of it.
    from nsa_serve.convert import convert
    from nsa_serve.model_source import resolve_model

    try:
        shard_bytes = parse_bytes(parsed.shard_size)
    except ValueError as error:
        raise ConfigError(f"--shard-size: {error}") from None
    if shard_bytes < 1:
        raise ConfigError(f"--shard-size must be above 0, got {parsed.shard_size}")
    settings = {
        "model": parsed.source,
        "nsa_config": parsed.nsa_config,
        "nsa_dialect": parsed.nsa_dialect,
        "revision": parsed.revision,
    }
    source = resolve_model(make_config(EngineConfig, settings))
    gates = None if parsed.gates is None else tuple(parsed.gates)
    result = convert(
        source, parsed.target, layout=parsed.layout, gates=gates, shard_bytes=shard_bytes
    )
    sys.stdout.write(
        f"{parsed.target}: {result.num_bytes / 1e9:.2f} GB in {result.num_shards} "
        f"file{'' if result.num_shards == 1 else 's'}"
        + (f", {len(result.new_weights)} new gate weights" if result.new_weights else "")
        + f"\nserve it with: nsa-serve serve {parsed.target}\n"
    )
    return 0
