"""Layouts: sizes, fingerprints, readable mismatches, and where the pieces of a block lie."""

import msgspec
import numpy as np
import pytest

from diptych.errors import ConfigError, LayoutMismatch, ProtocolError
from diptych.transfer.layout import Group, Layout


def make(**changes: object) -> Layout:
    usual: dict[str, object] = {
        "layers": 3,
        "kv_heads": 4,
        "head_dim": 8,
        "block_size": 16,
        "dtype": "bfloat16",
        "model": "m",
    }
    return Layout.uniform(**(usual | changes))  # type: ignore[arg-type]


def test_sizes_of_the_usual_case() -> None:
    layout = make()
    assert layout.shape == (3, 2, 4, 16, 8)
    assert layout.token_bytes == 3 * 2 * 4 * 8 * 2
    assert layout.block_bytes == 16 * layout.token_bytes == int(np.prod(layout.shape)) * 2


def test_groups_of_different_shape_add_up() -> None:
    full, latent = Group((0, 2), 4, 8, 8), Group((1,), 1, 64, 0, "latent")
    layout = Layout(16, "float32", (full, latent), "m")
    assert layout.block_bytes == 16 * 4 * (2 * 4 * 16 + 64)
    with pytest.raises(ConfigError, match="one group"):
        _ = layout.shape
    with pytest.raises(ConfigError, match="one group"):
        layout.pieces((0, 1), None)


def test_travels_as_msgpack_and_comes_back_checked() -> None:
    layout = make()
    wire = msgspec.msgpack.encode(layout)
    assert msgspec.msgpack.decode(wire, type=Layout) == layout
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(wire.replace(b"\xa4full", b"\xa4fool"), type=Layout)


@pytest.mark.parametrize(
    "change",
    [{"layers": 2}, {"kv_heads": 2}, {"head_dim": 16}, {"block_size": 32}, {"dtype": "float16"}, {"model": "n"}],
)
def test_any_difference_changes_the_fingerprint_and_is_refused_in_words(change: dict[str, object]) -> None:
    ours, theirs = make(), make(**change)
    assert ours.fingerprint() == make().fingerprint() != theirs.fingerprint()
    with pytest.raises(LayoutMismatch) as refusal:
        ours.check(theirs)
    assert ours.card() in str(refusal.value) and theirs.card() in str(refusal.value)


def test_mismatch_names_the_field_with_both_values() -> None:
    with pytest.raises(LayoutMismatch, match=r"groups\[0\]\.kv_heads is 4 here and 2 there"):
        make().check(make(kv_heads=2))
    with pytest.raises(LayoutMismatch, match=r"number of groups\[0\]\.layers is 3 here and 2 there"):
        make().check(make(layers=2))
    with pytest.raises(LayoutMismatch, match="dtype is 'bfloat16' here and 'float32' there"):
        make().check(make(dtype="float32"))
    make().check(make())


@pytest.mark.parametrize(
    "bad",
    [{"dtype": "float7"}, {"layers": 0}, {"block_size": 0}, {"kv_heads": 1 << 30}, {"head_dim": -1}],
)
def test_nonsense_is_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        make(**bad)


def test_blocks_are_whole_words() -> None:
    with pytest.raises(ConfigError, match="multiple of 8"):
        make(layers=1, kv_heads=1, head_dim=1, block_size=2, dtype="uint8")


def test_pieces_are_the_bytes_that_indexing_would_give() -> None:
    layout = make(dtype="float32")
    block = np.arange(layout.block_bytes // 4, dtype=np.float32)
    for layers, heads in [(None, None), ((1, 3), None), (None, (1, 3)), ((2, 3), (0, 1)), ((0, 2), (3, 4))]:
        chosen = np.zeros(layout.block_bytes, dtype=bool)
        for offset, length in layout.pieces(layers, heads):
            assert not chosen[offset : offset + length].any()
            chosen[offset : offset + length] = True
        expected = np.zeros(layout.shape, dtype=bool)
        expected[slice(*(layers or (0, 3))), :, slice(*(heads or (0, 4)))] = True
        assert (chosen.view().reshape(-1, 4).all(axis=1) == expected.reshape(-1)).all(), (layers, heads)
        assert set(block[chosen[::4]]) == set(block.reshape(layout.shape)[expected])


def test_layers_without_a_head_range_are_one_piece() -> None:
    layout = make()
    assert layout.pieces(None, None) == ((0, layout.block_bytes),)
    assert len(layout.pieces((1, 3), (0, 4))) == 1
    assert len(layout.pieces((1, 3), (0, 2))) == 4


@pytest.mark.parametrize(("layers", "heads"), [((0, 4), None), ((2, 2), None), (None, (-1, 2)), (None, (3, 5))])
def test_ranges_outside_are_refused(layers: tuple[int, int] | None, heads: tuple[int, int] | None) -> None:
    with pytest.raises(ProtocolError):
        make().pieces(layers, heads)
