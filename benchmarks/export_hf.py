"""Write the default model's dequantised weights as a plain Llama folder that other engines load."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from nsa_serve.config import EngineConfig
from nsa_serve.model_source import load_tokenizer, resolve_model
from nsa_serve.models.families import load_model_config
from nsa_serve.models.weights import load_weights


def export_hf(folder: Path, config: EngineConfig, *, dtype: torch.dtype = torch.bfloat16) -> None:
    """Export config.json, model.safetensors and tokenizer.json to `folder`."""
    source = resolve_model(config)
    model = load_model_config(source)
    weights = load_weights(source, model, dtype)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    eos = list(model.eos_token_ids)
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_q_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.intermediate_size,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": model.max_position_embeddings,
        "tie_word_embeddings": model.tie_word_embeddings,
        "hidden_act": "silu",
        "bos_token_id": model.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(fields))
    tokenizer = load_tokenizer(config)
    tokenizer.save(folder / "tokenizer.json")
    special = {
        f"{name}_token": tokenizer.token_to_str(token_id)
        for name in ("bos", "eos")
        if (token_id := getattr(tokenizer, f"{name}_token_id")) is not None
    }
    template = tokenizer.chat_template
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **special,
                **({} if template is None else {"chat_template": template}),
            }
        )
    )
