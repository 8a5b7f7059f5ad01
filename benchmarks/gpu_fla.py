"""Decode of flash-linear-attention's NSAForCausalLM beside ours: same weights, same prompts.

    python benchmarks/gpu_fla.py [--rows 8] [--context 32768] [--tokens 129] [--ways generate]
                                  [--out FILE] [--tiny]

The model is A's shape in fla's own dialect: blocks of 64, 16 of them selected, window 128 (with
A's blocks of 16, fla's top-k refuses to select 16 of them). Both read the same safetensors.
Measured the same way, ms a step = (time of n tokens - time of 1 token) / (n - 1):

    ours            LLM.generate, the prompts in the prefix cache
    fla generate    NSAForCausalLM.generate, greedy, as transformers calls it (with a mask of ones)
    fla loop        the same model called token by token, without a mask: fla at its best; only the
                    steps are timed

fla's window branch needs flash-attn. Where that is not installed its function is replaced by
scaled_dot_product_attention over the window's keys: in decode, the last 128 only. The shares of
equal greedy tokens say whether both compute the same model.
"""

import gc
import importlib
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_common import (
    device_options,
    engine_options,
    environment,
    make_parser,
    make_prompt,
    median,
    resolve_device,
    synchronize,
    time_s,
    write_result,
)
from gpu_decode import DecodeBench, greedy
from gpu_models import MODELS, write_model, write_weights
from serve_stats import compare_outputs
from torch import Tensor

from nsa_serve.config import EngineConfig, make_config

# Queries of a chunk of the window branch: bounds its mask.
_CHUNK = 2048


def window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]
) -> Tensor:
    """Stand in for flash_attn_func: q [B, TQ, HQ, D], k and v [B, T, H, D] -> [B, TQ, HQ, D].

    The queries are the last TQ of T positions; each sees its own and the window_size[0] before it.
    """
    assert causal and window_size[1] == 0, "fla calls it no other way"
    before, num_queries, length = window_size[0], q.shape[1], k.shape[1]
    group = q.shape[2] // k.shape[2]
    if num_queries == 1:
        keys, values = (x[:, max(0, length - 1 - before) :].transpose(1, 2) for x in (k, v))
        query = q.transpose(1, 2)
        return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True).transpose(1, 2)
    outputs = []
    for start in range(0, num_queries, _CHUNK):
        end = min(start + _CHUNK, num_queries)
        # Positions of this chunk's queries, and of the first key that any of them sees.
        first, last = length - num_queries + start, length - num_queries + end
        low = max(0, first - before)
        keys, values = (
            x[:, low:last].transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v)
        )
        distance = torch.arange(first, last, device=q.device)[:, None] - torch.arange(
            low, last, device=q.device
        )
        mask = (distance >= 0) & (distance <= before)
        output = F.scaled_dot_product_attention(
            q[:, start:end].transpose(1, 2), keys, values, attn_mask=mask
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def window_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """Stand in for flash_attn_varlen_func where all sequences are of one length: [tokens, H, D]."""
    batch = len(cu_seqlens_k) - 1
    rows = [x.view(batch, x.shape[0] // batch, *x.shape[1:]) for x in (q, k, v)]
    output = window_attention(*rows, causal=causal, window_size=window_size)
    return output.reshape(q.shape[0], q.shape[1], v.shape[2])


def load_fla(folder: Path, device: str, dtype: str) -> tuple[Any, str]:
    """Return fla's model of the folder, and what computes its window branch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parallel: Any = importlib.import_module("fla.ops.nsa.parallel")
        model_class: Any = importlib.import_module("fla.models.nsa").NSAForCausalLM
    window = "flash-attn"
    if parallel.flash_attn_func is None:
        window = "scaled_dot_product_attention"
        parallel.flash_attn_func = window_attention
        parallel.flash_attn_varlen_func = window_attention_varlen
    model = model_class.from_pretrained(folder, dtype=getattr(torch, dtype))
    # Rows go on to the last token, as ours do.
    model.generation_config.eos_token_id = None
    return model.to(device).eval(), window


def check_tied(model: Any) -> None:
    """Raise SystemExit when the output layer is not the embedding, as config.json says it is."""
    is_own = model.lm_head.weight.data_ptr() != model.model.embeddings.weight.data_ptr()
    if model.config.tie_word_embeddings and is_own:
        raise SystemExit("fla loaded an output layer of its own: the weights are not the same")


@torch.inference_mode()
def fla_generate(model: Any, ids: Tensor, num_tokens: int) -> Tensor:
    """Return exactly `num_tokens` greedy tokens of each row: [B, num_tokens]."""
    output: Tensor = model.generate(
        ids,
        max_new_tokens=num_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
    )
    return output[:, ids.shape[1] :]


@torch.inference_mode()
def fla_loop(model: Any, ids: Tensor, num_tokens: int) -> tuple[Tensor, float]:
    """Return greedy tokens [B, num_tokens], and the seconds of all steps but the first."""
    result = model(ids, use_cache=True, logits_to_keep=1)
    cache = result.past_key_values
    token = result.logits[:, -1:].argmax(-1)
    tokens = [token]
    synchronize()
    start = time.perf_counter()
    for _ in range(num_tokens - 1):
        result = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        token = result.logits[:, -1:].argmax(-1)
        tokens.append(token)
    synchronize()
    return torch.cat(tokens, dim=1), time.perf_counter() - start


def row_of(name: str, num_rows: int, ms: float, **more: Any) -> dict[str, Any]:
    """Return and print a row of the result."""
    print(f"{name}: {ms:.3f} ms a step, {num_rows / ms * 1e3:,.0f} tokens/s", flush=True)
    return {"name": name, "ms_per_step": ms, "tokens_per_s": num_rows / ms * 1e3, **more}


def measure_fla(
    folder: Path, device: str, prompts: list[list[int]], options: Any, result: dict[str, Any]
) -> dict[str, list[list[int]]]:
    """Measure fla into the result; return the tokens of both ways."""
    model, window = load_fla(folder, device, options.dtype)
    check_tied(model)
    result["fla_window"] = window
    result["versions"] = {
        name: version(name) for name in ("flash-linear-attention", "fla-core", "transformers")
    }
    ids = torch.tensor(prompts, device=device)
    tokens: dict[str, list[list[int]]] = {}
    num_rows, num_tokens = len(prompts), options.tokens

    def attempt(name: str, run: Callable[[], tuple[float, Tensor]]) -> None:
        try:
            ms, output = run()
        except Exception as error:  # whatever a peer raises is its result
            message = f"{type(error).__name__}: {error}"[:500]
            result["rows"].append({"name": name, "error": message})
            print(f"{name}: {message}", flush=True)
        else:
            tokens[name] = output.tolist()
            result["rows"].append(row_of(name, num_rows, ms))
        write_result(options.out, result)

    def loop() -> tuple[float, Tensor]:
        fla_loop(model, ids, 3)  # compiles and tunes
        runs = [fla_loop(model, ids, num_tokens) for _ in range(options.repeats)]
        return median([seconds for _, seconds in runs]) / (num_tokens - 1) * 1e3, runs[0][0]

    def generate() -> tuple[float, Tensor]:
        fla_generate(model, ids, 3)
        first = [time_s(lambda: fla_generate(model, ids, 1)) for _ in range(options.repeats)]
        outputs: list[Tensor] = []
        whole = [
            time_s(lambda: outputs.append(fla_generate(model, ids, num_tokens)))
            for _ in range(options.repeats)
        ]
        return (median(whole) - median(first)) / (num_tokens - 1) * 1e3, outputs[0]

    ways = {"loop": loop, "generate": generate}
    for way in options.ways:
        attempt(f"fla {way}", ways[way])
    return tokens


def measure_ours(
    folder: Path, device: str, prompts: list[list[int]], options: Any, result: dict[str, Any]
) -> list[list[int]]:
    """Measure ours into the result; return its tokens."""
    context = len(prompts[0])
    settings = {
        **device_options(device, 0.5),
        "model": str(folder),
        "dtype": options.dtype,
        "max_model_len": context + options.tokens + 64,
        "max_num_seqs": len(prompts),
        **engine_options(options.option),
    }
    config = make_config(EngineConfig, settings)
    bench = DecodeBench(MODELS["fla"], config, repeats=options.repeats)
    row = bench.decode(prompts, num_tokens=options.tokens)
    result["rows"].append(row_of("ours", len(prompts), row["ms_per_step"], detail=row))
    write_result(options.out, result)
    outputs = bench.generate(prompts, greedy(options.tokens))
    bench.llm.close()
    return [output.token_ids for output in outputs]


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=129)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--ways", nargs="+", choices=["loop", "generate"], default=["loop", "generate"]
    )
    parser.add_argument("--folder", type=Path, help="a folder of gpu_models.py, with weights")
    options = parser.parse_args()
    if options.tiny:
        options.rows, options.context, options.tokens, options.repeats = 2, 150, 4, 1
    device = resolve_device(options.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder
        if folder is None:
            folder = write_model(Path(temporary) / "fla", "fla", is_tiny=options.tiny)
            write_weights(folder, device=device)
        vocab_size = 768 if options.tiny else MODELS["fla"].config["vocab_size"]
        prompts = [make_prompt(row, options.context, vocab_size) for row in range(options.rows)]
        result: dict[str, Any] = {
            "bench": "gpu-fla",
            **environment(options.commit),
            "title": MODELS["fla"].title,
            "num_rows": options.rows,
            "context": options.context,
            "num_tokens": options.tokens,
            "dtype": options.dtype,
            "versions": {},
            "fla_window": None,
            "rows": [],
            "equal": {},
        }
        ours = measure_ours(folder, device, prompts, options, result)
        # The engine's memory is free before fla's prefill takes as much.
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        theirs = measure_fla(folder, device, prompts, options, result)
    for name, tokens in theirs.items():
        result["equal"][name] = compare_outputs(ours, tokens)
        print(f"ours and {name}: {result['equal'][name]}", flush=True)
    speeds = {row["name"]: row.get("tokens_per_s", math.nan) for row in result["rows"]}
    for name in theirs:
        print(f"ours / {name}: {speeds['ours'] / speeds[name]:.1f}x", flush=True)
    write_result(options.out, result)


if __name__ == "__main__":
    main()
