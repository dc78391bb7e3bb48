"""Loads a checkpoint into transformers' own model class, with our attention inside.

What would come out wrong is refused with the reason: `families.py` reads what configuration and class say, missing
weights are noticed here, and `probe.py` runs a few tokens. These three, and `features.py`, are all that knows
transformers. Not responsible for attention itself, batching or sampling.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diptych.engine import kernels
from diptych.engine.attention import Batch, forward_context, paged_attention
from diptych.engine.families import class_of
from diptych.engine.fusion import fuse_layers
from diptych.engine.linears import stream_linears
from diptych.engine.packing import pack_linears
from diptych.errors import ConfigError, UnsupportedModel
from diptych.modelfacts import ModelFacts, dtype_bytes, read_facts

ATTENTION = "diptych_paged"


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded checkpoint: `module` is transformers' class, with our attention selected."""

    facts: ModelFacts
    module: Any
    dtype: torch.dtype
    device: torch.device

    def logits(self, batch: Batch, keep: list[int]) -> Tensor:
        """One forward over a laid-out step; writes its KV. Returns logits [len(keep), vocab] of those tokens."""
        with torch.inference_mode(), forward_context(batch):
            rows = torch.tensor(keep, dtype=torch.long, device=self.device)
            return self._forward(batch.token_ids, batch.positions, rows)

    def hidden(self, batch: Batch) -> Tensor:
        """The same forward without a head: the final hidden states [tokens, hidden], in the batch's order."""
        with torch.inference_mode(), forward_context(batch):
            return self._body(batch.token_ids, batch.positions)

    def labels(self, state: Tensor) -> Tensor:
        """What a classifier says of a hidden state [hidden]: [labels], before any activation."""
        with torch.inference_mode():
            found: Tensor = self.module.score(state.to(self.dtype))
            return found

    def reference_logits(self, token_ids: list[int]) -> Tensor:
        """Logits [tokens, vocab] of one sequence with the model's own eager attention and masks: the probe's truth."""
        ids = torch.tensor(token_ids, device=self.device)
        positions = torch.arange(len(token_ids), device=self.device)
        with torch.inference_mode(), _attention(self.module, "eager"):
            return self._forward(ids, positions, positions)

    def _body(self, ids: Tensor, positions: Tensor) -> Tensor:
        body = self.module.base_model  # a model without a head is its own
        out = body(input_ids=ids[None], position_ids=positions[None], use_cache=False, return_dict=True)
        states: Tensor = out.last_hidden_state[0]
        return states

    def _forward(self, ids: Tensor, positions: Tensor, keep: Tensor) -> Tensor:
        if self.facts.task != "generate":  # for the probe: labels, or the states themselves, are as telling as logits
            states = self._body(ids, positions)[keep]
            return self.labels(states) if self.facts.task == "classify" else states
        out = self.module(
            input_ids=ids[None], position_ids=positions[None], use_cache=False, logits_to_keep=keep, return_dict=True
        )
        logits: Tensor = out.logits[0]
        return logits


def load(
    model: str | Path,
    dtype: str | None = None,
    device: str = "cpu",
    probe: bool = True,
    quantize: Literal["int8"] | None = None,
) -> Model:
    """Load a folder or hub name as `dtype` (default: as stored). Raises ConfigError, UnsupportedModel.

    `quantize` is how linear layers keep their weights (`linears.py`). Devices other than the CPU are untested.
    """
    facts = read_facts(model)
    dtype = dtype or facts.dtype
    dtype_bytes(dtype)
    torch_dtype = getattr(torch, dtype)
    if not torch_dtype.is_floating_point:
        raise ConfigError(f"a model cannot compute in {dtype}; use float32 or bfloat16")
    module = _load_module(facts, torch_dtype).to(device)
    if facts.task == "classify" and not hasattr(module, "score"):
        raise UnsupportedModel(f"{facts.folder} is not supported: its head is more than one 'score' matrix")
    loaded = Model(facts, module, torch_dtype, torch.device(device))
    _quicken(loaded, quantize)
    if probe:
        from diptych.engine.probe import check  # it needs Model

        check(loaded)
    return loaded


def _quicken(model: Model, quantize: str | None) -> None:
    """Replace what can be computed faster, or kept smaller, than the library does it."""
    known = model.device.type == "cpu" and model.dtype in (torch.float32, torch.bfloat16)
    lib = kernels.best() if known else None
    if lib is None and quantize:
        raise ConfigError(f"weights in {quantize} need the native kernels, float32 or bfloat16, and the CPU")
    with torch.inference_mode():
        if lib is None:
            pack_linears(model.module)
        else:
            stream_linears(model.module, lib, quantize == "int8")
            fuse_layers(model.module, model.facts, model.dtype)


def _load_module(facts: ModelFacts, dtype: torch.dtype) -> Any:
    model_class, config = class_of(facts)
    _register()
    try:
        module, info = model_class.from_pretrained(
            facts.folder,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ConfigError(f"{facts.folder} cannot be loaded: {error}") from error
    # transformers fills what is missing with random numbers and warns; a server must not.
    if lacking := sorted({*info["missing_keys"], *map(str, info["mismatched_keys"])}):
        raise ConfigError(f"{facts.folder} lacks weights, or has them in another shape: {', '.join(lacking[:5])}")
    return module.eval().requires_grad_(False)


def _register() -> None:
    """Make our attention selectable by name. No mask function goes with it: transformers then makes no masks."""
    from transformers import AttentionInterface
    from transformers.utils import logging

    AttentionInterface.register(ATTENTION, paged_attention)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # a worker's stderr is a log


@contextmanager
def _attention(module: Any, name: str) -> Iterator[None]:
    """Select another attention function for a while."""
    module.config._attn_implementation = name
    try:
        yield
    finally:
        module.config._attn_implementation = ATTENTION
