"""Reads the subset of the Dockerfile language that our Dockerfiles use."""

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

_VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its keyword in capitals, and the rest with continuation lines joined."""

    keyword: str
    rest: str
    line: int


@dataclass(slots=True)
class Stage:
    """The instructions from one FROM to the next; `base` still has its variables."""

    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)


def parse(path: Path) -> tuple[dict[str, str], list[Stage]]:
    """Return the ARGs before the first FROM, and the stages. Raises ValueError."""
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for instruction in instructions(path.read_text()):
        if instruction.keyword == "FROM":
            words = instruction.rest.split()
            name = words[2] if len(words) == 3 and words[1].upper() == "AS" else str(len(stages))
            stages.append(Stage(name, words[0]))
        elif stages:
            stages[-1].instructions.append(instruction)
        elif instruction.keyword == "ARG":
            arguments.update(assignments(instruction.rest))
        else:
            raise ValueError(f"line {instruction.line}: {instruction.keyword} before FROM")
    return arguments, stages


def instructions(text: str) -> list[Instruction]:
    """Split a Dockerfile into instructions, comments dropped."""
    found: list[Instruction] = []
    parts: list[str] = []
    first = 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not line.strip():
            continue
        first = first if parts else number
        parts.append(line.rstrip().removesuffix("\\"))
        if line.rstrip().endswith("\\"):
            continue
        keyword, _, rest = " ".join(part.strip() for part in parts).strip().partition(" ")
        found.append(Instruction(keyword.upper(), rest.strip(), first))
        parts = []
    if parts:
        raise ValueError(f"line {first}: the last instruction is not complete")
    return found


def assignments(rest: str) -> dict[str, str]:
    """Read `NAME=value ...` of ARG, ENV and LABEL; an ARG without a value gets an empty one."""
    pairs = (word.partition("=") for word in shlex.split(rest))
    return {name: value for name, _, value in pairs}


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace $NAME and ${NAME}. Raises KeyError for a name that nobody set."""
    return _VARIABLE.sub(lambda match: values[match[1] or match[2]], text)


def exec_form(rest: str) -> list[str]:
    """Read ["program", "argument"]. Raises ValueError for the shell form."""
    words = json.loads(rest)
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"expected a list of strings, got {rest}")
    return words
