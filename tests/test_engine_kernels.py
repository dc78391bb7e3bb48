"""The native attention of every instruction set this CPU has, against attention written out in plain torch."""

import itertools
import logging
from dataclasses import dataclass

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from diptych.engine import attention, kernels  # noqa: E402
from diptych.engine.executor import Sampling  # noqa: E402
from diptych.engine.sequence import Piece, Sequence  # noqa: E402
from diptych.transfer.native import build  # noqa: E402

pytestmark = pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler here")

LEVELS = kernels.levels_here()
ERROR = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of outputs of size about one


@dataclass(frozen=True)
class Case:
    """A step over one layer: (new tokens, tokens with them) of each sequence, and the shapes of heads and blocks."""

    sequences: tuple[tuple[int, int], ...] = ((1, 37), (1, 1), (1, 64), (1, 300))
    kv_heads: int = 2
    group: int = 4
    dim: int = 64
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    scale: float = 0.125
    dtype: torch.dtype = torch.float32
    seed: int = 0


class Step:
    """Random pages, queries, keys and values of a case; unwritten slots are NaN, so reading one shows."""

    layer, num_layers = 1, 3

    def __init__(self, case: Case):
        self.case = case
        random = np.random.default_rng(case.seed)
        torch.manual_seed(case.seed)
        num_blocks = [-(-length // case.block_size) for _, length in case.sequences]
        ids = random.permutation(sum(num_blocks) + 3).astype(np.int32)
        self.tables = np.split(ids[: sum(num_blocks)], np.cumsum(num_blocks)[:-1])
        shape = (len(ids), self.num_layers, 2, case.kv_heads, case.block_size, case.dim)
        self.pages = torch.full(shape, float("nan"), dtype=case.dtype)
        self.num_tokens = sum(count for count, _ in case.sequences)
        self.query = self._heads(case.kv_heads * case.group)
        self.key, self.value = self._heads(case.kv_heads), self._heads(case.kv_heads)
        self.sinks = torch.randn(case.kv_heads * case.group) if case.sinks else None
        self.before = [
            torch.randn(2, case.kv_heads, length - count, case.dim).to(case.dtype) for count, length in case.sequences
        ]
        for past, table in zip(self.before, self.tables, strict=True):
            for position in range(past.shape[2]):
                self.slot(table, position)[:] = past[:, :, position]

    def _heads(self, count: int) -> torch.Tensor:
        """[heads, tokens, dim], lying in memory as a model leaves it: tokens before heads."""
        return torch.randn(self.num_tokens, count, self.case.dim).to(self.case.dtype).transpose(0, 1)

    def slot(self, table: np.ndarray, position: int) -> torch.Tensor:
        """K and V [2, heads, dim] of one token."""
        block = int(table[position // self.case.block_size])
        return self.pages[block, self.layer, :, :, position % self.case.block_size]

    def pieces(self) -> list[Piece]:
        sequence = Sequence([], 0, Sampling())
        return [
            Piece(i, sequence, length - count, count, table, True)
            for i, ((count, length), table) in enumerate(zip(self.case.sequences, self.tables, strict=True))
        ]

    def run(self, level: str) -> torch.Tensor:
        kernel = kernels.find(self.pages, level)
        pieces, size = self.pieces(), self.case.block_size
        blocks = np.concatenate([p.blocks[np.arange(p.start, p.end) // size] for p in pieces])
        offsets = np.concatenate([np.arange(p.start, p.end) % size for p in pieces])
        out = torch.full((self.num_tokens, self.query.shape[0], self.case.dim), float("nan"), dtype=self.case.dtype)
        case = self.case
        kernels.lay_out(kernel, pieces, blocks, offsets).attend(
            self.layer, self.query, self.key, self.value, out, case.scale, case.window, case.softcap, self.sinks
        )
        return out

    def expected(self) -> torch.Tensor:
        """Softmax attention as its definition says, in float64 and one query at a time."""
        out, token = [], 0
        for (count, length), past in zip(self.case.sequences, self.before, strict=True):
            new = torch.stack([self.key, self.value])[:, :, token : token + count]
            keys, values = torch.cat([past, new], 2).double().repeat_interleave(self.case.group, 1)
            for i in range(count):
                end = length - count + i + 1
                first = max(0, end - self.case.window) if self.case.window else 0
                out.append(self._one(self.query[:, token + i].double(), keys[:, first:end], values[:, first:end]))
            token += count
        return torch.stack(out)

    def _one(self, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        scores = torch.einsum("hd,htd->ht", query, keys) * self.case.scale
        if self.case.softcap:
            scores = self.case.softcap * torch.tanh(scores / self.case.softcap)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.double()[:, None]], 1)
        weights = scores.softmax(1)[:, : keys.shape[1]]
        return torch.einsum("ht,htd->hd", weights, values)


def check(case: Case, level: str) -> None:
    step = Step(case)
    ours, theirs = step.run(level).double(), step.expected()
    assert not ours.isnan().any()
    assert (ours - theirs).abs().max() < ERROR[case.dtype], case


DTYPES = [torch.float32, torch.bfloat16]
both = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
every_level = pytest.mark.parametrize("level", LEVELS)


@every_level
@both
def test_head_sizes(level, dtype):
    """Every one there is: each leaves another tail behind whole vectors."""
    for dim in range(8, 257, 8):
        check(Case(((1, 70), (2, 33)), dim=dim, dtype=dtype, scale=dim**-0.5), level)


@every_level
@both
def test_queries_that_share_a_head(level, dtype):
    for group, kv_heads in [(1, 3), (2, 2), (3, 2), (5, 1), (6, 1), (7, 1), (8, 2), (16, 1), (71, 1)]:
        check(Case(((1, 65), (3, 40)), kv_heads, group, 32, dtype=dtype), level)


@every_level
@both
def test_block_sizes(level, dtype):
    for block_size in [1, 2, 3, 7, 8, 16, 31, 32, 64, 100, 128]:
        check(Case(((1, 131), (4, 9), (1, block_size), (1, block_size + 1)), block_size=block_size, dtype=dtype), level)


@every_level
@both
def test_several_queries_see_each_their_own_past(level, dtype):
    """Verification: all new tokens at once, at the end of a context or without one."""
    for count in range(1, 9):
        check(Case(((count, count), (count, 50 + count), (1, 20), (count, 257), (count, 520)), dtype=dtype), level)


@every_level
@both
def test_long_contexts_are_cut_into_parts_and_joined(level, dtype):
    lengths = [255, 256, 257, 511, 512, 513, 4095, 4096, 4097, 5000]
    check(Case(tuple((1, length) for length in lengths), kv_heads=1, group=2, dtype=dtype), level)
    check(Case(((3, 4100), (8, 700)), kv_heads=2, group=9, dim=40, block_size=7, dtype=dtype), level)


@every_level
@both
def test_windows_soft_caps_and_sinks(level, dtype):
    sequences = ((1, 37), (5, 300), (1, 700), (2, 2))
    for window, softcap, sinks in itertools.product((0, 1, 17, 128, 600), (0.0, 2.0), (False, True)):
        case = Case(sequences, window=window, softcap=softcap, sinks=sinks, scale=0.4, dtype=dtype)
        check(case, level)


@every_level
@both
def test_pieces_of_prompt(level, dtype):
    """Blocks of queries, tiles of tokens, what is left over of both; alone, after a past, and among decodes."""
    check(Case(((9, 9), (64, 64), (65, 200), (1, 40), (130, 131), (200, 700)), dtype=dtype), level)
    for dim, group, block_size in [(8, 1, 7), (24, 3, 16), (40, 7, 5), (80, 1, 100), (128, 8, 32), (256, 2, 16)]:
        case = Case(((70, 70), (33, 150)), 2, group, dim, block_size, scale=dim**-0.5, dtype=dtype)
        check(case, level)
    for window, softcap, sinks in itertools.product((0, 1, 17, 128), (0.0, 2.0), (False, True)):
        case = Case(((150, 300), (20, 20)), window=window, softcap=softcap, sinks=sinks, scale=0.4, dtype=dtype)
        check(case, level)


@every_level
@both
def test_random_shapes(level, dtype):
    random = np.random.default_rng(5)
    for seed in range(60):
        sequences = []
        for _ in range(random.integers(1, 7)):
            count = int(random.choice([1, 1, 1, 2, 5, 8]))
            sequences.append((count, count + int(random.choice([0, 3, 60, 250, 900]))))
        case = Case(
            tuple(sequences), int(random.integers(1, 5)), int(random.integers(1, 9)), 8 * int(random.integers(1, 33)),
            int(random.choice([4, 16, 32])), int(random.choice([0, 0, 50])), float(random.choice([0, 0, 30])),
            bool(random.random() < 0.3), float(random.choice([0.05, 0.2, 1.0])), dtype, seed,
        )  # fmt: skip
        check(case, level)


@every_level
@both
def test_new_keys_and_values_are_stored_and_nothing_else_is_touched(level, dtype):
    step = Step(Case(((1, 37), (3, 64), (8, 8)), dtype=dtype))
    wanted = step.pages.clone()
    step.run(level)
    token = 0
    for (count, length), table in zip(step.case.sequences, step.tables, strict=True):
        for position in range(length - count, length):
            block, offset = int(table[position // 16]), position % 16
            wanted[block, step.layer, 0, :, offset] = step.key[:, token]
            wanted[block, step.layer, 1, :, offset] = step.value[:, token]
            token += 1
    assert torch.equal(step.pages.view(torch.uint8), wanted.view(torch.uint8))


@every_level
def test_neither_the_batch_nor_the_threads_change_a_bit(level):
    case = Case(((1, 3000), (1, 40), (2, 900), (1, 1500)), kv_heads=4)
    threads, outs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            outs.append(Step(case).run(level))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    step = Step(case)
    together = step.run(level)
    alone = Step(case)
    alone.case = Case(case.sequences[:1], kv_heads=4)
    alone.tables, alone.before, alone.num_tokens = step.tables[:1], step.before[:1], 1
    alone.query, alone.key, alone.value = step.query[:, :1], step.key[:, :1], step.value[:, :1]
    alone.pages = step.pages
    assert torch.equal(alone.run(level)[0], together[0])


@every_level
def test_a_nan_is_seen(level):
    """Corrupted bytes must not be smoothed away, in keys or in values."""
    for half in (0, 1):
        step = Step(Case(((1, 37),)))
        step.slot(step.tables[0], 11)[half, 0, 5] = float("nan")
        out = step.run(level)
        assert out[0, :4, 5].isnan().all() and not out[0, 4:].isnan().any()


@every_level
def test_large_scores_do_not_overflow(level):
    step = Step(Case(((1, 80), (2, 33)), scale=40.0))
    assert torch.allclose(step.run(level).double(), step.expected(), atol=1e-3)


@every_level
@both
def test_scores_that_rise_along_the_context(level, dtype):
    """Weights stay relative to an old maximum for a while, and sums are scaled anew beyond that: both, and back."""
    step = Step(Case(((1, 900), (5, 500)), kv_heads=1, dtype=dtype, scale=1.0))
    for past, table in zip(step.before, step.tables, strict=True):
        past[0] = (step.query[:, 0].mean(0) * torch.linspace(0, 2, past.shape[2])[:, None].sin()).to(dtype)
        for position in range(past.shape[2]):
            step.slot(table, position)[:] = past[:, :, position]
    ours, theirs = step.run(level).double(), step.expected()
    assert (ours - theirs).abs().max() < ERROR[dtype]


def test_the_levels_agree_with_the_processor(monkeypatch):
    """Best first, the last of them for every processor; a better level includes the worse."""
    assert [level for level in kernels.LEVELS if level in LEVELS] == LEVELS and LEVELS[-1] == "baseline"
    assert kernels.chosen_level() == next(level for level in LEVELS if level != kernels.TILED)
    for flags, best in [({"avx2"}, "baseline"), ({"avx2", "fma", "avx512f"}, "avx2"), (set(), "baseline")]:
        monkeypatch.setattr(kernels, "_cpu_flags", lambda flags=flags: flags)
        assert kernels.chosen_level() == best


# --- the gate before raw addresses -------------------------------------------------------------------------------


def test_ids_and_shapes_that_do_not_fit_never_reach_the_kernel():
    step = Step(Case(((1, 37), (1, 20))))
    kernel = kernels.find(step.pages)
    blocks, offsets = np.zeros(2, np.int32), np.zeros(2, np.int64)
    for bad in (-1, len(step.pages)):
        pieces = step.pieces()
        pieces[1].blocks[1] = bad
        with pytest.raises(IndexError, match="not all among"):
            kernels.lay_out(kernel, pieces, blocks, offsets)
        pieces[1].blocks[1] = 0
        with pytest.raises(IndexError, match="not all among"):
            kernels.lay_out(kernel, pieces, np.array([0, bad], np.int32), offsets)
    short = [Piece(0, step.pieces()[0].sequence, 36, 1, step.tables[0][:2], True)]
    with pytest.raises(IndexError, match="more tokens"):
        kernels.lay_out(kernel, short, blocks[:1], offsets[:1])
    native, out = kernels.lay_out(kernel, step.pieces(), blocks, offsets), torch.empty(2, 8, 64)
    good = (1, step.query, step.key, step.value, out, 1.0)
    for at, wrong in [
        (0, 3), (0, -1), (1, step.query[:, :1]), (1, step.query[:3]), (1, step.query.double()), (2, step.key[:1]),
        (3, step.value[..., :32]), (4, out[:1]), (4, torch.empty(2, 64, 8).transpose(1, 2)),
    ]:  # fmt: skip
        with pytest.raises(ValueError):
            native.attend(*good[:at], wrong, *good[at + 1 :])
    with pytest.raises(ValueError, match="sinks"):
        native.attend(*good, sinks=torch.zeros(7))


def test_pools_that_the_kernel_cannot_serve_stay_with_torch():
    assert kernels.find(torch.empty(2, 1, 2, 1, 4, 12)) is None
    assert kernels.find(torch.empty(2, 1, 2, 1, 4, 264)) is None
    assert kernels.find(torch.empty(2, 1, 2, 1, 4, 8, dtype=torch.float16)) is None
    assert kernels.find(torch.empty(2, 1, 2, 1, 4, 8)) is not None


def test_a_level_or_none_can_be_asked_for(monkeypatch):
    pages = torch.empty(2, 1, 2, 1, 4, 8)
    monkeypatch.setattr(kernels, "WANTED", "baseline")
    assert kernels.find(pages).level == "baseline"
    monkeypatch.setattr(kernels, "WANTED", "off")
    assert kernels.find(pages) is None
    monkeypatch.setattr(kernels, "WANTED", "sse9")
    with pytest.raises(ValueError, match="sse9"):
        kernels.find(pages)


def test_without_a_compiler_torch_does_it_and_says_so_once(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    monkeypatch.setattr(build, "_key", lambda *_: "none")
    kernels.library.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            kvs = [attention.PagedKV(torch.zeros(3, 1, 2, 1, 4, 8)) for _ in range(2)]
        assert [kv.kernel for kv in kvs] == [None, None]
        assert len(caplog.records) == 1 and "no C++ compiler" in caplog.text
    finally:
        kernels.library.cache_clear()
