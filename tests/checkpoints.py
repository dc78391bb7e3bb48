"""Tiny random checkpoints for tests: real folders of safetensors, loaded the way a user's model is.

Weights are drawn wider than for training, so that greedy answers wander instead of repeating one token.
"""

from pathlib import Path
from typing import Any

ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")


def make_checkpoint(arch: str, folder: Path, seed: int = 0, **overrides: Any) -> Path:
    """Write a random fp32 checkpoint of 3 layers, 4 heads on 2 KV heads, vocabulary 300; returns the folder.

    `overrides` are configuration fields, for example `num_hidden_layers=1` or `sliding_window=16`.
    """
    import torch
    from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
    from transformers.models.llama.modeling_llama import LlamaForCausalLM
    from transformers.models.mistral.modeling_mistral import MistralForCausalLM
    from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
    from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

    classes = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }
    config_class, model_class = classes[arch]
    fields: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "eos_token_id": 2,
        "bos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    if arch == "mistral":
        fields["sliding_window"] = None
    fields.update(overrides)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config_class(**fields))
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:  # zeros and ones by default, which would hide their absence
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder
