"""--nsa-dialect: which of the llama-nsa family's models a checkpoint is, and that it computes it.

The expected logits are plain fp64 loops, from the files of the checkpoint.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsa_serve.config import EngineConfig, NSADialect, make_config
from nsa_serve.errors import ModelError
from nsa_serve.model_source import ModelSource, resolve_model
from nsa_serve.models.families import load_model_config
from nsa_serve.models.nsa_transformer import NSATransformer, used_branches
from nsa_serve.models.weights import load_device_weights, load_weights
from tests.engine.family_oracles import attend, read, rms_norm, rotate, swiglu, top_blocks
from tests.engine.test_triton_model import (
    DEVICE,
    FP32_TOLERANCE,
    MAX_POSITIONS,
    Stepper,
    compare,
    tokens,
)
from tests.kernels.conftest import _repaired_interpreter  # noqa: F401 (a fixture for all tests)
from tests.util import write_checkpoint, write_gguf

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning"
)

SIBLING = {"block_size": 16, "block_counts": 4, "window_size": 0}
# fp32 against fp64 over two layers.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that may be any of the siblings; its config.json names none."""
    root = tmp_path_factory.mktemp("sibling")
    path = write_checkpoint(root / "model", "llama-nsa", nsa={"window_size": 24}, seed=8)
    rewrite(path, **SIBLING)
    return path


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def source_of(folder: Path, dialect: NSADialect | None) -> ModelSource:
    return ModelSource(name="tiny", folder=folder, nsa_dialect=dialect)


def make_model(folder: Path, dialect: NSADialect, *, backend: str = "torch") -> Stepper:
    source = source_of(folder, dialect)
    config = load_model_config(source)
    if backend == "torch":
        weights = load_weights(source, config, torch.float32)
        model = NSATransformer(config, weights, max_positions=MAX_POSITIONS)
    else:
        weights = load_device_weights(source, config, torch.float32, device=DEVICE)
        model = NSATransformer(config, weights, max_positions=MAX_POSITIONS, backend="triton")
    return Stepper(config, model, 3)


def expected_logits(folder: Path, token_ids: list[int], *, is_dense: bool) -> Tensor:
    """g_slc * attention to everything, or to the blocks that compressed keys choose."""
    config, weights = read(folder)
    dim, num_heads = config["head_dim"], config["num_attention_heads"]
    num_kv, size = config["num_key_value_heads"], config["block_size"]
    frequencies = config["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    eps, group = config["rms_norm_eps"], num_heads // num_kv
    x = weights["model.embed_tokens.weight"][token_ids]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        attn = prefix + "self_attn."
        h = rms_norm(x, weights[prefix + "input_layernorm.weight"], eps)
        q, k, v = (
            (h @ weights[f"{attn}{name}_proj.weight"].T).unflatten(-1, (-1, dim)) for name in "qkv"
        )
        gates = (h @ weights[attn + "g_proj.weight"].T).unflatten(-1, (num_heads, 3)).sigmoid()
        q, k = rotate(q, frequencies, 1.0), rotate(k, frequencies, 1.0)
        out = torch.zeros_like(q)
        for t in range(len(x)):
            for kv in range(num_kv):
                chosen = list(range(t + 1))
                if not is_dense:
                    scores = torch.zeros(t // size + 1, dtype=torch.float64)
                    done = (t + 1) // size
                    pooled = k[: done * size, kv].unflatten(0, (done, size)).mean(1)
                    for head in range(kv * group, (kv + 1) * group):
                        if done:
                            scores[:done] += (pooled @ q[t, head] * dim**-0.5).softmax(0)
                    blocks = top_blocks(scores, config["block_counts"], {t // size})
                    chosen = [i for i in chosen if i // size in blocks]
                for head in range(kv * group, (kv + 1) * group):
                    o, _ = attend(q[t, head], k[chosen, kv], v[chosen, kv], dim**-0.5)
                    out[t, head] = gates[t, head, 1] * o
        x = x + out.flatten(1) @ weights[attn + "o_proj.weight"].T
        h = rms_norm(x, weights[prefix + "post_attention_layernorm.weight"], eps)
        x = x + swiglu(h, weights, prefix + "mlp.")
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return rms_norm(x, weights["model.norm.weight"], eps) @ head.T


@pytest.mark.parametrize(("dialect", "is_dense"), [("ssa", False), ("moba", False), ("full", True)])
def test_siblings_compute_what_their_code_does(
    folder: Path, dialect: NSADialect, is_dense: bool
) -> None:
    """A prompt beyond the selected blocks, then a decoded token."""
    model, prompt = make_model(folder, dialect), tokens(150, 5)
    prefill = model.step([prompt], [0])
    decode = model.step([[7]], [len(prompt)], num_decode_rows=1)
    expected = expected_logits(folder, [*prompt, 7], is_dense=is_dense)
    error = (torch.cat((prefill, decode)) - expected).abs().max() / expected.abs().max()
    assert error <= TOLERANCE


def test_the_siblings_differ(folder: Path) -> None:
    prompt = tokens(150, 5)
    results = {
        name: make_model(folder, name).step([prompt], [0])[-1] for name in ("nsa", "ssa", "full")
    }
    for a, b in (("nsa", "ssa"), ("ssa", "full"), ("nsa", "full")):
        assert (results[a] - results[b]).abs().max() > 1e-2


@pytest.mark.parametrize("dialect", ["ssa", "full"])
def test_both_backends_agree(folder: Path, dialect: NSADialect) -> None:
    plain = make_model(folder, dialect)
    compare(plain, make_model(folder, dialect, backend="triton"), FP32_TOLERANCE)


def test_dialects_of_the_published_configs(folder: Path) -> None:
    def nsa(dialect: NSADialect, **changes: Any) -> Any:
        config = json.loads((folder / "config.json").read_text())
        path = folder.parent / f"{dialect}-{len(changes)}"
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(json.dumps({**config, **changes}))
        loaded = load_model_config(source_of(path, dialect))
        return loaded.nsa, used_branches(loaded), loaded.max_position_embeddings

    # SSA-1B and MoBA-1B: block 16 and count 16, so the published kernel's half-and-half rule.
    for dialect in ("ssa", "moba"):
        found, used, _ = nsa(dialect, block_counts=16)
        assert (found.selection, found.num_selected_blocks) == ("fla_legacy", 16)
        assert (found.num_init_blocks, found.num_local_blocks, found.window_size) == (0, 1, 0)
        assert (used.cmp, used.slc, used.swa) == (False, True, False)
    # FullAttn-1B, whose block of 64 decides nothing; SSA-1B when it is asked for dense attention.
    for found, used, max_positions in (
        nsa("full", block_size=64),
        nsa("ssa", inference_mode="full", block_size=64),
    ):
        assert (found.window_size, found.window_gate) == (max_positions, "slc")
        assert (used.cmp, used.slc, used.swa) == (False, False, True)
    # Only SSA's code reads inference_mode.
    found, used, _ = nsa("moba", inference_mode="full")
    assert (used.cmp, used.slc, used.swa) == (False, True, False)
    found, used, _ = nsa("nsa", window_size=128)
    assert (used.cmp, used.slc, used.swa) == (True, True, True)
    assert found == load_model_config(source_of(folder.parent / "nsa-1", None)).nsa


@pytest.mark.parametrize(
    ("dialect", "changes", "said"),
    [
        (None, {}, "window_size 0.*SSA-1B, MoBA-1B and FullAttn-1B.*--nsa-dialect"),
        (None, {"block_size": 64}, "window_size 0.*--nsa-dialect"),
        (None, {"inference_mode": "sparse", "window_size": 8}, "inference_mode.*--nsa-dialect"),
        ("nsa", {"inference_mode": "full"}, "inference_mode 'full' .* --nsa-dialect ssa or full"),
        ("ssa", {"inference_mode": "dense"}, "inference_mode: .*'dense'"),
        ("ssa", {"block_counts": 15, "block_size": 24}, "block_counts 15 with block_size 24"),
    ],
)
def test_what_may_be_several_models_is_refused(
    folder: Path, tmp_path: Path, dialect: NSADialect | None, changes: dict[str, Any], said: str
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ModelError, match=said):
        load_model_config(source_of(tmp_path, dialect))


def test_the_flag_reaches_the_reader_and_fits_one_family_only(folder: Path, tmp_path: Path) -> None:
    settings = {"model": str(folder), "nsa_dialect": "moba"}
    source = resolve_model(make_config(EngineConfig, settings))
    assert source.nsa_dialect == "moba"
    assert load_model_config(source).nsa.branches == ("slc",)
    section = tmp_path / "nsa.json"
    section.write_text(json.dumps({"nsa": {}}))
    with pytest.raises(ModelError, match=r"--nsa-config .* and --nsa-dialect moba both"):
        resolve_model(make_config(EngineConfig, {**settings, "nsa_config": str(section)}))
    for family in ("nsa", "llama", "nsa_moe"):
        other = write_checkpoint(tmp_path / family, family)  # type: ignore[arg-type]
        with pytest.raises(ModelError, match=f"'llama-nsa' only, and this is model_type '{family}"):
            load_model_config(source_of(other, "ssa"))
    gguf = ModelSource(name="g", gguf=write_gguf(tmp_path / "a.gguf"), nsa_dialect="ssa")
    with pytest.raises(ModelError, match="this is a GGUF file"):
        load_model_config(gguf)


def test_a_nsa_section_says_the_same(folder: Path) -> None:
    """What a dialect stands for can be written down, as `convert` does."""
    config = load_model_config(source_of(folder, "full"))
    section = json.loads(json.dumps(dataclasses.asdict(config.nsa)))
    source = ModelSource(name="tiny", folder=folder, nsa_section=section)
    assert load_model_config(source).nsa == config.nsa
