"""What every test shares: one torch thread, Triton's interpreter, and tiny random checkpoints."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is decorated, so before any test imports one: kernels run on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

from tests.util import write_checkpoint

# Name -> arguments of write_checkpoint. "llama-mlp" is the native format with all that is unlike
# the others: learnable compression, gate biases, groups of three, values narrower than keys.
_CHECKPOINTS: Mapping[str, Mapping[str, Any]] = {
    "nsa": {"family": "nsa"},
    "llama-nsa": {"family": "llama-nsa"},
    "llama": {"family": "llama"},
    "llama-mlp": {
        "family": "llama",
        "nsa": {"compression": "mlp", "cmp_hidden_size": 20, "gate_bias": True, "window_size": 17},
        "config": {"v_head_dim": 12},
        "num_q_heads": 6,
        "num_kv_heads": 2,
        "head_dim": 20,
    },
}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let whoever has no GPU try out the tests of the GPU engine."""
    parser.addoption(
        "--engine-device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: run the tests of the GPU engine that can be on the CPU engine, steps overlapped",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    is_trial = config.getoption("--engine-device") == "cpu"
    for item in items:
        if is_trial and "engine_device" in getattr(item, "fixturenames", ()):
            continue
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def engine_device(request: pytest.FixtureRequest) -> str:
    """Where the tests of the GPU engine run: on "cuda", unless they are only tried out."""
    device: str = request.config.getoption("--engine-device")
    return device


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Run small matrices on one thread: where cores are busy a second one multiplies the time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Folders of random checkpoints: one of each family, and "llama-mlp"."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        name: write_checkpoint(root / name, seed=seed, **arguments)
        for seed, (name, arguments) in enumerate(_CHECKPOINTS.items(), start=1)
    }
