"""Decoder layers of the commonest kind, each computed by one native call in steps of few tokens.

A layer is recognised by its parts (`native/layer.h` writes the kind out), and then tried: random input through the
library's own code and through ours, at positions up to the model's last. Where the two differ, or a layer has parts of
another kind, it stays as it is and only speed is lost. The library's code also stays for steps with longer pieces of
prompt. Not responsible for the arithmetic, nor for linear layers outside such layers (`linears.py`).
"""

import ctypes
import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diptych.engine import kernels
from diptych.engine.attention import Batch, PagedKV, current_batch, forward_context, lay_out
from diptych.engine.executor import Sampling
from diptych.engine.features import Features
from diptych.engine.linears import StreamedLinear, most_rows
from diptych.engine.sequence import Piece, Sequence
from diptych.modelfacts import ModelFacts

log = logging.getLogger(__name__)

_LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
_NORMS = {"norm_before": "input_layernorm", "norm_after": "post_attention_layernorm"}
_HEAD_NORMS = {"norm_query": "self_attn.q_norm", "norm_key": "self_attn.k_norm"}
_ACTIVATIONS = {"SiLUActivation": 0, "SiLU": 0, "GELUTanh": 1}
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.03}  # root mean square of the difference over that of the change
_TRIAL = ((5, 5), (1, 9), (1, 1))  # (new tokens, tokens with them) of the sequences that a layer is tried on


class FusedLayer:
    """One layer's forward: natively where the step allows it, otherwise as the library wrote it."""

    def __init__(self, layer: Any, features: Features, number: int) -> None:
        self._original = layer.forward
        self._layer = layer  # holds what `args` points to
        self._hidden = layer.mlp.down_proj.out_features
        self._dtype = layer.mlp.down_proj.dtype
        self._most_rows = most_rows(self._dtype)
        self._sinks = None if features.sinks is None else features.sinks.float().contiguous()
        self._args = _layer_args(layer, features, number, self._sinks)
        self._call = kernels.CallArgs()
        self._addresses = ctypes.addressof(self._args), ctypes.addressof(self._call)

    def forward(self, hidden_states: Tensor, *args: Any, position_embeddings: Any = None, **kwargs: Any) -> Any:
        """As the layer's own forward: hidden states [1, tokens, hidden] -> the same."""
        batch = current_batch()
        if batch is None or not self._can(batch, hidden_states, position_embeddings):
            return self._original(hidden_states, *args, position_embeddings=position_embeddings, **kwargs)
        return self.compute(batch, hidden_states, *position_embeddings)

    def compute(self, batch: Batch, hidden_states: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        """The native call; cosines and sines [1, tokens, rotary]."""
        step = batch.store
        assert isinstance(step, kernels.NativeStep)
        out = torch.empty_like(hidden_states)
        call = self._call
        call.x, call.y = hidden_states.data_ptr(), out.data_ptr()
        call.cosines, call.sines, call.rotary = cosines.data_ptr(), sines.data_ptr(), cosines.shape[-1]
        layer_at, call_at = self._addresses
        if step.kernel.lib.diptych_layer(layer_at, ctypes.addressof(step.args), call_at):
            raise MemoryError("decoder layer: no memory for its buffers")
        batch.num_calls += 1
        return out

    def _can(self, batch: Batch, x: Tensor, embeddings: Any) -> bool:
        """The last gate before raw addresses."""
        if not batch.fusable or batch.segments or type(batch.store) is not kernels.NativeStep:
            return False
        num, args = batch.store.args.num_tokens, self._args
        if not num <= self._most_rows or x.shape != (1, num, self._hidden) or not args.layer < batch.kv.num_layers:
            return False
        if type(embeddings) is not tuple or len(embeddings) != 2:
            return False
        cosines, sines = embeddings
        same = x.dtype == cosines.dtype == sines.dtype == batch.kv.dtype == self._dtype
        shaped = cosines.shape == sines.shape == (1, num, cosines.shape[-1]) and cosines.shape[-1] <= batch.kv.dim
        whole = x.is_contiguous() and cosines.is_contiguous() and sines.is_contiguous()
        heads = args.key.rows == args.value.rows == batch.kv.num_heads * batch.kv.dim
        return same and shaped and whole and heads and args.query.rows % args.key.rows == 0


def fuse_layers(module: nn.Module, facts: ModelFacts, dtype: torch.dtype) -> int:
    """Fuse what layers of a model can be fused, in place; returns how many."""
    layers = [part for part in module.modules() if _is_known(part)]
    if not layers or dtype not in _TOLERANCE:
        return 0
    trial = _Trial(facts, dtype)
    num_fused = sum(trial.passes(layer) for layer in layers)
    if num_fused < len(layers):
        log.info("%d of %d decoder layers stay as they are", len(layers) - num_fused, len(layers))
    return num_fused


def _is_known(layer: nn.Module) -> bool:
    """Whether a layer has exactly the parts of the kind."""
    parts = dict(layer.named_modules())
    if not all(type(parts.get(name)) is StreamedLinear for name in _LINEARS.values()):
        return False
    norms = [name for name in (*_NORMS.values(), *_HEAD_NORMS.values()) if name in parts]
    if not set(_NORMS.values()) <= set(norms) or not all(_is_norm(parts[name]) for name in norms):
        return False
    known = {f"{name}.weight" for name in (*_LINEARS.values(), *norms)} | {f"{name}.bias" for name in _LINEARS.values()}
    activation = type(getattr(parts["mlp"], "act_fn", None)).__name__
    return {name for name, _ in layer.named_parameters()} <= known and activation in _ACTIVATIONS


def _is_norm(norm: Any) -> bool:
    return isinstance(getattr(norm, "variance_epsilon", None), float) and norm.weight.is_contiguous()


def _layer_args(layer: Any, features: Features, number: int, sinks: Tensor | None) -> kernels.LayerArgs:
    parts = dict(layer.named_modules())
    args = kernels.LayerArgs(**{field: parts[name].args for field, name in _LINEARS.items()})
    for field, name in (_NORMS | _HEAD_NORMS).items():
        if name in parts:
            setattr(args, field, parts[name].weight.data_ptr())
    args.activation = _ACTIVATIONS[type(layer.mlp.act_fn).__name__]
    args.epsilon = layer.input_layernorm.variance_epsilon
    args.layer, args.window, args.scale = number, features.window or 0, features.scale
    args.softcap = features.softcap or 0.0
    args.sinks = None if sinks is None else sinks.data_ptr()
    return args


class _Trial:
    """Random input, and a scratch pool over which layers are tried on it."""

    def __init__(self, facts: ModelFacts, dtype: torch.dtype) -> None:
        random = torch.Generator().manual_seed(0)
        self.facts, self.dtype = facts, dtype
        widest = max(length for _, length in _TRIAL)
        shape = (len(_TRIAL), facts.num_layers, 2, facts.num_kv_heads, widest, facts.head_dim)
        self.kv = PagedKV(torch.randn(shape, generator=random).to(dtype))
        num_tokens = sum(count for count, _ in _TRIAL)
        self._random = random
        self.positions = torch.linspace(0, facts.max_positions - 1, num_tokens).long()[None]

    def batch(self) -> Batch:
        pieces = [
            Piece(i, Sequence([0] * length, length, Sampling()), length - count, count, np.array([i], np.int32), True)
            for i, (count, length) in enumerate(_TRIAL)
        ]
        return lay_out(pieces, self.kv)

    def passes(self, layer: Any) -> bool:
        """Try a layer, and fuse it where it computes what it should."""
        num, dim = self.positions.shape[1], self.facts.head_dim
        hidden = layer.mlp.down_proj.out_features
        x = torch.randn(1, num, hidden, generator=self._random).to(self.dtype)
        angles = torch.rand(1, num, dim // 2, generator=self._random).mul(6.3).repeat(1, 1, 2)
        embeddings = angles.cos().to(self.dtype), angles.sin().to(self.dtype)
        batch = self.batch()
        batch.fusable = False
        try:
            with torch.inference_mode(), forward_context(batch):
                theirs = layer(x, attention_mask=None, position_ids=self.positions, position_embeddings=embeddings)
            ((number, features),) = batch.asked.items()
            fused = FusedLayer(layer, features, number)
            with torch.inference_mode(), forward_context(again := self.batch()):
                ours = fused.forward(x, position_embeddings=embeddings)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            log.info("a decoder layer stays as it is: %s", error)
            return False
        if not isinstance(theirs, Tensor) or not again.num_calls or not self._close(x, ours, theirs):
            return False
        layer.forward = fused.forward
        return True

    def _close(self, x: Tensor, ours: Tensor, theirs: Tensor) -> bool:
        change = theirs.float() - x.float()
        error = (ours.float() - theirs.float()).norm() / change.norm().clamp_min(1e-12)
        return bool(error <= _TOLERANCE[self.dtype])
