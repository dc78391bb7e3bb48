"""What must be known of a model before anything is loaded: sizes, KV bytes, special ids, a fingerprint.

Read from a checkpoint folder's `config.json` and `generation_config.json` with the standard library alone, so that
processes that never import torch (API, router, planner) can size pools and salt hashes. Not responsible for
judging whether the engine can run the model (`engine/adapter.py`), nor for tokenizers (`serve/text.py`).
"""

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

from diptych.errors import ConfigError, UnsupportedModel

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1, "int8": 1}
WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin")

Task = Literal["generate", "embed", "classify"]
"""What a checkpoint is for, by its class: a language model (which embeds too), one without a head, a classifier."""

# What families call the same thing in config.json; the first name present counts.
_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model"),
    "num_heads": ("num_attention_heads", "n_head", "num_heads"),
    "vocab": ("vocab_size",),
}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A checkpoint in numbers. `dtype` is the one its weights are stored in; `num_params` is an estimate."""

    folder: str
    architecture: str  # class name, for example LlamaForCausalLM
    model_type: str  # family, for example llama
    num_layers: int
    hidden: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    dtype: str
    num_params: int
    eos_ids: tuple[int, ...]
    bos_id: int | None
    fingerprint: str  # hex; changes with the configuration and with the weight files' names and sizes
    task: Task
    labels: tuple[str, ...]  # of a classifier, by index
    pooling: str  # how a vector is made of a text: "last", "mean", or "" for a way that is not known here
    matryoshka: tuple[int, ...] | None  # shorter vectors it was trained for: None no, () any length

    def kv_bytes_per_token(self, dtype: str | None = None) -> int:
        """Bytes of keys and values that one token leaves in all layers, stored as `dtype` (default: the weights')."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes(dtype or self.dtype)

    def weight_bytes(self, dtype: str | None = None) -> int:
        """Bytes that the weights take, stored as `dtype` (an estimate, as `num_params` is)."""
        return self.num_params * dtype_bytes(dtype or self.dtype)


def dtype_bytes(dtype: str) -> int:
    """Bytes of one value of a dtype given by name; ConfigError where the name is unknown."""
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPE_BYTES)}")
    return DTYPE_BYTES[dtype]


def read_facts(model: str | Path) -> ModelFacts:
    """The facts of a checkpoint: a folder, or a hub name (see `locate`). ConfigError says what to change."""
    folder = locate(model)
    outer = _read_json(folder / "config.json")
    # A multimodal checkpoint nests its language model; what that part does not say, the outer file does.
    config = {**outer, **outer.get("text_config", {})}
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    if outer.get("is_encoder_decoder"):
        raise UnsupportedModel(f"{folder} is an encoder-decoder model; only decoder-only language models can be served")
    architecture = (outer.get("architectures") or ["?"])[0]
    task = _task(architecture)
    num_heads = _required(config, "num_heads", folder)
    hidden = _required(config, "hidden", folder)
    num_kv_heads, head_dim = _kv_shape(config, num_heads, hidden)
    return ModelFacts(
        folder=str(folder),
        architecture=architecture,
        model_type=outer.get("model_type", "?"),
        num_layers=_required(config, "num_layers", folder),
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab=_required(config, "vocab", folder),
        max_positions=config.get("max_position_embeddings") or config.get("n_positions") or 2048,
        dtype=_dtype(config),
        num_params=_estimate_params(config, hidden, num_heads),
        eos_ids=_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
        bos_id=next(iter(_ids(generation.get("bos_token_id", config.get("bos_token_id")))), None),
        fingerprint=_fingerprint(folder),
        task=task,
        labels=_labels(outer) if task == "classify" else (),
        pooling=_pooling(folder),
        matryoshka=_matryoshka(config),
    )


def num_tokens(model: str | Path) -> int:
    """How many ids the tokenizer of a checkpoint knows; it may be fewer than the model's vocabulary has."""
    path = locate(model) / "tokenizer.json"
    found = _read_json(path)
    words, added = found.get("model", {}).get("vocab", {}), found.get("added_tokens", [])
    try:
        ids = [entry["id"] for entry in added] + (list(words.values()) if isinstance(words, dict) else [len(words) - 1])
        return int(max(ids, default=-1)) + 1
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{path} is no tokenizer that we can read") from None


def locate(model: str | Path) -> Path:
    """The local folder of a checkpoint. A name that is no folder is looked up on the Hugging Face hub (and cached)."""
    folder = Path(model).expanduser()
    if (folder / "config.json").is_file():
        return folder
    if not folder.exists() and str(model).startswith(("/", "./", "../", "~")):
        raise ConfigError(f"{model}: no such folder")
    if folder.exists():
        raise ConfigError(f"{folder} has no config.json; --model wants a checkpoint folder or a hub name")
    return _download(str(model))


def _download(name: str) -> Path:
    """A hub repository's snapshot: from the cache where it is complete, otherwise over the network."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ConfigError(f"{name} is no folder, and huggingface_hub is not installed to look it up") from error
    wanted = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # the client has a dozen kinds: no such name, no network, gated, bad syntax
        raise ConfigError(f"{name!r} is neither a checkpoint folder nor to be had from the hub: {error}") from error


def _read_json(path: Path, kind: type = dict) -> Any:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; is this a checkpoint folder?") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, kind):
        raise ConfigError(f"{path} should hold a JSON {'object' if kind is dict else 'array'}")
    return value


def _required(config: dict[str, Any], fact: str, folder: Path) -> int:
    for name in _NAMES[fact]:
        if isinstance(config.get(name), int):
            return int(config[name])
    raise ConfigError(
        f"{folder}/config.json does not say {_NAMES[fact][0]}; is this a decoder-only language model with attention?"
    )


def _kv_shape(config: dict[str, Any], num_heads: int, hidden: int) -> tuple[int, int]:
    """KV heads, and the width of a key in each."""
    if config.get("qk_nope_head_dim"):  # latent attention: kept as the full keys and values it expands to
        return num_heads, int(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    head_dim = config.get("head_dim") or hidden // num_heads
    if "multi_query" in config:  # GPTBigCode
        return 1 if config["multi_query"] else num_heads, head_dim
    return config.get("num_key_value_heads") or num_heads, head_dim


def _dtype(config: dict[str, Any]) -> str:
    """The stored dtype. `torch_dtype` is what transformers wrote before version 5; without either it is float32."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype_bytes(dtype)
    return dtype


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    match value:
        case None:
            return ()
        case int():
            return (value,)
        case _:
            return tuple(value)


def _task(architecture: str) -> Task:
    if architecture.endswith("ForSequenceClassification"):
        return "classify"
    bare = architecture.endswith("Model") and not architecture.endswith("LMHeadModel")
    return "embed" if bare else "generate"


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    """A classifier's labels. transformers writes `id2label` unless there are two of them without names."""
    named = config.get("id2label")
    if named:
        return tuple(str(named[key]) for key in sorted(named, key=int))
    return tuple(f"LABEL_{i}" for i in range(config.get("num_labels", 2)))


def _pooling(folder: Path) -> str:
    """How a vector is made of a text, as sentence-transformers records it; the last token's where nothing is said."""
    if not (folder / "modules.json").is_file():
        return "last"
    modules = _read_json(folder / "modules.json", list)
    kinds = [str(module.get("type")).rpartition(".")[2] for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        return ""
    pooling = _read_json(folder / str(modules[1].get("path")) / "config.json")
    chosen = [name for name, on in pooling.items() if name.startswith("pooling_mode_") and on]
    return {"pooling_mode_lasttoken": "last", "pooling_mode_mean_tokens": "mean"}.get("+".join(chosen), "")


def _matryoshka(config: dict[str, Any]) -> tuple[int, ...] | None:
    """As vLLM reads it: `matryoshka_dimensions`, or `is_matryoshka` for any."""
    if config.get("matryoshka_dimensions"):
        return tuple(config["matryoshka_dimensions"])
    return () if config.get("is_matryoshka") else None


def _estimate_params(config: dict[str, Any], hidden: int, num_heads: int) -> int:
    """Parameters of a Llama-like decoder of these sizes: projections, gated MLP or experts, embeddings, norms."""
    layers = next(config[name] for name in _NAMES["num_layers"] if name in config)
    head_dim = config.get("head_dim") or hidden // num_heads
    kv_width = (config.get("num_key_value_heads") or num_heads) * head_dim
    attention = 2 * hidden * num_heads * head_dim + 2 * hidden * kv_width
    experts = config.get("num_local_experts") or config.get("num_experts") or 0
    width = config.get("moe_intermediate_size") if experts else None
    mlp = 3 * hidden * (width or config.get("intermediate_size") or 4 * hidden) * max(experts, 1) + hidden * experts
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings", False) else 2)
    return int(layers * (attention + mlp + 2 * hidden) + embeddings + hidden)


def _fingerprint(folder: Path) -> str:
    """blake2b-128 over config.json and the weight files' names and sizes: cheap, and new weights rarely keep both."""
    digest = blake2b((folder / "config.json").read_bytes(), digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.name.endswith(WEIGHT_SUFFIXES):
            digest.update(f"\0{path.name}\0{path.stat().st_size}".encode())
    return digest.hexdigest()
