"""Decoder layers of the commonest kind are computed natively, and compute what the library's code does; others stay."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from checkpoints import make_checkpoint  # noqa: E402

from diptych.engine import adapter, fusion, kernels  # noqa: E402
from diptych.engine.attention import PagedKV, lay_out  # noqa: E402
from diptych.engine.executor import Sampling  # noqa: E402
from diptych.engine.fusion import FusedLayer  # noqa: E402
from diptych.engine.sequence import Piece, Sequence  # noqa: E402
from diptych.transfer.native import build  # noqa: E402

pytestmark = [
    pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler here"),
    pytest.mark.filterwarnings("default"),  # transformers has its say about tiny vocabularies
]
KNOWN = ["llama", "llama, wide heads, biases", "qwen2, window", "qwen3", "mistral, window"]
OTHERS = ["gemma2", "olmo2", "granite", "mixtral", "gpt2", "phi3"]
IDS = list(range(3, 40))


def num_fused(model: adapter.Model) -> int:
    return sum(isinstance(getattr(part.forward, "__self__", None), FusedLayer) for part in model.module.modules())


def logits(model: adapter.Model, cuts: tuple[int, ...], fusable: bool) -> torch.Tensor:
    """Of a sequence computed in pieces, its blocks in reverse order."""
    facts = model.facts
    kv = PagedKV(torch.zeros(5, facts.num_layers, 2, facts.num_kv_heads, 8, facts.head_dim, dtype=model.dtype))
    table, sequence, found = np.arange(5, dtype=np.int32)[::-1].copy(), Sequence(IDS, len(IDS), Sampling()), []
    for start, end in zip(cuts, cuts[1:], strict=False):
        batch = lay_out([Piece(0, sequence, start, end - start, table[: -(-end // 8)], True)], kv)
        batch.fusable = fusable
        found.append(model.logits(batch, list(range(end - start))))
        assert batch.num_calls == facts.num_layers
        assert (batch.asked == {}) == fusable, "a fused layer does not ask for attention"
    return torch.cat(found)


@pytest.mark.parametrize("level", kernels.levels_here())
@pytest.mark.parametrize("name", KNOWN)
def test_a_fused_model_gives_the_same_logits(name, level, tmp_path, monkeypatch):
    """In one piece and in several; the probe's tolerance is wider."""
    monkeypatch.setattr(kernels, "WANTED", level)
    monkeypatch.setattr(kernels, "multiplies_best", lambda *_: True)  # prompts too
    model = adapter.load(make_checkpoint(name, tmp_path))
    assert num_fused(model) == model.facts.num_layers
    for cuts in ((0, 37), (0, 5, 15, 36, 37)):
        wanted, got = (logits(model, cuts, fusable) for fusable in (False, True))
        assert (got - wanted).abs().max() < 1e-4 * wanted.abs().max(), cuts


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_kinds_stay_as_they_are(name, tmp_path):
    assert num_fused(adapter.load(make_checkpoint(name, tmp_path))) == 0


@pytest.mark.parametrize("wrong", ["epsilon", "activation", "scale", "window"])
def test_a_layer_that_comes_out_otherwise_is_not_fused(wrong, tmp_path, monkeypatch):
    made = fusion._layer_args

    def bent(*args):
        found = made(*args)
        setattr(found, wrong, {"epsilon": 0.5, "activation": 1, "scale": 1.0, "window": 2}[wrong])
        return found

    monkeypatch.setattr(fusion, "_layer_args", bent)
    assert num_fused(adapter.load(make_checkpoint("llama", tmp_path))) == 0


def test_a_layer_that_only_late_positions_change_is_not_fused(tmp_path):
    """The trial's positions go up to the model's last: queries that grow from position 1024 on are noticed."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
    late = make_checkpoint("ministral3", tmp_path, rope_parameters={**rope, "llama_4_scaling_beta": 0.1})
    assert num_fused(adapter.load(late)) == 0


def test_int8_layers_are_fused_and_say_nearly_the_same(tmp_path):
    folder = make_checkpoint("llama", tmp_path)
    whole, small = adapter.load(folder), adapter.load(folder, quantize="int8")
    assert num_fused(small) == small.facts.num_layers
    wanted, got = (logits(model, (0, 5, 6, 7), True) for model in (whole, small))
    assert 0 < (got - wanted).norm() < 0.05 * wanted.norm()


def test_steps_that_are_not_wholly_native_go_through_the_librarys_code(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "multiplies_best", lambda *_: False)
    model = adapter.load(make_checkpoint("llama", tmp_path))
    assert logits(model, (0, 5), True).shape == (5, 300)
    with pytest.raises(AssertionError, match="does not ask"):
        logits(model, (0, 37), True)  # a long piece is torch's here
