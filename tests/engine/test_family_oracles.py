"""The engine against decoders that were written down once more (family_oracles.py).

Log-probabilities of every position, not only tokens: of the whole prompt, and of every token that
is decoded after it. fp32 against fp64; prompts of every boundary length run together.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_serve.engine import Engine
from nsa_serve.request import EngineRequest
from tests.engine.engine_runs import Result, greedy, make_engine, make_prompt, run
from tests.engine.family_oracles import minicpm_logits, paper_logits
from tests.util import VOCAB_SIZE, write_checkpoint

Oracle = Callable[[Path, list[int]], Tensor]

# fp32 over two layers. Selections are as sharp as the checkpoints: no near tie was met.
TOLERANCE = 2e-4
MAX_TOKENS = 6

PAPER_NSA = {
    "cmp_len": 8,
    "cmp_stride": 4,
    "block_size": 16,
    "num_selected_blocks": 4,
    "num_init_blocks": 1,
    "num_local_blocks": 2,
    "window_size": 24,
    "compression": "mlp",
    "cmp_hidden_size": 20,
    "gate": "mlp",
    "gate_hidden_size": 12,
}
EXPERTS = {
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
SPARSE = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "init_blocks": 1,
    "block_size": 16,
    "window_size": 32,
    "topk": 2,
    "use_nope": False,
    "dense_len": 70,
}
MUP = {"scale_emb": 12, "dim_model_base": 16, "scale_depth": 1.4, "mup_denominator": 32}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.7, 2.0, 2.5, 3.0, 4.0],
    "long_factor": [1.5, 1.6, 1.9, 2.5, 3.0, 4.0, 6.0, 8.0],
    "original_max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Case:
    """A checkpoint, what is written down about it, and prompt lengths around its boundaries."""

    family: str
    oracle: Oracle
    arguments: Mapping[str, Any]
    lengths: tuple[int, ...]


PAPER_LENGTHS = (1, 7, 8, 9, 11, 12, 15, 16, 17, 24, 25, 32, 33, 63, 64, 65, 100)
SPARSE_LENGTHS = (1, 8, 16, 31, 32, 33, 63, 64, 65, 68, 69, 70, 71, 95, 96, 97, 130)
CASES = {
    "paper": Case("nsa_moe", paper_logits, {"nsa": PAPER_NSA}, PAPER_LENGTHS),
    "paper-moe-yarn": Case(
        "nsa_moe",
        paper_logits,
        {
            "nsa": PAPER_NSA,
            "config": {**EXPERTS, "v_head_dim": 12, "rope_scaling": YARN},
            "num_layers": 3,
            "num_q_heads": 6,
            "head_dim": 20,
        },
        PAPER_LENGTHS,
    ),
    "paper-mqa": Case(
        "nsa_moe",
        paper_logits,
        {"nsa": {**PAPER_NSA, "window_size": 16}, "config": EXPERTS, "num_kv_heads": 1},
        (1, 16, 33, 80),
    ),
    "minicpm": Case(
        "minicpm",
        minicpm_logits,
        {"config": {**MUP, "rope_scaling": LONGROPE, "sparse_config": SPARSE}},
        SPARSE_LENGTHS,
    ),
    "minicpm-tied": Case(
        "minicpm",
        minicpm_logits,
        {
            "config": {**MUP, "rope_scaling": LONGROPE, "sparse_config": SPARSE},
            "num_q_heads": 8,
            "num_kv_heads": 1,
            "hidden_size": 128,
            "tie_word_embeddings": True,
        },
        (33, 70, 97),
    ),
}


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Case, Path]:
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("oracle") / request.param
    arguments: dict[str, Any] = {**case.arguments}
    return case, write_checkpoint(folder, case.family, **arguments)  # type: ignore[arg-type]


def requests(case: Case, prefix: str = "") -> list[EngineRequest]:
    params = greedy(MAX_TOKENS, logprobs=0, prompt_logprobs=0)
    return [
        EngineRequest(request_id=f"{prefix}{n}", prompt_token_ids=make_prompt(n), params=params)
        for n in case.lengths
    ]


def engine_of(folder: Path, **options: Any) -> Engine:
    return make_engine(folder, max_num_seqs=32, page_memory="8MiB", max_model_len=512, **options)


def largest_error(
    case: Case, folder: Path, asked: list[EngineRequest], results: Mapping[str, Result]
) -> float:
    """Over every log-probability that the engine gave."""
    worst = 0.0
    for request in asked:
        result = results[request.request_id]
        prompt = request.prompt_token_ids
        token_ids = [*prompt, *result.token_ids]
        expected = case.oracle(folder, token_ids[:-1]).log_softmax(-1)
        given = [entry.logprob for entry in result.logprobs]
        if result.prompt_logprobs is not None:
            given = [*(entry.logprob for entry in result.prompt_logprobs), *given]
        first = len(token_ids) - len(given)
        wanted = [float(expected[i - 1, token_ids[i]]) for i in range(first, len(token_ids))]
        differences = torch.tensor(given, dtype=torch.float64) - torch.tensor(wanted)
        worst = max(worst, float(differences.abs().max()))
        for i in range(len(prompt), len(token_ids)):
            best = float(expected[i - 1].max())
            assert best - float(expected[i - 1, token_ids[i]]) <= TOLERANCE, "not the best token"
    return worst


def test_every_log_probability(checkpoint: tuple[Case, Path]) -> None:
    """Prompts together and whole, then decoded together."""
    case, folder = checkpoint
    asked = requests(case)
    engine = engine_of(folder, max_num_batched_tokens=4096)
    assert largest_error(case, folder, asked, run(engine, asked)) < TOLERANCE


def test_chunks_and_prefix_hits(checkpoint: tuple[Case, Path]) -> None:
    """The same through chunks of 23 tokens, and again with what those left in the cache."""
    case, folder = checkpoint
    engine = engine_of(folder, max_num_batched_tokens=23 + len(case.lengths))
    for turn in ("first ", "second "):
        asked = [
            # Prompt log-probabilities would keep a prefix from being looked up.
            EngineRequest(
                request_id=item.request_id,
                prompt_token_ids=item.prompt_token_ids,
                params=greedy(MAX_TOKENS, logprobs=0),
            )
            for item in requests(case, turn)
        ]
        results = run(engine, asked)
        assert largest_error(case, folder, asked, results) < TOLERANCE
    hits = [results[item.request_id].num_prefix_hit_tokens for item in asked]
    assert max(hits) >= 48
    assert all(token < VOCAB_SIZE for item in asked for token in results[item.request_id].token_ids)
