"""The model on Triton kernels against the model on PyTorch's operators.

On the GPU if there is one, else in Triton's interpreter on the CPU.
"""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsa_kernels.metadata import build_metadata
from nsa_serve.config import ModelConfig
from nsa_serve.kv_cache import KVCache
from nsa_serve.model_source import ModelSource
from nsa_serve.models.families import load_model_config
from nsa_serve.models.fp8 import E4M3
from nsa_serve.models.nsa_transformer import NSATransformer
from nsa_serve.models.weights import load_device_weights, load_weights
from tests.kernels.conftest import _repaired_interpreter  # noqa: F401 (a fixture for all tests)
from tests.kernels.gpu_util import DEVICE
from tests.util import VOCAB_SIZE, write_checkpoint

# Kernels may compute on memory that nobody wrote, and drop the result; numpy sees it in passing.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)

MAX_POSITIONS = 256
# Sums of a few hundred products in another order, through two layers.
FP32_TOLERANCE = 1e-4


class Stepper:
    """A model with a cache of its own, stepped by hand; every row owns pages of its own."""

    def __init__(self, config: ModelConfig, model: NSATransformer, num_rows: int) -> None:
        self.config = config
        self.model = model
        size = config.nsa.block_size
        per_row = -(-MAX_POSITIONS // size)
        num_pages = num_rows * per_row + 1
        self.pages = [
            list(range(1 + row * per_row, 1 + (row + 1) * per_row)) for row in range(num_rows)
        ]
        self.cache = KVCache(
            config,
            num_pages,
            dtype=model.dtype,
            device=model.device,
            num_swa_pages=num_pages if config.kv_per_branch else 0,
        )

    @torch.inference_mode()
    def step(
        self, token_ids: list[list[int]], starts: list[int], *, num_decode_rows: int = 0
    ) -> Tensor:
        """Run the rows' tokens; return the logits of all of them, [T, vocab_size] on the CPU."""
        lens = [len(row) for row in token_ids]
        pages = self.pages[: len(lens)]
        meta = build_metadata(
            pages,
            starts,
            lens,
            self.config.nsa,
            num_decode_rows=num_decode_rows,
            swa_pages=pages if self.config.kv_per_branch else None,
        )
        plan = self.model.plan(meta)
        positions = meta.positions.to(self.model.device)
        if self.model.backend == "triton":
            positions = positions.int()
        flat = torch.tensor([token for row in token_ids for token in row])
        hidden = self.model(flat.to(self.model.device), positions, plan, self.cache.layers)
        return self.model.logits(hidden).cpu()


def load_both(
    folder: Path, dtype: torch.dtype, num_rows: int, device: torch.device = DEVICE
) -> tuple[Stepper, Stepper]:
    """The torch model on the CPU, and the triton model on the device."""
    source = ModelSource(name="tiny", folder=folder)
    config = load_model_config(source)
    plain = NSATransformer(config, load_weights(source, config, dtype), max_positions=MAX_POSITIONS)
    weights = load_device_weights(source, config, dtype, device=device)
    triton = NSATransformer(config, weights, max_positions=MAX_POSITIONS, backend="triton")
    assert plain.backend == "torch" and not weights
    return Stepper(config, plain, num_rows), Stepper(config, triton, num_rows)


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (count,), generator=generator).tolist()


def compare(plain: Stepper, triton: Stepper, tolerance: float) -> None:
    """A ragged prefill, a step of decode rows, and one of decode rows and a chunk."""
    prompts = [tokens(35, 1), tokens(9, 2), tokens(24, 3)]
    calls: list[tuple[list[list[int]], list[int], int]] = [
        (prompts, [0, 0, 0], 0),
        ([[5], [6], [7]], [35, 9, 24], 3),
        ([[8], [9], tokens(5, 4)], [36, 10, 25], 2),
    ]
    for token_ids, starts, num_decode_rows in calls:
        expected, actual = (
            model.step(token_ids, starts, num_decode_rows=num_decode_rows)
            for model in (plain, triton)
        )
        assert actual.dtype == torch.float32
        error = (actual - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"{error:.3g} after {starts}"


@pytest.mark.parametrize("name", ["nsa", "llama-nsa", "llama", "llama-mlp"])
def test_both_backends_give_the_same_logits(checkpoints: Mapping[str, Path], name: str) -> None:
    plain, triton = load_both(checkpoints[name], torch.float32, 3)
    compare(plain, triton, FP32_TOLERANCE)


def test_biases_and_a_tied_head(tmp_path: Path) -> None:
    biases = {"attention_bias": True, "mlp_bias": True}
    folder = write_checkpoint(
        tmp_path / "biased", config=biases, tie_word_embeddings=True, seed=4, num_layers=1
    )
    plain, triton = load_both(folder, torch.float32, 3)
    compare(plain, triton, FP32_TOLERANCE)


def test_logits_go_where_they_are_wanted(checkpoints: Mapping[str, Path]) -> None:
    _, triton = load_both(checkpoints["llama"], torch.float32, 1)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 64, generator=generator).to(DEVICE)
    out = torch.full((2, VOCAB_SIZE), torch.nan, device=DEVICE)
    with torch.inference_mode():
        result = triton.model.logits(hidden, out=out)
        assert result.data_ptr() == out.data_ptr()
        assert torch.equal(out, triton.model.logits(hidden))


def test_a_quantized_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix of a layer is quantized, and the logits are near those of the run dtype."""
    folder = write_checkpoint(
        tmp_path / "tiny", num_q_heads=16, num_kv_heads=2, num_layers=1, dtype=torch.bfloat16
    )
    source = ModelSource(name="tiny", folder=folder)
    config = load_model_config(source)
    if DEVICE.type == "cpu":
        monkeypatch.setattr("nsa_serve.models.weights.check_fp8", lambda *_: None)
    logits = []
    for quantization in (None, "fp8"):
        weights = load_device_weights(
            source, config, torch.bfloat16, device=DEVICE, quantization=quantization
        )
        assert sum(tensor.dtype == E4M3 for tensor in weights.values()) == (
            4 if quantization else 0
        )
        model = NSATransformer(config, weights, max_positions=64, backend="triton")
        assert model.dtype == torch.bfloat16
        logits.append(Stepper(config, model, 1).step([tokens(20, 1)], [0]))
    assert torch.cosine_similarity(*logits, dim=1).mean() > 0.9


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["nsa", "llama-nsa", "llama", "llama-mlp"])
def test_bf16_is_as_near_to_fp32_as_on_the_cpu(checkpoints: Mapping[str, Path], name: str) -> None:
    exact, _ = load_both(checkpoints[name], torch.float32, 1)
    plain, triton = load_both(checkpoints[name], torch.bfloat16, 1)
    prompt = tokens(200, 5)
    expected = exact.step([prompt], [0])
    on_cpu, on_gpu = (
        (model.step([prompt], [0]) - expected).norm() / expected.norm() for model in (plain, triton)
    )
    assert on_gpu <= 1.5 * on_cpu, f"{on_gpu:.3g} against {on_cpu:.3g}"


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 3])
def test_decode_is_captured_in_a_graph(checkpoints: Mapping[str, Path], num_rows: int) -> None:
    """Nothing in a decode step waits for the device, and a replay reads the inputs anew."""
    _, triton = load_both(checkpoints["llama"], torch.bfloat16, num_rows)
    model, prompt = triton.model, tokens(40, 6)
    triton.step([prompt] * num_rows, [0] * num_rows)
    triton.step([[3]] * num_rows, [40] * num_rows, num_decode_rows=num_rows)
    meta = build_metadata(
        triton.pages, [40] * num_rows, [1] * num_rows, triton.config.nsa, num_decode_rows=num_rows
    )
    plan = model.plan(meta)
    positions = meta.positions.to(DEVICE, torch.int32)
    input_ids = torch.zeros(num_rows, dtype=torch.int64, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode():
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            logits = model.logits(model(input_ids, positions, plan, triton.cache.layers))
    for token in (7, 8):
        expected = triton.step([[token]] * num_rows, [40] * num_rows, num_decode_rows=num_rows)
        with torch.inference_mode():
            input_ids.fill_(token)
            graph.replay()
        assert torch.equal(logits.cpu(), expected)
