"""Linear layers by tiles (AMX): what they compute, with their instructions emulated; and when they are used.

No machine that this was developed on has tiles. `native/tiles.h` therefore writes each instruction twice, and a library
with the other writing stands here for the real one, whose instructions are compiled and looked at, and run where there
is a CPU for them: `kernels.levels_here()` names their level then, and the tests of the other kernels run it.
"""

import ctypes
import mmap
import shutil
import subprocess

import pytest

torch = pytest.importorskip("torch")
from checkpoints import make_checkpoint  # noqa: E402
from test_engine_fusion import IDS, logits, num_fused  # noqa: E402
from torch import nn  # noqa: E402

from diptych.engine import adapter, kernels, linears  # noqa: E402
from diptych.engine.linears import StreamedLinear  # noqa: E402
from diptych.transfer.native import build  # noqa: E402

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler here")
needs_vectors = pytest.mark.skipif(
    "avx512bf16" not in kernels.levels_here(), reason="no AVX-512 BF16, on top of which tiles are emulated"
)
ERROR = 4e-3  # relative, root mean square
FEW, MORE = 8, 9  # rows of input that vectors take at most, and tiles at least


@pytest.fixture
def emulated(monkeypatch):
    """The name of a level like that of tiles, which this CPU runs."""
    flags = (*kernels.LEVELS["avx512bf16"], "-DDIPTYCH_EMULATED_TILES", "-O1")  # it compiles in half the time
    monkeypatch.setitem(kernels.LEVELS, "emulated", flags)
    monkeypatch.setattr(linears, "most_rows", lambda _: 1 << 30)
    monkeypatch.setattr(kernels, "multiplies_best", lambda *_: True)
    return "emulated"


def layer(columns: int, rows: int, bias: bool = True, int8: bool = False) -> tuple[StreamedLinear, torch.Tensor]:
    """A layer, and its weight [out, in] in float64."""
    plain = nn.Linear(columns, rows, bias, dtype=torch.bfloat16).requires_grad_(False)
    made = StreamedLinear(plain, kernels.library("emulated"), int8)
    return made, made.weight.double() * (made.scales[:, None] if int8 else 1)


def sum_up(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.double() @ weight.T + (0 if bias is None else bias.double())


def with_threads(count: int, work):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return work()
    finally:
        torch.set_num_threads(before)


@needs_compiler
@needs_vectors
@pytest.mark.parametrize("int8", [False, True], ids=["whole", "int8"])
def test_every_shape(emulated, int8):
    """Tiles, pairs of them, and what is left over on each of the three sides; with and without a bias."""
    torch.manual_seed(0)
    for rows in [1, 2, 15, 16, 17, 31, 32, 33, 48, 63, 64, 101]:
        for columns in (32, 96, 160):
            some, weight = layer(columns, rows, bias=rows % 2 == 1, int8=int8)
            for num in (FEW, MORE, 15, 16, 17, 31, 32, 33, 47, 65, 130):
                wanted = sum_up(x := torch.randn(num, columns).bfloat16(), weight, some.bias)
                difference = (some(x).double() - wanted).abs().amax((0, 1))
                assert difference < 2e-2 * wanted.abs().max(), (rows, columns, num)
                assert (some(x).double() - wanted).norm() < ERROR * wanted.norm(), (rows, columns, num)


@needs_compiler
@needs_vectors
def test_more_input_than_is_used_at_once(emulated):
    """A panel of it is a megabyte, here 96 rows."""
    torch.manual_seed(1)
    some, weight = layer(5344, 50)
    wanted = sum_up(x := torch.randn(219, 5344).bfloat16(), weight, some.bias)
    assert (some(x).double() - wanted).norm() < ERROR * wanted.norm()


@needs_compiler
@needs_vectors
def test_whole_numbers_come_out_exactly(emulated):
    """Which of them went where: a mistaken row, column or pair cannot hide in a tolerance."""
    torch.manual_seed(2)
    for num, columns, rows in [(9, 64, 37), (40, 160, 96), (77, 32, 113)]:
        some, weight = layer(columns, rows)
        some.weight.copy_(weight := torch.randint(-2, 3, weight.shape).double())
        some.bias.copy_(torch.randint(-9, 9, (rows,)))
        x = torch.randint(-1, 2, (num, columns)).bfloat16()
        wanted = sum_up(x, weight, some.bias)
        assert wanted.abs().max() <= 256, "beyond, bfloat16 would round"
        assert torch.equal(some(x).double(), wanted)


@needs_compiler
@needs_vectors
def test_neither_threads_nor_other_rows_change_a_bit(emulated):
    torch.manual_seed(3)
    some, _ = layer(256, 3001)
    x = torch.randn(60, 256).bfloat16()
    wanted = with_threads(1, lambda: some(x))
    assert torch.equal(with_threads(3, lambda: some(x)), wanted)
    for first, end in [(0, 9), (1, 18), (20, 60), (51, 60)]:
        assert torch.equal(some(x[first:end]), wanted[first:end])


def at_the_edge(values: torch.Tensor) -> torch.Tensor:
    """A copy behind which memory ends: reading on is a fault."""
    page = mmap.PAGESIZE
    size = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    there = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=size - values.nbytes)
    return there.view(values.shape).copy_(values)


@needs_compiler
@needs_vectors
def test_nothing_is_read_or_written_beyond(emulated):
    torch.manual_seed(4)
    for rows, num in [(1, 9), (19, 9), (45, 31), (64, 33)]:
        plain = nn.Linear(96, rows, dtype=torch.bfloat16).requires_grad_(False)
        for parameter in plain.parameters():
            parameter.data = at_the_edge(parameter.data)
        some = StreamedLinear(plain, kernels.library(emulated))
        x, out = at_the_edge(torch.randn(num, 96).bfloat16()), at_the_edge(torch.full((3, num, rows), 7.0).bfloat16())
        assert kernels.library(emulated).diptych_linear(some._address, 1, x.data_ptr(), num, out[1].data_ptr(), 1) == 0
        assert kernels.library(emulated).diptych_linear(some._address, 1, x.data_ptr(), num, out[2].data_ptr(), 1) == 0
        wanted = sum_up(x, some.weight.double(), some.bias)
        assert (out[0] == 7).all() and torch.equal(out[1], out[2])
        assert (out[1].double() - wanted).norm() < ERROR * wanted.norm()


@needs_compiler
@needs_vectors
def test_what_is_no_number_is_seen_and_what_is_too_small_is_zero(emulated):
    """As the manual has it, whatever the thread's rounding mode says; by vectors and by tiles."""
    some, _ = layer(64, 20, bias=False)
    for num in (FEW, MORE):
        x = torch.ones(num, 64).bfloat16()
        x[2, 63] = float("nan")
        out = some(x)
        assert out[2].isnan().all() and not torch.cat([out[:2], out[3:]]).isnan().any()
        some.weight.fill_(1e-39)  # a denormal; 64e-39 would be a normal number
        assert (some(torch.full((num, 64), 2.0**20).bfloat16()) == 0).all()
        some.weight.fill_(1.0)


@needs_compiler
@needs_vectors
@pytest.mark.filterwarnings("default")  # transformers has its say about tiny vocabularies
@pytest.mark.parametrize("int8", [None, "int8"])
def test_a_fused_model_gives_nearly_the_same_logits(emulated, int8, tmp_path, monkeypatch):
    """Three products of one input, and two: a prompt in one piece goes by tiles, in small ones by vectors."""
    folder = make_checkpoint("llama", tmp_path)
    monkeypatch.setattr(kernels, "WANTED", emulated)
    model = adapter.load(folder, "bfloat16", quantize=int8)
    assert num_fused(model) == model.facts.num_layers
    by_vectors = logits(model, (*range(0, len(IDS), FEW), len(IDS)), True)
    by_tiles = logits(model, (0, len(IDS)), True)
    assert (by_tiles - by_vectors).float().norm() < 0.02 * by_vectors.float().norm()


@needs_compiler
@needs_vectors
def test_each_shape_is_tried_by_tiles_before_it_is_used(emulated, monkeypatch):
    """Models load with what is left of a kernel that goes wrong at more than a few rows."""
    whole = StreamedLinear.forward
    wrong = lambda self, x: whole(self, x) * (1 if x.numel() // self.in_features <= FEW else 2)  # noqa: E731
    monkeypatch.setattr(StreamedLinear, "forward", wrong)
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16)).requires_grad_(False)
    assert linears.stream_linears(model, kernels.library(emulated)) == 0


# --- the instructions themselves -----------------------------------------------------------------------------------


@needs_compiler
def test_the_real_instructions_compile_and_load():
    """Loading runs none of them. Which tiles are multiplied is the one thing that the emulation does not share."""
    try:
        library = build.find_or_build(kernels.target(kernels.TILED))
    except build.BuildError as error:
        pytest.skip(f"this compiler knows no tiles: {str(error)[-200:]}")
    assert ctypes.CDLL(str(library)).diptych_linear
    if shutil.which("objdump") is None:
        pytest.skip("compiled and loaded; no objdump to look at the instructions with")
    dump = subprocess.run(
        ["objdump", "-d", "-M", "intel", "--no-show-raw-insn", str(library)], capture_output=True, text=True, check=True
    )
    words = [line.split("\t")[1].split() for line in dump.stdout.splitlines() if "\t" in line]
    ours = {(word[0], word[1] if word[1:] else "") for word in words if "tile" in word[0] or "tdp" in word[0]}
    products = {operands for name, operands in ours if name == "tdpbf16ps"}
    assert products == {"tmm0,tmm4,tmm6", "tmm1,tmm4,tmm7", "tmm2,tmm5,tmm6", "tmm3,tmm5,tmm7"}
    others = {"ldtilecfg", "tilerelease", "tilezero", "tileloadd", "tilestored"}
    assert {name for name, _ in ours} == {"tdpbf16ps", *others}


# --- when they are used --------------------------------------------------------------------------------------------

TILES = {"amx_tile", "amx_bf16", "avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}


def on(monkeypatch, flags: set[str], granted: bool) -> None:
    """As on another CPU, under another Linux."""
    monkeypatch.setattr(kernels, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(kernels, "tiles_granted", lambda: granted)


def test_tiles_are_a_level_where_the_cpu_has_them_and_linux_grants_them(monkeypatch):
    on(monkeypatch, TILES, granted=True)
    assert kernels.levels_here() == list(kernels.LEVELS)
    on(monkeypatch, TILES, granted=False)
    assert kernels.levels_here() == list(kernels.LEVELS)[1:]
    for lacking in ("amx_tile", "amx_bf16", "avx512_bf16"):
        on(monkeypatch, TILES - {lacking}, granted=True)
        assert kernels.TILED not in kernels.levels_here()


def test_what_was_never_timed_is_not_the_default(monkeypatch):
    """On a CPU with tiles: vectors for few rows and oneDNN for many, unless our tiles are asked for."""
    on(monkeypatch, TILES, granted=True)
    assert kernels.chosen_level() == "avx512bf16"
    assert linears.most_rows(torch.bfloat16) == linears.MAX_ROWS
    monkeypatch.setattr(kernels, "WANTED", kernels.TILED)
    assert kernels.chosen_level() == kernels.TILED
    assert linears.most_rows(torch.bfloat16) > 1 << 30 and linears.most_rows(torch.float32) == linears.MAX_ROWS
    on(monkeypatch, TILES, granted=False)
    assert kernels.chosen_level() == "avx512bf16"
    on(monkeypatch, TILES - {"amx_bf16"}, granted=True)
    with pytest.raises(ValueError, match="amxbf16"):
        kernels.chosen_level()


def test_nobody_asks_linux_for_tiles_that_are_not_wanted(monkeypatch):
    """They make a signal's stack larger."""
    on(monkeypatch, TILES, granted=True)
    monkeypatch.setattr(kernels, "tiles_granted", lambda: pytest.fail("asked"))
    assert kernels.chosen_level() == "avx512bf16"


@pytest.mark.skipif("amx_tile" in kernels._cpu_flags(), reason="this CPU has tiles, so that Linux may grant them")
def test_a_refusal_is_said(caplog):
    kernels.tiles_granted.cache_clear()
    try:
        assert not kernels.tiles_granted() and not kernels.tiles_granted()
        assert len(caplog.records) == 1 and "does not grant the tiles" in caplog.text
    finally:
        kernels.tiles_granted.cache_clear()
