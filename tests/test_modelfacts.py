"""Model facts from config.json alone: sizes, KV bytes, special ids, fingerprints, and what errors say."""

import json
import subprocess
import sys

import pytest

from diptych.errors import ConfigError
from diptych.modelfacts import ModelFacts, locate, read_facts

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
    "bos_token_id": 1,
}


def facts_of(folder, generation=None, weights=(("model.safetensors", 100),), **config) -> ModelFacts:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    for name, size in weights:
        (folder / name).write_bytes(b"x" * size)
    return read_facts(folder)


def test_sizes(tmp_path):
    facts = facts_of(tmp_path)
    assert (facts.architecture, facts.model_type, facts.dtype) == ("LlamaForCausalLM", "llama", "bfloat16")
    assert (facts.num_layers, facts.hidden, facts.num_heads, facts.num_kv_heads) == (24, 1024, 16, 4)
    assert (facts.head_dim, facts.vocab, facts.max_positions) == (64, 32000, 8192)
    assert facts.kv_bytes_per_token() == 2 * 24 * 4 * 64 * 2
    assert facts.kv_bytes_per_token("float32") == 2 * facts.kv_bytes_per_token("bfloat16")
    with pytest.raises(ConfigError, match="unknown dtype 'float7'"):
        facts.kv_bytes_per_token("float7")


def test_explicit_head_dim_and_defaults(tmp_path):
    facts = facts_of(tmp_path, head_dim=128, num_key_value_heads=None, torch_dtype=None, dtype="float16")
    assert (facts.head_dim, facts.num_kv_heads, facts.dtype) == (128, 16, "float16")


def test_kv_shape_of_latent_and_multi_query_attention(tmp_path):
    facts = facts_of(tmp_path, qk_nope_head_dim=128, qk_rope_head_dim=64, head_dim=64)
    assert (facts.num_kv_heads, facts.head_dim) == (16, 192)
    facts = facts_of(tmp_path, multi_query=True, num_key_value_heads=None)
    assert (facts.num_kv_heads, facts.head_dim) == (1, 64)


def test_parameters_are_those_of_the_real_class(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name, tied in (("LlamaConfig", False), ("Qwen3Config", True)):
        facts = facts_of(tmp_path, tie_word_embeddings=tied, num_hidden_layers=2, head_dim=96)
        config = {k: v for k, v in json.loads((tmp_path / "config.json").read_text()).items() if "type" not in k}
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**config))
        assert facts.num_params == pytest.approx(model.num_parameters(), rel=0.001)
        assert facts.weight_bytes("float32") == 4 * facts.num_params


def test_mixture_of_experts_counts_every_expert(tmp_path):
    dense = facts_of(tmp_path, moe_intermediate_size=512).num_params
    experts = facts_of(tmp_path, moe_intermediate_size=512, num_experts=16).num_params
    assert experts - dense == 24 * (3 * 1024 * (16 * 512 - 4096) + 16 * 1024)


def test_special_ids_come_from_the_generation_config_first(tmp_path):
    assert facts_of(tmp_path).eos_ids == (2,)
    facts = facts_of(tmp_path, generation={"eos_token_id": [7, 8], "temperature": 0.6})
    assert facts.eos_ids == (7, 8) and facts.bos_id == 1
    assert facts_of(tmp_path, generation={}, eos_token_id=None, bos_token_id=None).eos_ids == ()
    assert read_facts(tmp_path).bos_id is None


def test_a_nested_language_model_is_found(tmp_path):
    inner = {k: v for k, v in LLAMA.items() if k not in ("architectures", "model_type")}
    outer = {"architectures": ["XForConditionalGeneration"], "model_type": "x", "text_config": inner}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    facts = read_facts(tmp_path)
    assert facts.num_layers == 24 and facts.architecture == "XForConditionalGeneration"


def test_fingerprints_change_with_configuration_and_weights(tmp_path):
    same = [facts_of(tmp_path / name).fingerprint for name in ("a", "b")]
    assert same[0] == same[1]
    others = [
        facts_of(tmp_path / "c", rope_theta=1e6).fingerprint,
        facts_of(tmp_path / "d", weights=[("model.safetensors", 101)]).fingerprint,
        facts_of(tmp_path / "e", weights=[("other.safetensors", 100)]).fingerprint,
    ]
    assert len({same[0], *others}) == 4
    (tmp_path / "a" / "README.md").write_text("no matter")
    assert read_facts(tmp_path / "a").fingerprint == same[0]


def test_what_a_checkpoint_is_for(tmp_path):
    facts = facts_of(tmp_path)
    assert (facts.task, facts.labels, facts.pooling, facts.matryoshka) == ("generate", (), "last", None)
    assert facts_of(tmp_path, architectures=["GPT2LMHeadModel"]).task == "generate"
    assert facts_of(tmp_path, architectures=["MistralModel"]).task == "embed"
    classifier = {"architectures": ["LlamaForSequenceClassification"]}
    named = facts_of(tmp_path, **classifier, id2label={"1": "good", "0": "bad"})
    assert (named.task, named.labels) == ("classify", ("bad", "good"))
    assert facts_of(tmp_path, **classifier).labels == ("LABEL_0", "LABEL_1"), "transformers leaves the default out"
    assert facts_of(tmp_path, is_matryoshka=True).matryoshka == ()
    assert facts_of(tmp_path, matryoshka_dimensions=[64, 256]).matryoshka == (64, 256)


def test_pooling_is_what_sentence_transformers_recorded(tmp_path):
    def pooling(*kinds, **said):
        modules = [
            {"idx": i, "path": f"{i}_{k}", "type": f"sentence_transformers.models.{k}"} for i, k in enumerate(kinds)
        ]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        (tmp_path / "1_Pooling").mkdir(exist_ok=True)
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 8, **said}))
        return facts_of(tmp_path).pooling

    mean = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    assert pooling("Transformer", "Pooling", "Normalize", **mean) == "mean"
    assert pooling("Transformer", "Pooling", pooling_mode_lasttoken=True) == "last"
    assert pooling("Transformer", "Pooling", pooling_mode_cls_token=True) == ""
    assert pooling("Transformer", "Pooling", pooling_mode_lasttoken=True, **mean) == ""
    assert pooling("Transformer", "Pooling", "Dense", **mean) == "", "a projection that is not here"


def test_errors_say_what_to_change(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="has no config.json; --model wants a checkpoint folder"):
        read_facts(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        read_facts(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        read_facts(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not say num_attention_heads"):
        read_facts(tmp_path)


def test_a_name_that_is_not_to_be_had(monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def refuse(name, **_):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ConfigError, match="'nobody/nothing' is neither a checkpoint folder nor .* no network"):
        locate("nobody/nothing")


def test_a_hub_name_becomes_its_snapshot_folder(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    facts_of(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path))
    assert read_facts("somebody/something").folder == str(tmp_path)


def test_reading_imports_nothing_heavy():
    code = (
        "import sys, diptych.modelfacts\n"
        "assert not {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules), sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
