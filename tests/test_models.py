"""Model families: those that run give generate()'s tokens in every mode; the others are refused with the reason.

Windows are 16 tokens (two of three layers in most families that have them), so prompts and answers run past them. All
prompts of a family share its steps, so experts are chosen for rows of several sequences at once.
"""

import dataclasses
import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoints import FAMILIES, REFUSED, make_checkpoint, unknown  # noqa: E402
from reference import Reference, answers  # noqa: E402

from diptych.engine import adapter, attention, plain  # noqa: E402
from diptych.engine.attention import reversed_causal  # noqa: E402
from diptych.engine.features import Features  # noqa: E402
from diptych.engine.probe import check  # noqa: E402
from diptych.errors import ConfigError, UnsupportedModel  # noqa: E402

torch.set_num_threads(1)

NUM_NEW = 24
LENGTHS = (1, 15, 40, 77)
MODES = (
    {"mixed": 1, "chunk": "off"},
    {"mixed": 1, "chunk": 32},
    {"prefill": 1, "decode": 1, "chunk": 32},
)
LANES = (
    {"prefill": 1, "decode": 1, "chunk": 32, "lane": "shm"},
    {"prefill": 1, "decode": 1, "chunk": 32, "lane": "tcp"},
)
# What a lane carries is bytes whose shape a family decides: one of each kind. `make conformance` takes all families.
OVER_LANES = (
    "llama", "qwen2", "qwen3", "mistral, window", "gemma2", "gemma3_text", "phi3", "gpt_neox", "starcoder2", "olmo2",
    "granite", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3",
)  # fmt: skip
# transformers has its say about tiny vocabularies and optional kernels.
pytestmark = pytest.mark.filterwarnings("default")


def skip_where_unknown(name: str) -> None:
    """On the oldest transformers there may be (`make test-floor`); the pinned one knows them all."""
    if why := unknown(name):
        assert transformers.__version__ < "5.23", why
        pytest.skip(why)


def prompts_of(name: str) -> list[list[int]]:
    rng = random.Random(name)
    return [rng.choices(range(3, 300), k=length) for length in LENGTHS]


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_equal_generate(name: str, tmp_path: Path) -> None:
    skip_where_unknown(name)
    folder = make_checkpoint(name, tmp_path, seed=1)
    reference = Reference(folder)
    prompts = prompts_of(name)
    expected = [reference.greedy(prompt, NUM_NEW) for prompt in prompts]
    assert len({token for e in expected for token in e.tokens}) > 8, "a reference that repeats itself proves little"
    modes = MODES + LANES * (name in OVER_LANES)
    for mode in modes:
        for e, tokens in zip(expected, answers(folder, prompts, NUM_NEW, **mode), strict=True):
            reference.check(e, tokens, f"{name}, {mode}")
    assert reference.num_ties <= len(modes)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_come_out_wrong_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    skip_where_unknown(name)
    folder = make_checkpoint(name, tmp_path)
    with pytest.raises(ConfigError, match=REFUSED[name][1]):
        adapter.load(folder)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "qwen3_moe", "deepseek_v3", "gpt2"])
def test_the_probe_lets_bfloat16_through(name: str, tmp_path: Path) -> None:
    adapter.load(make_checkpoint(name, tmp_path), "bfloat16")


@pytest.mark.parametrize(
    ("name", "forgotten"), [("mistral, window", "window"), ("gemma2", "window"), ("gemma2", "softcap"),
                            ("gpt_oss", "sinks")]
)  # fmt: skip
def test_the_probe_notices_a_forgotten_feature(
    name: str, forgotten: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the sizes of real models: a window of 4096 and a cap of 50 change nothing in twenty tokens."""
    folder = make_checkpoint(name, tmp_path)
    config = (folder / "config.json").read_text()
    config = config.replace('"sliding_window": 16', '"sliding_window": 4096')
    (folder / "config.json").write_text(config.replace('softcapping": 2.0', 'softcapping": 50.0'))
    model = adapter.load(folder)
    read = attention.features_of
    forget = lambda *args: dataclasses.replace(read(*args), **{forgotten: None})  # noqa: E731
    monkeypatch.setattr(attention, "features_of", forget)
    with pytest.raises(UnsupportedModel, match="differ from the model's own"):
        check(model)
    assert model.module.config.sliding_window == 4096


@pytest.mark.parametrize("asked", [{"window": 7}, {"window": 64}, {"softcap": 3.0}, {"sinks": True, "window": 7}])
def test_attention_in_tiles_is_attention(asked: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop over queries; two KV heads with three query heads each, 21 queries at the end of 50 tokens."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 21, 8), torch.randn(2, 50, 8), torch.randn(2, 50, 8)
    sinks = torch.randn(6) if asked.pop("sinks", None) else None
    features = Features(0.3, **asked, sinks=sinks)
    monkeypatch.setattr(plain, "SCORE_BYTES", 4 * 6 * 50 * 4)  # four queries a tile
    mask = reversed_causal(21, 50, key, min(features.window or 50, 50))
    ours = plain.attend_reversed(query.flip(2), key, value, mask, features).flip(2)
    for head in range(6):
        for i in range(21):
            position = 29 + i
            first = max(0, position + 1 - (features.window or 50))
            scores = key[head // 3, first : position + 1] @ query[head // 3, head % 3, i] * 0.3
            if features.softcap:
                scores = torch.tanh(scores / features.softcap) * features.softcap
            weights = scores.exp()
            weights = weights / (weights.sum() + (sinks[head].exp() if sinks is not None else 0))
            wanted = weights @ value[head // 3, first : position + 1]
            assert torch.allclose(ours[head // 3, head % 3, i], wanted, atol=1e-5)
