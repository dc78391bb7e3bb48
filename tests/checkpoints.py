"""Tiny random checkpoints for tests: real folders of safetensors, loaded the way a user's model is.

Weights are drawn wider than for training, so that greedy answers wander instead of repeating one token.
"""

from pathlib import Path
from typing import Any

DROP = object()  # a field of COMMON that a family does not have
ARCHITECTURES = ("llama", "qwen2", "qwen3", "mistral")

COMMON: dict[str, Any] = {
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
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
ROUTED = {**MOE, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOWS = {"sliding_window": 16, "layer_types": LAYERS}
LATENT = {
    "kv_lora_rank": 24,
    "head_dim": DROP,
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}

MHA = {"num_key_value_heads": DROP, "head_dim": DROP}

VISION = {
    "image_token_id": 297,
    "image_token_index": 297,
    "video_token_id": 298,
    "vision_config": {"hidden_size": 64, "num_hidden_layers": 1, "depth": 1, "embed_dim": 64, "out_hidden_size": 64}
    | {"intermediate_size": 64, "num_attention_heads": 2, "num_heads": 2, "deepstack_visual_indexes": [0]},
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}

Family = tuple[str, dict[str, Any]]
# Name -> (model_type of transformers, what its configuration says besides COMMON). All of these run.
FAMILIES: dict[str, Family] = {
    "llama": ("llama", {}),
    "llama, one KV head, tied": ("llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama, wide heads, biases": ("llama", {"head_dim": 24, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2, window": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 16}),
    "ministral": ("ministral", {"sliding_window": 16}),
    "ministral3": ("ministral3", {}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {**WINDOWS, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 40}),
    "gemma3_text": ("gemma3_text", WINDOWS),
    "vaultgemma": ("vaultgemma", {**WINDOWS, "attn_logit_softcapping": 2.0}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "phi3": ("phi3", {"sliding_window": 24}),
    "gpt2": ("gpt2", {**MHA, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024}),
    "gpt_bigcode": ("gpt_bigcode", {**MHA, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024}),
    "gpt_neox": ("gpt_neox", {**MHA, "rotary_pct": 0.25}),
    "opt": ("opt", {**MHA, "ffn_dim": 128, "max_position_embeddings": 1024, "word_embed_proj_dim": 64}),
    "starcoder2": ("starcoder2", {"sliding_window": 16}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.25}),
    "olmo": ("olmo", {}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", WINDOWS),
    "granite": ("granite", {"attention_multiplier": 0.1, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "granite_swa": ("granite_swa", WINDOWS),
    "cohere": ("cohere", {"tie_word_embeddings": True}),
    "cohere2": ("cohere2", {**WINDOWS, "tie_word_embeddings": True}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "nemotron": ("nemotron", {}),
    "exaone4": ("exaone4", WINDOWS),
    "ernie4_5": ("ernie4_5", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {}),
    "seed_oss": ("seed_oss", {}),
    "arcee": ("arcee", {}),
    "apertus": ("apertus", {}),
    "bitnet": ("bitnet", {}),
    "cwm": ("cwm", WINDOWS),
    "helium": ("helium", {}),
    "hyperclovax": ("hyperclovax", {}),
    "jais2": ("jais2", {}),
    "nanochat": ("nanochat", {}),
    "persimmon": ("persimmon", MHA),
    "minicpm3": ("minicpm3", LATENT),
    "youtu": ("youtu", LATENT),
    "modernbert-decoder": ("modernbert-decoder", {**MHA, "layer_types": LAYERS, "local_attention": 16}),
    "mixtral": ("mixtral", {**MOE, "sliding_window": 16}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 48}),
    "qwen3_moe": ("qwen3_moe", MOE),
    "gpt_oss": ("gpt_oss", {**MOE, **WINDOWS}),
    "deepseek_v2": ("deepseek_v2", {**ROUTED, **LATENT}),
    "deepseek_v3": ("deepseek_v3", {**ROUTED, **LATENT, "n_group": 2, "topk_group": 2}),
    "olmoe": ("olmoe", MOE),
    "flex_olmo": ("flex_olmo", MOE),
    "phimoe": ("phimoe", MOE),
    "granitemoe": ("granitemoe", MOE),
    "granitemoe_swa": ("granitemoe_swa", {**MOE, **WINDOWS}),
    "granitemoeshared": ("granitemoeshared", {**MOE, "shared_intermediate_size": 48}),
    "glm4_moe": ("glm4_moe", ROUTED),
    "glm4_moe_lite": ("glm4_moe_lite", {**ROUTED, **LATENT}),
    "ernie4_5_moe": ("ernie4_5_moe", {**MOE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**MOE, "moe_topk": 2}),
    "cohere2_moe": ("cohere2_moe", {**MOE, **WINDOWS}),
    "exaone_moe": ("exaone_moe", {**MOE, **WINDOWS}),
    "minimax_m2": ("minimax_m2", {**MOE, "rotary_dim": 8}),
    "dots1": ("dots1", ROUTED),
    "afmoe": ("afmoe", {**MOE, **WINDOWS}),
    "hy_v3": ("hy_v3", MOE),
    "solar_open": ("solar_open", ROUTED),
    "laguna": ("laguna", MOE),
    "mellum": ("mellum", MOE),
    "flint": ("flint", {**MOE, **WINDOWS}),
    "aria_text": ("aria_text", {"moe_num_experts": 4, "moe_topk": 2}),
    # Multimodal checkpoints, which answer to text.
    "gemma3": ("gemma3", {"text_config": WINDOWS, "boi_token_index": 295, "eoi_token_index": 296} | VISION),
    "mistral3": ("mistral3", {"text_config": {"model_type": "mistral", "sliding_window": 16}} | VISION),
    "llava": ("llava", {"text_config": {"model_type": "llama"}} | VISION),
    "idefics3": ("idefics3", {"text_config": {"model_type": "llama"}} | VISION),
    "internvl": ("internvl", {"text_config": {"model_type": "qwen2"}} | VISION),
    "qwen2_vl": ("qwen2_vl", {"text_config": {"rope_parameters": MROPE}} | VISION),
    "qwen2_5_vl": ("qwen2_5_vl", {"text_config": {"rope_parameters": MROPE}} | VISION),
    "qwen3_vl": ("qwen3_vl", {"text_config": {"rope_parameters": MROPE}} | VISION),
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [2.0] * 8,
    "original_max_position_embeddings": 2048,
}
# Name -> what FAMILIES says of it, and words of the reason why it is refused.
REFUSED: dict[str, tuple[Family, str]] = {
    "phi3, longrope": (("phi3", {"rope_parameters": LONGROPE}), "longest sequence in the batch"),
    "llama4_text": (("llama4_text", {**MOE, "intermediate_size_mlp": 128}), "layers of kind chunked_attention"),
    "gemma4_text": (("gemma4_text", {}), "2 KV heads of 512 .* where config.json says 2 of 16"),
    "mimo_v2_flash": (("mimo_v2_flash", {**MOE, **WINDOWS}), "KV heads of 16 .* and 128 .values"),
    "diffllama": (("diffllama", {}), "called 6 times in a forward of 3 layers"),
    "doge": (("doge", {}), "attention masks of its own"),
    "bert": (("bert", {**MHA, "is_decoder": False}), "not causal"),
    "bloom": (("bloom", {**MHA, "n_layer": 3, "n_head": 4}), "a way of its own"),
    "gptj": (("gptj", {**MHA, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8}), "a way of its own"),
    "falcon": (("falcon", MHA), "a way of its own"),
    "mamba": (("mamba", {**MHA, "num_attention_heads": DROP}), "does not say num_attention_heads"),
    "lfm2": (("lfm2", {"layer_types": ["conv", "full_attention", "conv"]}), "layers of kind conv"),
    "granitemoehybrid": (
        ("granitemoehybrid", {**MOE, "layer_types": ["mamba", "attention", "mamba"]}),
        "layers of kind linear_attention",
    ),
    "qwen3_next": (
        ("qwen3_next", {**MOE, "linear_num_value_heads": 4, "linear_num_key_heads": 2}),
        "layers of kind linear_attention",
    ),
}


def unknown(arch: str) -> str:
    """Why the transformers that is installed cannot make it; "" where it can."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = (FAMILIES[arch] if arch in FAMILIES else REFUSED[arch][0])[0]
    return "" if family in CONFIG_MAPPING else f"transformers {transformers.__version__} has no {family}"


def make_checkpoint(arch: str, folder: Path, seed: int = 0, task: str = "generate", **overrides: Any) -> Path:
    """Write a random fp32 checkpoint of 3 layers, 4 heads on 2 KV heads, vocabulary 300; returns the folder.

    `arch` is a key of FAMILIES or REFUSED; `overrides` are configuration fields, for example `num_hidden_layers=1`.
    `task` is "generate", "classify" (`num_labels=3`) or "embed" (without a head).
    """
    import torch
    import transformers
    from transformers.models.auto import modeling_auto as auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family, own = FAMILIES[arch] if arch in FAMILIES else REFUSED[arch][0]
    fields = _fields({**own.get("text_config", own), **overrides})
    if "text_config" in own:
        fields = {**own, "text_config": fields, "tie_word_embeddings": False}
    names = {
        "generate": {**auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES},
        "classify": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "embed": auto.MODEL_MAPPING_NAMES,
    }[task]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, names[family])(CONFIG_MAPPING[family](**fields))
        for name, parameter in model.named_parameters():
            # Zeros and ones by default, which would hide their absence.
            if name.endswith("bias") or "norm" in name or "sinks" in name:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
            elif "text_config" in own:  # the wrapper draws these, and not as wide as COMMON says
                torch.nn.init.normal_(parameter, std=COMMON["initializer_range"])
    model.save_pretrained(folder)
    return folder


def _fields(own: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**COMMON, **own}.items() if value is not DROP}
