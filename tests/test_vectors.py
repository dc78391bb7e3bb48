"""Embeddings and classes are transformers' own, whatever the mode, chunk size, prefix hit or preemption on the way.

Whole clusters in one process (`LocalCluster`), all requests at once, against the forward of `AutoModel` and
`AutoModelForSequenceClassification` over the same checkpoint in float32.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from checkpoints import ARCHITECTURES, make_checkpoint  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from diptych.config import load_cluster  # noqa: E402
from diptych.engine import adapter  # noqa: E402
from diptych.engine.executor import Pooling, Sampling  # noqa: E402
from diptych.errors import ConfigError, UnsupportedModel  # noqa: E402
from diptych.policy.messages import Reason  # noqa: E402
from diptych.serve.build import build  # noqa: E402
from diptych.serve.local import Answer, LocalCluster  # noqa: E402

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("default")  # transformers has its say about tiny vocabularies

TOLERANCE = 1e-4
LENGTHS = (1, 2, 15, 16, 17, 33, 100, 257)
MODES: dict[str, dict[str, Any]] = {
    "unified": {"mixed": 1, "chunk": "off"},
    "chunked": {"mixed": 1, "chunk": 32},
    "disaggregated": {"prefill": 1, "decode": 1, "chunk": 100},
    "two in flight": {"prefill": 2, "decode": 1, "chunk": 32, "depth": 2},
    "hybrid": {"prefill": 1, "decode": 1, "mixed": 1, "chunk": 100},
}
# Heads, norms, windows and rotations that differ; each has a class with and without a head.
FAMILIES = ("gemma2", "phi", "gpt2", "gpt_neox", "opt", "cohere", "granite", "modernbert-decoder", "gpt_oss", "gemma3")


def prompts_of(seed: object) -> list[list[int]]:
    """Prompts of the lengths above; every other one shares a prefix."""
    rng = random.Random(str(seed))
    shared = [rng.randrange(3, 300) for _ in range(64)]
    prompts = []
    for i, length in enumerate(LENGTHS):
        own = [rng.randrange(3, 300) for _ in range(length)]
        prompts.append((shared[: length // 2] + own)[:length] if i % 2 else own)
    return prompts


def cluster_of(folder: Path, **flags: Any) -> LocalCluster:
    config = load_cluster(None, {"model": str(folder), "kv_memory": "8MiB", "cores": [0], **flags})
    return LocalCluster([build(config, worker) for worker in config.workers])


def ask(cluster: LocalCluster, prompts: list[list[int]], pooling: Pooling, find: bool = True) -> list[Answer]:
    """All at once; afterwards every block is home."""
    how = Sampling(pooling=pooling)
    answers = [cluster.submit(prompt, 0, how, find=find and pooling != "mean") for prompt in prompts]
    cluster.run_until(answers)
    cluster.settle()
    assert [answer.reason for answer in answers] == [Reason.COMPUTED] * len(prompts)
    assert not any(answer.tokens for answer in answers)
    for driver in cluster.workers.values():
        driver.policy.pool.check()
        counts = driver.policy.pool.counts()
        assert counts["free"] + counts["cached"] == driver.policy.spec.num_blocks and not driver.policy.seqs
    return answers


def assert_equal(answers: list[Answer], expected: list[NDArray[np.float32]]) -> None:
    for answer, wanted in zip(answers, expected, strict=True):
        assert np.frombuffer(answer.vector, np.float32) == pytest.approx(wanted, abs=TOLERANCE)


def states_of(model: Any, prompt: list[int], pooling: Pooling) -> NDArray[np.float32]:
    with torch.inference_mode():
        states = model(input_ids=torch.tensor([prompt])).last_hidden_state[0]
    found: NDArray[np.float32] = (states.mean(0) if pooling == "mean" else states[-1]).numpy()
    return found


class Case:
    """One checkpoint, prompts, and what transformers makes of them."""

    def __init__(self, arch: str, folder: Path, task: str = "generate"):
        self.folder = make_checkpoint(arch, folder, seed=len(arch), task=task)
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
        self.prompts = prompts_of(arch)
        ways: tuple[Pooling, ...] = ("last", "mean")
        self.expected = {way: [states_of(model, prompt, way) for prompt in self.prompts] for way in ways}

    def check(self, cluster: LocalCluster, pooling: Pooling) -> list[Answer]:
        answers = ask(cluster, self.prompts, pooling)
        assert_equal(answers, self.expected[pooling])
        return answers


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("mode", MODES)
def test_embeddings_are_the_models_own(case: Case, mode: str) -> None:
    """Twice: the second time what can be found of a prompt is found, and a mean finds nothing."""
    cluster = cluster_of(case.folder, **MODES[mode])
    for pooling in ("last", "mean"):
        case.check(cluster, pooling)  # type: ignore[arg-type]
        again = case.check(cluster, pooling)  # type: ignore[arg-type]
        cached = [answer.cached for answer in again]
        if pooling == "mean":
            assert not any(cached)
        elif len(cluster.workers) - ("d0" in cluster.workers) == 1:
            assert cached == [(len(prompt) - 1) // 16 * 16 for prompt in case.prompts]
    cluster.close()


def test_no_decode_worker_hears_of_it(case: Case) -> None:
    """Not one event: no step, no block, no read; and nothing is sent to a peer."""
    cluster = cluster_of(case.folder, prefill=1, decode=1, chunk=32)
    decode, heard, told = cluster.workers["d0"], [], []
    decode.on = lambda *event: heard.append(event)  # type: ignore[method-assign]
    cluster.workers["p0"]._ports.tell = lambda *message: told.append(message)  # type: ignore[method-assign]
    before = decode.state()
    case.check(cluster, "last")
    assert heard == told == [] and decode.state() == before and before["steps"] == 0
    assert decode.policy.pool.counts()["free"] == decode.policy.spec.num_blocks
    view = cluster.router.policy.workers["d0"]
    assert (view.num_requests, view.held_tokens, view.last_placed) == (0, 0, 0)
    cluster.close()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_between_answers_that_take_their_memory(case: Case, pooling: Pooling) -> None:
    """A pool that is too small for all: prompts are computed again, in steps that they share with answers."""
    cluster = cluster_of(case.folder, mixed=1, chunk=8, kv_memory=46 * 16 * 3 * 2 * 2 * 16 * 4)
    answers = [cluster.submit(prompt[:200], 100, Sampling()) for prompt in case.prompts[-3:]]
    while not all(answer.tokens for answer in answers):
        assert cluster.step()
    longest_first = ask(cluster, case.prompts[::-1], pooling, find=False)
    assert_equal(longest_first[::-1], case.expected[pooling])
    assert [len(answer.tokens) for answer in answers] == [100] * 3
    assert cluster.workers["m0"].policy.num_preempted > 0
    cluster.close()


def test_the_kv_of_an_embedding_serves_an_answer_and_the_other_way_round(case: Case) -> None:
    cluster = cluster_of(case.folder, mixed=1)
    case.check(cluster, "last")
    answer = cluster.submit(case.prompts[-1], 4, Sampling())
    cluster.run_until([answer])
    assert answer.cached == 256
    cluster.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, tmp_path: Path) -> None:
    case = Case(family, tmp_path)
    for mode in ("unified", "disaggregated"):
        cluster = cluster_of(case.folder, **MODES[mode])
        case.check(cluster, "last")
        case.check(cluster, "mean")
        cluster.close()


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gpt2"])
def test_a_checkpoint_without_a_head(family: str, tmp_path: Path) -> None:
    case = Case(family, tmp_path, task="embed")
    cluster = cluster_of(case.folder, prefill=1, decode=1, chunk=32)
    assert cluster.card.task == "embed"
    case.check(cluster, "last")
    cluster.close()


@pytest.mark.parametrize("num_labels", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_classes_are_the_models_own(family: str, num_labels: int, tmp_path: Path) -> None:
    folder = make_checkpoint(family, tmp_path, seed=3, task="classify", num_labels=num_labels)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    prompts = prompts_of(family)
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([prompt])).logits[0].numpy() for prompt in prompts]
    for mode in ("chunked", "disaggregated"):
        cluster = cluster_of(folder, **MODES[mode])
        assert cluster.card.task == "classify" and len(cluster.card.labels) == num_labels
        for _ in range(2):
            assert_equal(ask(cluster, prompts, "labels"), expected)
        cluster.close()


def test_bfloat16_is_near(tmp_path: Path) -> None:
    """Packed weights and bfloat16 KV: the same direction, if not the same digits."""
    case = Case("llama", tmp_path)
    cluster = cluster_of(case.folder, prefill=1, decode=1, dtype="bfloat16")
    for answer, wanted in zip(ask(cluster, case.prompts, "mean"), case.expected["mean"], strict=True):
        found = np.frombuffer(answer.vector, np.float32)
        assert found @ wanted / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.99
    cluster.close()


def test_zeroed_pages_change_the_vector(case: Case) -> None:
    """The comparison can fail: a prefix that is found and was wiped gives another vector."""
    cluster = cluster_of(case.folder, mixed=1)
    ask(cluster, case.prompts, "last")
    cluster.parts["m0"].pool.view[:] = 0
    vector = np.frombuffer(ask(cluster, case.prompts[-1:], "last")[0].vector, np.float32)
    assert np.abs(vector - case.expected["last"][-1]).max() > 100 * TOLERANCE
    cluster.close()


def test_a_classifier_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    """Another kind of head, one without weights, or a family that nobody knows."""
    with pytest.raises(UnsupportedModel, match="more than one 'score' matrix"):
        adapter.load(make_checkpoint("bert", tmp_path / "bert", task="classify"))
    folder = make_checkpoint("llama", tmp_path / "llama")
    config = folder / "config.json"
    config.write_text(config.read_text().replace("ForCausalLM", "ForSequenceClassification"))
    with pytest.raises(ConfigError, match="lacks weights.*score"):
        adapter.load(folder)
    config.write_text(config.read_text().replace("LlamaForSeq", "AlpacaForSeq"))
    with pytest.raises(UnsupportedModel, match="not a sequence classification"):
        adapter.load(folder)
