"""Streamed linear layers compute what torch's do, on every instruction set this CPU has; int8 within its rounding."""

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from diptych.config import DEMO, load_cluster  # noqa: E402
from diptych.engine import adapter, kernels, linears  # noqa: E402
from diptych.engine.linears import StreamedLinear, quantized, stream_linears  # noqa: E402
from diptych.errors import ConfigError  # noqa: E402
from diptych.serve.build import build as build_worker  # noqa: E402
from diptych.transfer.native import build  # noqa: E402

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler here")

every_level = pytest.mark.parametrize("level", kernels.levels_here())
both = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
ERROR = {torch.float32: 1e-6, torch.bfloat16: 4e-3}  # relative, root mean square


def linear(columns: int, rows: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    return nn.Linear(columns, rows, bias=bias, dtype=dtype).requires_grad_(False)


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@every_level
@both
@pytest.mark.parametrize("int8", [False, True], ids=["whole", "int8"])
def test_every_number_of_rows(level, dtype, int8, monkeypatch):
    """Of input (tiles, slabs of them, and what is left over) and of the weight."""
    monkeypatch.setattr(linears, "most_rows", lambda _: 1 << 30)
    torch.manual_seed(0)
    for columns, rows in [(32, 1), (64, 5), (96, 64), (512, 43)]:
        layer = StreamedLinear(plain := linear(columns, rows, dtype), kernels.library(level), int8)
        weight = layer.weight.double() * layer.scales[:, None] if int8 else plain.weight.double()
        for num in [*range(1, 14), 31, 192, 193, 399]:
            x = torch.randn(num, columns).to(dtype)
            assert error(layer(x), x.double() @ weight.T + plain.bias.double()) < ERROR[dtype], (columns, rows, num)


@every_level
@both
def test_neither_threads_nor_other_rows_change_a_bit(level, dtype):
    layer = StreamedLinear(linear(256, 3000, dtype), kernels.library(level))
    x, threads = torch.randn(8, 256).to(dtype), torch.get_num_threads()  # of more, tiles sum in another order
    try:
        torch.set_num_threads(1)
        wanted = layer(x)
        torch.set_num_threads(3)
        assert torch.equal(layer(x), wanted)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(layer(x[i]), wanted[i]) for i in range(8))


def test_what_is_not_contiguous_or_of_another_dtype_is_left_to_torch():
    layer = StreamedLinear(plain := linear(64, 40, torch.float32), kernels.best())
    x = torch.randn(64, 5).T
    assert torch.allclose(layer(x), plain(x), atol=1e-5)
    with pytest.raises(RuntimeError):
        layer(x.double())
    assert layer(x[:0].contiguous()).shape == (0, 40)


def test_int8_is_to_nearest_by_row():
    weight = torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0], [-2.54, 0.03, 1.27]])
    whole, scales = quantized(weight)
    assert whole.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 2, 64]] or whole[0, 1] == -63
    assert ((whole * scales[:, None] - weight).abs() <= scales[:, None] / 2 + 1e-9).all()


class Model(nn.Module):
    """An embedding tied to the head, a layer used in two places, and what cannot be streamed."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64, bias=False)
        self.again = self.down
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.embed.weight
        self.narrow = nn.Linear(24, 8)
        self.hooked = nn.Linear(32, 32)
        self.hooked.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("int8", [False, True])
def test_layers_are_replaced_and_shared_weights_stay_shared(int8):
    model = Model().requires_grad_(False)
    assert stream_linears(model, kernels.best(), int8) == 3
    assert model.again is model.down and type(model.down) is StreamedLinear
    assert model.head.weight is model.embed.weight and model.head.scales is None
    assert (model.up.weight.dtype == torch.int8) == int8
    assert type(model.narrow) is type(model.hooked) is nn.Linear


def test_a_kernel_that_computes_something_else_is_not_used(monkeypatch):
    monkeypatch.setattr(StreamedLinear, "forward", lambda self, x: torch.ones(*x.shape[:-1], self.out_features))
    model = Model().requires_grad_(False)
    assert stream_linears(model, kernels.best()) == 0 and type(model.up) is nn.Linear


def test_a_worker_may_ask_for_int8():
    cluster = load_cluster(None, {"mixed": 1, "quantize": "int8"})
    module = build_worker(cluster, cluster.workers[0]).executor.model.module
    streamed = [part for part in module.modules() if type(part) is StreamedLinear]
    assert streamed and {part.weight.dtype for part in streamed if part.scales is not None} == {torch.int8}
    with pytest.raises(ConfigError, match="quantize"):
        load_cluster(None, {"mixed": 1, "quantize": "int3"})


def test_int8_without_the_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(kernels, "WANTED", "off")
    with pytest.raises(ConfigError, match="native kernels"):
        adapter.load(DEMO, quantize="int8")
