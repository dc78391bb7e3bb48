"""Packed linear layers compute what the plain ones do, or are not used."""

import gc
import weakref

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from diptych.engine import packing  # noqa: E402
from diptych.engine.packing import PackedLinear, pack_linears  # noqa: E402


def has_operators() -> bool:
    with torch.inference_mode():
        return packing._works(nn.Linear(8, 8, dtype=torch.bfloat16))


needs_operators = pytest.mark.skipif(not has_operators(), reason="this torch has no packed linear layers here")


class Model(nn.Module):
    """An embedding tied to the head, layers with and without bias, and one layer used in two places."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.embed = nn.Embedding(50, 48, dtype=dtype)
        self.up, self.down = nn.Linear(48, 100, dtype=dtype), nn.Linear(100, 48, bias=False, dtype=dtype)
        self.again = self.down
        self.head = nn.Linear(48, 50, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.again(self.up(self.down(self.up(self.embed(ids)).relu())).relu()))


def model(dtype: torch.dtype = torch.bfloat16) -> Model:
    torch.manual_seed(0)
    return Model(dtype).eval().requires_grad_(False)


@needs_operators
@pytest.mark.parametrize("shape", [(1,), (1, 1), (1, 7), (3, 40)])
def test_packed_layers_compute_the_same(shape):
    plain, packed = model(), model()
    assert pack_linears(packed) == 3
    ids = torch.randint(0, 50, shape)
    with torch.inference_mode():
        wanted, got = plain(ids).float(), packed(ids).float()
    assert got.shape == wanted.shape
    assert (got - wanted).norm() < 0.02 * wanted.norm()


@needs_operators
def test_a_bias_counts():
    linear = nn.Linear(32, 16, dtype=torch.bfloat16).requires_grad_(False)
    linear.weight.zero_()
    assert torch.equal(PackedLinear(linear)(torch.ones(2, 32, dtype=torch.bfloat16))[1], linear.bias)


@needs_operators
def test_the_original_weight_is_freed_unless_it_is_shared():
    packed = model()
    alone, shared = weakref.ref(packed.up.weight), weakref.ref(packed.head.weight)
    pack_linears(packed)
    gc.collect()
    assert alone() is None and shared() is packed.embed.weight
    assert packed.again is packed.down and type(packed.down) is PackedLinear


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes_stay_as_they_are(dtype):
    assert pack_linears(model(dtype)) == 0


def test_subclasses_and_hooks_stay_as_they_are():
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    hooked = nn.Linear(8, 8, dtype=torch.bfloat16)
    hooked.register_forward_hook(lambda *_: None)
    assert pack_linears(nn.Sequential(Twice(8, 8, dtype=torch.bfloat16), hooked)) == 0


@pytest.mark.parametrize("answer", ["wrong", "fails"])
def test_an_operator_that_is_wrong_or_missing_is_not_used(answer, monkeypatch):
    def forward(self, x):
        if answer == "fails":
            raise RuntimeError("no such operator")
        return torch.zeros(*x.shape[:-1], self.out_features, dtype=x.dtype)

    monkeypatch.setattr(PackedLinear, "forward", forward)
    packed = model()
    assert pack_linears(packed) == 0 and type(packed.up) is nn.Linear
