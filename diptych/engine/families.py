"""Which class of transformers runs a checkpoint, and why not: what can be told before its weights are read.

Any decoder-only family whose class calls transformers' attention interface is let through; whether it then computes
what it should is for `probe.py` to find. transformers is imported here when a model is loaded, and of it only what
the family needs. Not responsible for loading (`adapter.py`).
"""

from collections.abc import Iterator
from typing import Any

from diptych.errors import ConfigError, UnsupportedModel
from diptych.modelfacts import ModelFacts

# Rotary tables that depend on the longest sequence of a forward: in a shared batch they would couple strangers.
_BATCH_DEPENDENT_ROPE = ("dynamic", "longrope")
# Kinds of layers that attend to all, or to the latest, tokens of their own sequence.
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# Classes that call transformers' attention interface, and do not say so in `_supports_attention_backend`.
_CALLS_IT_ANYWAY = {"StableLmForCausalLM"}
_KINDS = {"generate": "language model", "classify": "sequence classification", "embed": "headless model"}


def class_of(facts: ModelFacts) -> tuple[Any, Any]:
    """transformers' class for a checkpoint, and its configuration. ConfigError, UnsupportedModel with the reason."""
    model_class = _find_class(facts)
    try:
        config = model_class.config_class.from_pretrained(facts.folder, local_files_only=True)
    except Exception as error:  # a family's configuration may check itself in any way
        raise ConfigError(f"{facts.folder}/config.json cannot be read: {error}") from error
    text = config.get_text_config()
    if reasons := [*_reasons_of_config(text), *_reasons_of_class(model_class)]:
        raise UnsupportedModel(f"{facts.folder} ({facts.model_type}) is not supported: {'; '.join(reasons)}")
    return model_class, config


def _find_class(facts: ModelFacts) -> Any:
    try:
        import transformers
        from transformers.models.auto import modeling_auto as auto
    except ImportError as error:
        raise ConfigError(f"transformers cannot be imported ({error}); install diptych[torch]") from error
    names: dict[str, Any] = {
        # A multimodal checkpoint runs in its own class too, and is never shown an image.
        "generate": {**auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, **auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES},
        "classify": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "embed": auto.MODEL_MAPPING_NAMES,
    }
    name = names[facts.task].get(facts.model_type)
    if name is None:
        raise UnsupportedModel(
            f"{facts.folder} is a {facts.model_type!r} model ({facts.architecture}), for which transformers "
            f"{transformers.__version__} has no {_KINDS[facts.task]} class"
        )
    if facts.architecture != name and not facts.architecture.endswith("ForCausalLM"):
        raise UnsupportedModel(f"{facts.folder} is a {facts.architecture}, not a {_KINDS[facts.task]} ({name})")
    return getattr(transformers, name)


def _reasons_of_config(config: Any) -> Iterator[str]:
    if getattr(config, "is_encoder_decoder", False):
        yield "it has an encoder, or is half of such a model"
    if not getattr(config, "is_causal", True):
        yield "it is not causal"
    if getattr(config, "quantization_config", None):
        yield "its weights are quantized"
    for rope in _ropes(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type") in _BATCH_DEPENDENT_ROPE:
            yield f"its rotary scaling {rope['rope_type']!r} depends on the longest sequence in the batch"
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - _LAYER_TYPES):
        yield f"it has layers of kind {', '.join(others)}, and only attention to all or to the latest tokens is there"


def _ropes(parameters: Any) -> Iterator[dict[str, Any]]:
    """The rotary parameters: one set, or one for each kind of layer."""
    if isinstance(parameters, dict):
        yield parameters
        yield from (each for each in parameters.values() if isinstance(each, dict))


def _reasons_of_class(model_class: Any) -> Iterator[str]:
    """Some classes say that they do not call the attention interface; the probe counts the calls of the others."""
    if not model_class._supports_attention_backend and model_class.__name__ not in _CALLS_IT_ANYWAY:
        yield f"{model_class.__name__} attends, or mixes tokens, in a way of its own: a paged KV pool cannot serve it"
