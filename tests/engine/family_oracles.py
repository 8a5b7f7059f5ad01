"""Decoders written down once more, from what the families' papers and code say, for the tests.

Plain fp64 loops over positions and heads, from the checkpoint's own files: nothing of the engine is
used, so that an error in how it reads a config or a weight is found as well.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

Weights = Mapping[str, Tensor]


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return config.json and the weights, in fp64."""
    config = json.loads((folder / "config.json").read_text())
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights |= {name: value.double() for name, value in load_file(path).items()}
    return config, weights


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def swiglu(x: Tensor, weights: Weights, prefix: str) -> Tensor:
    gate = x @ weights[prefix + "gate_proj.weight"].T
    up = x @ weights[prefix + "up_proj.weight"].T
    return (F.silu(gate) * up) @ weights[prefix + "down_proj.weight"].T


def rotate(x: Tensor, frequencies: Tensor, factor: float) -> Tensor:
    """[T, heads, D]: the halves of every head turned by position * frequency."""
    angle = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequencies.double()
    cos, sin = angle.cos() * factor, angle.sin() * factor
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One query head: output and probabilities; zero and empty where there is no key."""
    if not len(keys):
        return values.new_zeros(values.shape[-1]), values.new_zeros(0)
    p = (keys @ query * scale).softmax(0)
    return p @ values, p


def yarn(head_dim: int, theta: float, section: Mapping[str, Any]) -> tuple[Tensor, float]:
    """YaRN: frequencies by how often they turn in the old context, and the temperature."""
    factor, context = section["factor"], section["original_max_position_embeddings"]

    def dimension_of(turns: float) -> float:
        return head_dim * math.log(context / (2 * math.pi * turns)) / (2 * math.log(theta))

    low = max(0, math.floor(dimension_of(section.get("beta_fast", 32))))
    high = min(head_dim - 1, math.ceil(dimension_of(section.get("beta_slow", 1))))
    found = []
    for i in range(head_dim // 2):
        plain = theta ** (-2 * i / head_dim)
        stretched = min(1.0, max(0.0, (i - low) / max(high - low, 0.001)))
        found.append(plain * (1 - stretched) + plain / factor * stretched)
    return torch.tensor(found, dtype=torch.float64), 0.1 * math.log(factor) + 1


def compressed(x: Tensor, weights: Weights, prefix: str, length: int, stride: int) -> Tensor:
    """[T, H, D] -> [windows, H, Dout], each complete window through its MLP."""
    windows = []
    for start in range(0, len(x) - length + 1, stride):
        window = x[start : start + length] + weights[prefix + "pos"][:, None]
        flat = window.transpose(0, 1).flatten(1)
        hidden = flat @ weights[prefix + "fc1.weight"].T + weights[prefix + "fc1.bias"]
        windows.append(
            F.silu(hidden) @ weights[prefix + "fc2.weight"].T + weights[prefix + "fc2.bias"]
        )
    shape = (0, x.shape[1], weights[prefix + "fc2.bias"].shape[0])
    return torch.stack(windows) if windows else x.new_zeros(shape)


def top_blocks(scores: Tensor, num_blocks: int, forced: set[int]) -> list[int]:
    """Forced blocks, then the best of the others, the lower index first where they are equal."""
    others = [b for b in range(len(scores)) if b not in forced]
    others.sort(key=lambda b: (-float(scores[b]), b))
    return sorted([*forced, *others[: max(0, num_blocks - len(forced))]])


def paper_attention(h: Tensor, weights: Weights, prefix: str, config: Mapping[str, Any]) -> Tensor:
    """NSA with keys and values of its own for each branch: [T, hidden] -> [T, hidden]."""
    nsa = config["nsa"]
    num_heads, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["head_dim"]
    v_dim = config.get("v_head_dim", dim)
    length, stride, size = nsa["cmp_len"], nsa["cmp_stride"], nsa["block_size"]
    section = config.get("rope_scaling")
    if section is None:
        exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        frequencies, factor = config["rope_theta"] ** -exponents, 1.0
    else:
        frequencies, factor = yarn(dim, config["rope_theta"], section)

    def heads(name: str, width: int) -> Tensor:
        return (h @ weights[f"{prefix}{name}_proj.weight"].T).unflatten(-1, (-1, width))

    q = rotate(heads("q", dim), frequencies, factor)
    k = {b: rotate(heads(f"k_{b}", dim), frequencies, factor) for b in ("cmp", "slc", "swa")}
    v = {b: heads(f"v_{b}", v_dim) for b in ("cmp", "slc", "swa")}
    k_cmp = compressed(k["cmp"], weights, prefix + "cmp_k.", length, stride)
    v_cmp = compressed(v["cmp"], weights, prefix + "cmp_v.", length, stride)
    hidden = F.silu(h @ weights[prefix + "gate.fc1.weight"].T + weights[prefix + "gate.fc1.bias"])
    gates = hidden @ weights[prefix + "gate.fc2.weight"].T + weights[prefix + "gate.fc2.bias"]
    gates = gates.sigmoid().unflatten(-1, (num_heads, 3))
    out = h.new_zeros(len(h), num_heads, v_dim)
    scale, group = dim**-0.5, num_heads // num_kv
    for t in range(len(h)):
        seen = (t + 1 - length) // stride + 1 if t + 1 >= length else 0
        current = t // size
        for kv in range(num_kv):
            scores = h.new_zeros(current + 1)
            members = range(kv * group, (kv + 1) * group)
            for head in members:
                o, p = attend(q[t, head], k_cmp[:seen, kv], v_cmp[:seen, kv], scale)
                out[t, head] += gates[t, head, 0] * o
                for j in range(seen):
                    for block in range(current + 1):
                        start = max(j * stride, block * size)
                        shared = min(j * stride + length, (block + 1) * size) - start
                        scores[block] += p[j] * max(0, shared) / stride
            forced = {b for b in range(nsa["num_init_blocks"]) if b <= current}
            forced |= {
                b for b in range(current - nsa["num_local_blocks"] + 1, current + 1) if b >= 0
            }
            chosen = top_blocks(scores, nsa["num_selected_blocks"], forced)
            tokens = [i for b in chosen for i in range(b * size, min((b + 1) * size, t + 1))]
            first = max(0, t + 1 - nsa["window_size"])
            for head in members:
                o, _ = attend(q[t, head], k["slc"][tokens, kv], v["slc"][tokens, kv], scale)
                out[t, head] += gates[t, head, 1] * o
                window = slice(first, t + 1)
                o, _ = attend(q[t, head], k["swa"][window, kv], v["swa"][window, kv], scale)
                out[t, head] += gates[t, head, 2] * o
    return out.flatten(1) @ weights[prefix + "o_proj.weight"].T


def deepseek_moe(x: Tensor, weights: Weights, prefix: str, config: Mapping[str, Any]) -> Tensor:
    """Softmax over all experts, the top k of it as weights, and the shared experts."""
    probabilities = (x @ weights[prefix + "router.weight"].T).softmax(-1)
    result = swiglu(x, weights, prefix + "shared_experts.")
    for t in range(len(x)):
        order = sorted(
            range(config["n_routed_experts"]), key=lambda e: (-float(probabilities[t, e]), e)
        )
        for expert in order[: config["num_experts_per_tok"]]:
            output = swiglu(x[t : t + 1], weights, f"{prefix}experts.{expert}.")[0]
            result[t] += probabilities[t, expert] * output
    return result


def paper_logits(folder: Path, token_ids: list[int]) -> Tensor:
    """[T, vocab_size] fp64 of an `nsa_moe` checkpoint."""
    config, weights = read(folder)
    eps = config["rms_norm_eps"]
    x = weights["model.embed_tokens.weight"][token_ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        h = rms_norm(x, weights[prefix + "input_layernorm.weight"], eps)
        x = x + paper_attention(h, weights, prefix + "self_attn.", config)
        h = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
        is_moe = "n_routed_experts" in config and layer >= config.get("first_k_dense_replace", 0)
        x = x + (
            deepseek_moe(h, weights, prefix + "mlp.", config)
            if is_moe
            else swiglu(h, weights, prefix + "mlp.")
        )
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return rms_norm(x, weights["model.norm.weight"], eps) @ head.T


def longrope(config: Mapping[str, Any], head_dim: int, *, is_long: bool) -> tuple[Tensor, float]:
    """LongRoPE: every frequency divided by its own factor."""
    section = config["rope_scaling"]
    factors = section["long_factor" if is_long else "short_factor"]
    plain = [config["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    ratio = config["max_position_embeddings"] / section["original_max_position_embeddings"]
    temperature = 1.0
    if ratio > 1:
        temperature = math.sqrt(
            1 + math.log(ratio) / math.log(section["original_max_position_embeddings"])
        )
    pairs = zip(plain, factors, strict=True)
    return torch.tensor([f / x for f, x in pairs], dtype=torch.float64), temperature


def infllm_blocks(
    queries: Tensor, fine: Tensor, coarse: Tensor, t: int, sparse: Mapping[str, Any], scale: float
) -> list[int]:
    """The blocks that one group's query heads, [G, D], share at position t."""
    kernel, stride, size = sparse["kernel_size"], sparse["kernel_stride"], sparse["block_size"]
    num_fine = max(0, (t + 1 - kernel) // stride + 1)
    num_coarse = max(0, (t + 1 - 4 * kernel) // (4 * stride) + 1)
    current = t // size
    pooled = queries.new_zeros(current + 1)
    if num_fine:
        normaliser = coarse[:num_coarse] if num_coarse else fine[:num_fine]
        score = queries.new_zeros(num_fine)
        for query in queries:
            lse = (normaliser @ query * scale).logsumexp(0)
            score += (fine[:num_fine] @ query * scale - lse).exp()
        per_block = size // stride
        for block in range(current + 1):
            # Kernel 5, stride 4, padding 1: one window before the block's own four.
            first = max(0, block * per_block - 1)
            own = score[first : (block + 1) * per_block]
            if len(own):
                pooled[block] = own.max()
    local = sparse["window_size"] // size
    forced = set(range(min(sparse["init_blocks"], current + 1)))
    forced |= set(range(max(0, current - local + 1), current + 1))
    return top_blocks(pooled, sparse["topk"] + local, forced)


def minicpm_logits(folder: Path, token_ids: list[int], *, is_long: bool = False) -> Tensor:
    """[T, vocab_size] fp64 of a `minicpm` checkpoint with a `sparse_config`."""
    config, weights = read(folder)
    sparse = config["sparse_config"]
    eps, num_layers = config["rms_norm_eps"], config["num_hidden_layers"]
    num_heads, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    dim = config["hidden_size"] // num_heads
    frequencies, factor = longrope(config, dim, is_long=is_long)
    depth = config["scale_depth"] / math.sqrt(num_layers)
    kernel, stride, size = sparse["kernel_size"], sparse["kernel_stride"], sparse["block_size"]
    x = weights["model.embed_tokens.weight"][token_ids] * config["scale_emb"]
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        attn = prefix + "self_attn."
        h = rms_norm(x, weights[prefix + "input_layernorm.weight"], eps)
        q, k, v = (
            (h @ weights[f"{attn}{name}_proj.weight"].T).unflatten(-1, (-1, dim)) for name in "qkv"
        )
        q, k = rotate(q, frequencies, factor), rotate(k, frequencies, factor)
        out = torch.zeros_like(q)
        for kv in range(num_kv):
            key = k[:, kv]
            fine = mean_windows(key, kernel, stride)
            coarse = mean_windows(key, 4 * kernel, 4 * stride)
            members = slice(kv * (num_heads // num_kv), (kv + 1) * (num_heads // num_kv))
            for t in range(len(x)):
                tokens = list(range(t + 1))
                if t + 1 >= sparse["dense_len"]:
                    blocks = infllm_blocks(q[t, members], fine, coarse, t, sparse, dim**-0.5)
                    tokens = [i for i in tokens if i // size in blocks]
                for head in range(num_heads)[members]:
                    out[t, head], _ = attend(q[t, head], key[tokens], v[tokens, kv], dim**-0.5)
        x = x + depth * (out.flatten(1) @ weights[attn + "o_proj.weight"].T)
        h = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
        x = x + depth * swiglu(h, weights, prefix + "mlp.")
    hidden = rms_norm(x, weights["model.norm.weight"], eps)
    hidden = hidden / (config["hidden_size"] / config["dim_model_base"])
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return hidden @ head.T


def mean_windows(x: Tensor, length: int, stride: int) -> Tensor:
    """[T, D] -> [windows, D]."""
    windows = [x[i : i + length].mean(0) for i in range(0, len(x) - length + 1, stride)]
    return torch.stack(windows) if windows else x.new_zeros(0, x.shape[1])
