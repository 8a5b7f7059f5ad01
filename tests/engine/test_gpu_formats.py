"""What fewer bits cost on a GPU: bfloat16, an FP8 cache, FP8 weights; and what memory is too small.

Prompts are scored, since scores do not follow from a first token that differs. These checkpoints
are made to be sharp, so rounding costs them more than it costs a trained model: every bound is a
multiple of what the same rounding costs the CPU engine, where the kernels are other ones.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nsa_kernels import torch_ops
from nsa_serve.engine import Engine
from nsa_serve.errors import CapacityError, ConfigError
from nsa_serve.models.fp8 import quantize_rows
from nsa_serve.request import EngineRequest
from tests.engine.engine_runs import Result, greedy, make_engine, make_prompt, run
from tests.engine.test_gpu_engine import engine_options, is_on_gpu
from tests.util import VOCAB_SIZE, write_checkpoint

pytestmark = pytest.mark.gpu

PROMPT_LENGTHS = (30, 111, 200, 333, 700)
# The kernels of a GPU sum in other orders and round in other places than the CPU's operators.
ROOM = 1.5
# Keys and values of these checkpoints are below 14, so that e4m3 has them at this scale.
CACHE_SCALE = 2.0**-5
# What --quantization fp8 rounds.
MATRICES = tuple(f".{n}_proj.weight" for n in ("q", "k", "v", "g", "o", "gate", "up", "down"))
FAMILIES = ("llama", "llama-nsa", "llama-mlp", "nsa")


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of prompt tokens and which token was the likeliest, over all prompts."""

    logprobs: Tensor
    likeliest: Tensor

    def rms(self, other: "Scores") -> float:
        return float((self.logprobs - other.logprobs).square().mean().sqrt())

    def agreement(self, other: "Scores") -> float:
        return float((self.likeliest == other.likeliest).double().mean())


def score(engine: Engine, *, is_batched: bool = False) -> Scores:
    requests = [
        EngineRequest(
            request_id=str(length),
            prompt_token_ids=make_prompt(length),
            params=greedy(1, prompt_logprobs=1),
        )
        for length in PROMPT_LENGTHS
    ]
    engine.pool.reset_prefix_cache()
    results: dict[str, Result] = {}
    for batch in [requests] if is_batched else [[request] for request in requests]:
        results |= run(engine, batch)
    entries = [entry for r in requests for entry in results[r.request_id].prompt_logprobs or []]
    assert len(entries) == sum(PROMPT_LENGTHS) - len(PROMPT_LENGTHS)
    return Scores(
        torch.tensor([entry.logprob for entry in entries], dtype=torch.float64),
        torch.tensor([entry.top[0][0] for entry in entries]),
    )


@contextmanager
def fp8_cache_on_cpu() -> Iterator[None]:
    """Round what the CPU engine keeps, raw and compressed, as an FP8 cache does."""

    def rounded(x: Tensor) -> Tensor:
        return (x.float() / CACHE_SCALE).to(torch.float8_e4m3fn).float().mul_(CACHE_SCALE).to(x)

    write, compress = torch_ops._write, torch_ops.compress_kv

    def rounded_write(x: Tensor, cache: Tensor, token_rows: Tensor) -> None:
        assert float(x.abs().max()) < 448 * CACHE_SCALE
        write(rounded(x), cache, token_rows)

    def rounded_compress(branch_kv: Any, cache: Any, plan: Any, *arguments: Any) -> None:
        compress(branch_kv, cache, plan, *arguments)
        for tensor in (cache.k_cmp, cache.v_cmp):
            rows = tensor.view(-1, tensor.shape[-1])
            rows[plan.cmp_rows] = rounded(rows[plan.cmp_rows])

    with (
        mock.patch.object(torch_ops, "_write", rounded_write),
        mock.patch.object(torch_ops, "compress_kv", rounded_compress),
    ):
        yield


def score_on_cpu(folder: Path, dtype: torch.dtype) -> Scores:
    engine = make_engine(folder, dtype=dtype, page_memory="32MiB")
    scores = score(engine)
    engine.close()
    return scores


def make_other(
    folder: Path, device: str, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> Engine:
    """The engine under test; without a GPU, the CPU's, and then without what only GPUs have."""
    if device == "cpu":
        options = {k: v for k, v in options.items() if k not in ("kv_cache_dtype", "quantization")}
    elif folder.name == "llama-mlp" and options.get("kv_cache_dtype") == "fp8":
        pytest.skip("its heads are too narrow for an FP8 cache on a GPU")
    return make_engine(folder, dtype=dtype, **engine_options(device, **options))


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, checkpoints: Mapping[str, Path]) -> Path:
    return checkpoints[request.param]


@pytest.fixture(scope="module")
def exact(folder: Path) -> Scores:
    return score_on_cpu(folder, torch.float32)


def assert_as_good(got: Scores, exact: Scores, usual: Scores) -> None:
    """Compare with what the same rounding costs on the CPU."""
    assert got.rms(exact) <= ROOM * usual.rms(exact)
    num_lost, num_lost_usually = 1 - got.agreement(exact), 1 - usual.agreement(exact)
    # Some 1400 tokens: one in a hundred is chance.
    assert num_lost <= ROOM * num_lost_usually + 0.01


def test_bfloat16_costs_what_it_costs_on_the_cpu(
    folder: Path, exact: Scores, engine_device: str
) -> None:
    engine = make_other(folder, engine_device)
    got = score(engine)
    assert_as_good(got, exact, score_on_cpu(folder, torch.bfloat16))
    assert_as_good(score(engine, is_batched=True), exact, score_on_cpu(folder, torch.bfloat16))
    engine.close()


def test_an_fp8_cache_in_fp32_is_the_rounding_and_nothing_else(
    folder: Path, exact: Scores, engine_device: str
) -> None:
    """Numbers at the edge of two e4m3 numbers may go either way; most of the error is the same."""
    with fp8_cache_on_cpu():
        want = score_on_cpu(folder, torch.float32)
        engine = make_other(folder, engine_device, torch.float32, kv_cache_dtype="fp8")
        got = score(engine)
        engine.close()
    assert want.rms(exact) > 0.001
    assert got.rms(want) <= 0.1 * want.rms(exact)
    assert got.agreement(want) >= 0.98


def test_an_fp8_cache_in_bfloat16_costs_what_it_costs_on_the_cpu(
    folder: Path, exact: Scores, engine_device: str
) -> None:
    with fp8_cache_on_cpu():
        usual = score_on_cpu(folder, torch.bfloat16)
        engine = make_other(folder, engine_device, kv_cache_dtype="fp8")
        got = score(engine)
    if is_on_gpu(engine):
        assert engine.info.cache_dtype == "float8_e4m3fn"
    assert_as_good(got, exact, usual)
    engine.close()


def decode_error(engine: Engine, num_tokens: int) -> float:
    """Rms between log-probabilities of tokens as they were decoded, and as a prompt scores them."""
    decoded, scored = [], []
    for length in (9, 111, 300):
        prompt = make_prompt(length)
        engine.pool.reset_prefix_cache()
        request = EngineRequest(
            request_id="r", prompt_token_ids=prompt, params=greedy(num_tokens, logprobs=0)
        )
        result = run(engine, [request])["r"]
        engine.pool.reset_prefix_cache()
        request = EngineRequest(
            request_id="r",
            prompt_token_ids=prompt + result.token_ids,
            params=greedy(0, prompt_logprobs=0),
        )
        decoded += [entry.logprob for entry in result.logprobs]
        entries = run(engine, [request])["r"].prompt_logprobs or []
        scored += [entry.logprob for entry in entries[-num_tokens:]]
    difference = torch.tensor(decoded) - torch.tensor(scored)
    return float(difference.double().square().mean().sqrt())


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_decoding_and_scoring_agree(
    folder: Path, exact: Scores, engine_device: str, kv_cache_dtype: str
) -> None:
    """Decode rows, which graphs run, against prefill, over the same tokens in the same format."""
    if kv_cache_dtype == "auto":
        usual = score_on_cpu(folder, torch.bfloat16)
    else:
        with fp8_cache_on_cpu():
            usual = score_on_cpu(folder, torch.bfloat16)
    engine = make_other(folder, engine_device, kv_cache_dtype=kv_cache_dtype)
    # Two paths that each round in their own way: at most the sum of their errors.
    assert decode_error(engine, 40) <= 2 * usual.rms(exact)
    engine.close()


@pytest.mark.parametrize("enforce_eager", [False, True])
def test_a_prefix_hit_in_an_fp8_cache_changes_nothing(
    folder: Path, engine_device: str, enforce_eager: bool
) -> None:
    """The pages are the same ones; chunks that end where the hit ends make the rest equal too."""
    num_hits = 104 if folder.name == "llama-nsa" else 96
    engine = make_other(
        folder,
        engine_device,
        kv_cache_dtype="fp8",
        enforce_eager=enforce_eager,
        max_num_batched_tokens=num_hits,
    )
    params = greedy(20, logprobs=2)
    request = EngineRequest(request_id="r", prompt_token_ids=make_prompt(111), params=params)
    cold = run(engine, [request])["r"]
    warm = run(engine, [request])["r"]
    assert (cold.num_prefix_hit_tokens, warm.num_prefix_hit_tokens) == (0, num_hits)
    assert warm.token_ids == cold.token_ids
    assert [e.logprob for e in warm.logprobs] == [e.logprob for e in cold.logprobs]
    engine.close()


def test_graphs_and_batches_change_nothing_in_an_fp8_cache(
    folder: Path, engine_device: str
) -> None:
    """In fp32, where sums in another order seldom reach another e4m3 number."""
    requests = [
        EngineRequest(
            request_id=str(length), prompt_token_ids=make_prompt(length), params=greedy(12)
        )
        for length in (7, 33, 64, 111, 200)
    ]
    results = []
    for options in ({}, {"enforce_eager": True}, {"async_scheduling": False, "max_num_seqs": 1}):
        engine = make_other(folder, engine_device, torch.float32, kv_cache_dtype="fp8", **options)
        results.append({name: r.token_ids for name, r in run(engine, requests).items()})
        engine.close()
    pairs = [
        (a == b)
        for other in results[1:]
        for name in results[0]
        for a, b in zip(results[0][name], other[name], strict=True)
    ]
    assert sum(pairs) >= 0.9 * len(pairs)


# Weights


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of dimensions that FP8 products take, and the same with rounded matrices."""
    root = tmp_path_factory.mktemp("wide")
    shape = {
        "hidden_size": 256,
        "num_q_heads": 16,
        "num_kv_heads": 2,
        "head_dim": 16,
        "intermediate_size": 512,
    }
    folders = tuple(write_checkpoint(root / name, seed=5, **shape) for name in ("whole", "rounded"))
    file = folders[1] / "model.safetensors"
    weights = load_file(file)
    for name, tensor in weights.items():
        if name.endswith(MATRICES):
            out = torch.empty_like(tensor, dtype=torch.float8_e4m3fn)
            scales = torch.empty(len(tensor))
            quantize_rows(tensor, out=out, scales=scales)
            weights[name] = out.float() * scales[:, None]
    save_file(weights, file)
    return folders[0], folders[1]


def test_fp8_weights_cost_what_rounding_them_costs(
    wide: tuple[Path, Path], engine_device: str
) -> None:
    """Activations are rounded as the weights are, which doubles the variance; and bfloat16."""
    whole, rounded = wide
    exact = score_on_cpu(whole, torch.float32)
    rounding = score_on_cpu(rounded, torch.float32).rms(exact)
    bfloat16 = score_on_cpu(whole, torch.bfloat16).rms(exact)
    assert rounding > 0.001
    source = rounded if engine_device == "cpu" else whole
    engine = make_other(source, engine_device, quantization="fp8")
    got = score(engine)
    assert got.rms(exact) <= ROOM * (2 * rounding**2 + bfloat16**2) ** 0.5
    assert got.rms(exact) > 0.5 * rounding
    if is_on_gpu(engine):
        assert engine.info.quantization == "fp8"
        assert engine.info.weight_bytes < 2 * engine.info.num_parameters
    # Rows are quantized one by one: a row does not depend on its neighbours.
    assert score(engine, is_batched=True).rms(got) <= 0.5 * got.rms(exact)
    assert decode_error(engine, 40) <= 2 * got.rms(exact)
    engine.close()


def test_fp8_weights_and_an_fp8_cache_together(wide: tuple[Path, Path], engine_device: str) -> None:
    exact = score_on_cpu(wide[0], torch.float32)
    with fp8_cache_on_cpu():
        both = score_on_cpu(wide[1], torch.bfloat16)
    engine = make_other(wide[0], engine_device, quantization="fp8", kv_cache_dtype="fp8")
    assert score(engine).rms(exact) <= 2 * ROOM * both.rms(exact)
    engine.close()


def test_fp8_weights_are_refused_in_float32(wide: tuple[Path, Path]) -> None:
    with pytest.raises(ConfigError, match="--dtype bfloat16"):
        make_engine(wide[0], device="cuda", quantization="fp8")


def test_dummy_weights_serve(tmp_path: Path, wide: tuple[Path, Path], engine_device: str) -> None:
    """A config without weights; the tokenizer is not needed either, as long as nobody asks."""
    (tmp_path / "config.json").write_bytes((wide[0] / "config.json").read_bytes())
    engine = make_other(tmp_path, engine_device, load_format="dummy")
    prompt = make_prompt(50)
    request = EngineRequest(request_id="r", prompt_token_ids=prompt, params=greedy(9, logprobs=0))
    result = run(engine, [request])["r"]
    assert len(result.token_ids) == 9
    assert all(0 <= token < VOCAB_SIZE for token in result.token_ids)
    assert all(entry.logprob <= 0 for entry in result.logprobs)
    engine.close()


# Memory


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(CapacityError) as caught:
        make_engine(folder, device="cuda", **options)
    return str(caught.value)


def page_bytes_of(engine: Engine) -> int:
    info = engine.info
    return sum(part.total_bytes for part in info.cache) // info.num_pages


@pytest.fixture(scope="module")
def llama(checkpoints: Mapping[str, Path]) -> Path:
    return checkpoints["llama"]


def numbers(pattern: str, text: str) -> Sequence[int]:
    return [int(number) for number in re.findall(pattern, text)]


def test_too_small_a_cache_is_refused_with_a_remedy_that_works(llama: Path) -> None:
    engine = make_engine(llama, device="cuda", page_memory="1MiB", max_num_seqs=1)
    page_bytes = page_bytes_of(engine)
    engine.close()
    options: dict[str, Any] = {"max_model_len": 200, "max_num_seqs": 1}
    text = refusal(llama, page_memory=5 * page_bytes, **options)
    (needed,) = numbers(r"set --page-memory (\d+) or more", text)
    (fits,) = numbers(r"set --max-model-len (\d+) or less", text)
    assert needed == 14 * page_bytes
    assert fits == 4 * 16
    engine = make_engine(llama, device="cuda", page_memory=needed, **options)
    assert (engine.info.num_pages, engine.info.max_model_len) == (13, 200)
    engine.close()
    options["max_model_len"] = fits
    engine = make_engine(llama, device="cuda", page_memory=5 * page_bytes, **options)
    assert engine.info.max_model_len == fits
    engine.close()


def test_more_than_the_gpu_has_is_refused(llama: Path) -> None:
    text = refusal(llama, page_memory="2TiB", max_num_seqs=1)
    assert "page_memory is 2199023255552 bytes" in text
    assert numbers(r"set --page-memory (\d+)", text)


def test_a_share_that_is_in_use_is_refused(llama: Path) -> None:
    text = refusal(llama, gpu_memory_utilization=0.0005, max_num_seqs=1)
    assert "--gpu-memory-utilization" in text


def test_what_is_left_of_the_share_is_the_cache(llama: Path) -> None:
    """Beside tests that take memory in the meantime: there is room for all of them."""
    room = 16 << 30
    free, total = torch.cuda.mem_get_info()
    share = round((total - free + room) / total, 4)
    engine = make_engine(llama, device="cuda", gpu_memory_utilization=share, max_num_seqs=2)
    memory = engine.info.memory
    assert memory is not None
    assert memory.total_bytes == total
    cache_bytes = sum(part.total_bytes for part in engine.info.cache)
    assert 0 < cache_bytes <= 1.5 * room
    parts = memory.other_bytes + memory.weight_bytes + memory.activation_bytes
    assert parts + cache_bytes <= share * total + (64 << 20)
    # Not by `run`, which checks each of a million pages after every step.
    engine.add(EngineRequest(request_id="r", prompt_token_ids=make_prompt(99), params=greedy(5)))
    num_tokens = 0
    while engine.has_unfinished:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    assert num_tokens == 5
    engine.close()
