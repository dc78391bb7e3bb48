"""Invariant 8: the tokens are the model's, whatever the mode, chunk size, prefix hit or preemption on the way.

Whole clusters in one process (`LocalCluster`), eight requests at a time, against transformers' own `generate()`.
"""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import ARCHITECTURES, make_checkpoint
from reference import Expected, Reference

from diptych.config import load_cluster
from diptych.engine.executor import Sampling
from diptych.serve.build import build
from diptych.serve.local import Answer, LocalCluster

NUM_NEW = 64
LENGTHS = (1, 2, 15, 16, 17, 33, 100, 257, 511, 700)
TOPOLOGIES = {
    "unified": {"mixed": 1, "chunk": "off"},
    "chunked-32": {"mixed": 1, "chunk": 32},
    "chunked-100": {"mixed": 1, "chunk": 100},
    "chunked-512": {"mixed": 1, "chunk": 512},
    "disaggregated": {"prefill": 1, "decode": 1, "chunk": 512},
    "disaggregated-whole": {"prefill": 2, "decode": 1, "chunk": "off"},
    "disaggregated-32": {"prefill": 1, "decode": 2, "chunk": 32},
    "hybrid": {"prefill": 1, "decode": 1, "mixed": 1, "chunk": 100},
}


def make_prompts(seed: int) -> list[list[int]]:
    """Prompts of the lengths above; every other one shares a prefix of up to 96 tokens."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 300) for _ in range(96)]
    prompts = []
    for i, length in enumerate(LENGTHS):
        own = [rng.randrange(3, 300) for _ in range(length)]
        prompts.append((shared[: length // 2] + own)[:length] if i % 2 else own)
    return prompts


class Case:
    """One architecture: its checkpoint, prompts and reference answers."""

    def __init__(self, arch: str, folder: Path):
        self.folder = make_checkpoint(arch, folder, seed=len(arch))
        self.reference = Reference(self.folder)
        self.prompts = make_prompts(len(arch))
        self.expected: list[Expected] = [self.reference.greedy(prompt, NUM_NEW) for prompt in self.prompts]

    def cluster(self, **flags: object) -> LocalCluster:
        """A cluster of this checkpoint in this process."""
        config = load_cluster(None, {"model": str(self.folder), "kv_memory": "24MiB", "cores": [0], **flags})
        return LocalCluster([build(config, worker) for worker in config.workers])

    def check(self, cluster: LocalCluster, what: str, concurrency: int = 8) -> None:
        """Run every prompt, `concurrency` at a time, and compare; afterwards every block is home."""
        try:
            answers: list[Answer] = []
            for i, prompt in enumerate(self.prompts):
                if i >= concurrency:
                    cluster.run_until([answers[i - concurrency]])
                answers.append(cluster.submit(prompt, NUM_NEW, Sampling()))
            cluster.run_until(answers)
            cluster.settle()
            for prompt, answer, expected in zip(self.prompts, answers, self.expected, strict=True):
                assert answer.error is None
                self.reference.check(expected, answer.tokens, f"{what}, {len(prompt)} prompt tokens")
            for driver in cluster.workers.values():
                driver.policy.pool.check()
                counts = driver.policy.pool.counts()
                assert counts["free"] + counts["cached"] == driver.policy.spec.num_blocks and not driver.policy.seqs
        finally:
            cluster.close()


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.set_num_threads(1)
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_tokens_equal_generate(case: Case, name: str) -> None:
    case.check(case.cluster(**TOPOLOGIES[name]), name)
    assert case.reference.num_ties <= 1


def test_two_steps_in_flight_change_nothing(case: Case) -> None:
    case.check(case.cluster(prefill=1, decode=1, chunk=100, depth=2), "depth 2")


@pytest.mark.parametrize("topology", [{"mixed": 1}, {"prefill": 1, "decode": 1}])
def test_preemption_and_backpressure_change_nothing(case: Case, topology: dict[str, int]) -> None:
    """Pools of 50 blocks for ten requests of up to 764 tokens: sequences lose their memory and compute it again."""
    cluster = case.cluster(kv_memory=50 * 16 * 3 * 2 * 2 * 16 * 4, chunk=64, **topology)
    case.check(cluster, "tight memory", concurrency=10)
    assert sum(driver.policy.num_preempted for driver in cluster.workers.values()) > 0


def test_sampling_does_not_depend_on_the_way(case: Case) -> None:
    """A seeded sample is a function of parameters, seed, position and tokens: the same in every mode and batch."""
    sampling = [Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=seed) for seed in range(len(case.prompts))]
    outcomes = []
    for flags in ({"mixed": 1, "chunk": "off"}, {"prefill": 1, "decode": 1, "chunk": 32}):
        cluster = case.cluster(**flags)
        answers = [cluster.submit(prompt, 16, how) for prompt, how in zip(case.prompts, sampling, strict=True)]
        cluster.run_until(answers)
        outcomes.append([answer.tokens for answer in answers])
        cluster.close()
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != [expected.tokens[:16] for expected in case.expected]


@pytest.mark.parametrize("name", ["unified", "chunked-100", "disaggregated-32"])
def test_a_repetition_penalty_is_that_of_generate(case: Case, name: str) -> None:
    prompts = case.prompts[:7]
    cluster = case.cluster(**TOPOLOGIES[name])
    answers = [cluster.submit(prompt, 32, Sampling(repetition_penalty=1.3)) for prompt in prompts]
    cluster.run_until(answers)
    for prompt, answer in zip(prompts, answers, strict=True):
        expected = case.reference.greedy(prompt, 32, repetition_penalty=1.3)
        case.reference.check(expected, answer.tokens, f"{name}, {len(prompt)} prompt tokens, penalised")
    plain = [expected.tokens[:32] for expected in case.expected[:7]]
    assert [answer.tokens for answer in answers] != plain
    cluster.close()


def test_penalties_survive_handover_and_preemption(case: Case) -> None:
    """Bias, penalties and min-p with a seed: the same tokens in every mode, and where memory was lost on the way."""
    outcomes = []
    tight = 50 * 16 * 3 * 2 * 2 * 16 * 4
    for flags in (
        {"mixed": 1, "chunk": "off"},
        {"mixed": 1, "chunk": 64, "kv_memory": tight},
        {"prefill": 1, "decode": 1, "chunk": 64, "depth": 2},
    ):
        cluster = case.cluster(**flags)
        answers = [cluster.submit(prompt, NUM_NEW, spiced(seed)) for seed, prompt in enumerate(case.prompts)]
        cluster.run_until(answers)
        outcomes.append([answer.tokens for answer in answers])
        if flags.get("kv_memory"):
            assert sum(driver.policy.num_preempted for driver in cluster.workers.values()) > 0
        cluster.close()
    assert outcomes[0] == outcomes[1] == outcomes[2]


def spiced(seed: int) -> Sampling:
    """Everything at once, in other strengths for each seed."""
    return Sampling(
        temperature=0.5 + 0.1 * seed,
        seed=seed,
        min_p=0.02,
        repetition_penalty=1.0 + 0.05 * seed,
        presence_penalty=0.2,
        frequency_penalty=0.1 * (seed % 3),
        logit_bias=((seed + 5, 2.0), (seed + 9, -3.0)),
    )


SCORED = {
    "unified": {"mixed": 1, "chunk": "off"},
    "chunked": {"mixed": 1, "chunk": 32},
    "disaggregated": {"prefill": 1, "decode": 1, "chunk": 100},
    "preempted": {"mixed": 1, "chunk": 64, "kv_memory": 50 * 16 * 3 * 2 * 2 * 16 * 4},
}


@pytest.mark.parametrize("name", SCORED)
def test_logprobs_are_those_of_the_whole_forward(case: Case, name: str) -> None:
    """Of every prompt token but the first and every written one, whoever computed it and however it was cut."""
    cluster = case.cluster(**SCORED[name])
    how = Sampling(logprobs=3, prompt_logprobs=1)
    answers = [cluster.submit(prompt, NUM_NEW, how, find=False) for prompt in case.prompts]
    cluster.run_until(answers)
    if name == "preempted":
        assert sum(driver.policy.num_preempted for driver in cluster.workers.values()) > 0
    for prompt, answer in zip(case.prompts, answers, strict=True):
        tokens = prompt + answer.tokens
        expected = case.reference.logprobs(tokens)
        scores = [*answer.prompt_scores, *answer.scores]
        assert len(scores) == len(tokens) - 1
        for place, score in enumerate(scores, start=1):
            ids = np.frombuffer(score.ids, np.int32)
            num_top = 1 if place < len(prompt) else 3
            assert (ids[0], len(ids)) == (tokens[place], 1 + num_top)
            theirs = expected[place - 1][torch.from_numpy(ids.astype(np.int64))]
            assert np.frombuffer(score.values, np.float32) == pytest.approx(theirs.numpy(), abs=2e-4)
            if num_top == 3:
                assert score.rank == 1
    cluster.close()


@pytest.mark.parametrize("name", ["unified", "disaggregated"])
def test_the_prompt_tokens_that_were_found_are_counted(case: Case, name: str) -> None:
    prompt = case.prompts[-1]
    cluster = case.cluster(**TOPOLOGIES[name])
    first, again = cluster.submit(prompt, 4, Sampling()), None
    cluster.run_until([first])
    again = cluster.submit(prompt, 4, Sampling())
    cluster.run_until([again])
    assert first.cached == 0
    assert again.cached == (len(prompt) - 1) // 16 * 16
    cluster.close()


def test_a_stop_token_ends_the_answer_in_every_mode(case: Case) -> None:
    prompt, expected = case.prompts[5], case.expected[5]
    stop = expected.tokens[20]
    end = expected.tokens.index(stop) + 1
    for flags in ({"mixed": 1}, {"prefill": 1, "decode": 1}, {"prefill": 1, "decode": 1, "depth": 2}):
        cluster = case.cluster(**flags)
        answer = cluster.submit(prompt, NUM_NEW, Sampling(stop_ids=(stop,)))
        cluster.run_until([answer])
        assert answer.tokens == expected.tokens[:end] and answer.reason == "stop"
        cluster.close()


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_no_stop_token_is_among_the_first(case: Case, name: str) -> None:
    """With `min_new`, as `generate()` has it: the token that would have ended the answer is not written before."""
    prompt, plain = case.prompts[5], case.expected[5].tokens
    stop, least = plain[6], plain.index(plain[6]) + 10
    expected = case.reference.greedy(prompt, 32, ignore_eos=False, eos_token_id=stop, min_new_tokens=least)
    cluster = case.cluster(**TOPOLOGIES[name])
    answer = cluster.submit(prompt, 32, Sampling(stop_ids=(stop,), min_new=least))
    cluster.run_until([answer])
    case.reference.check(expected, answer.tokens, f"{name}, at least {least}")
    assert stop not in answer.tokens[:least] and len(answer.tokens) >= least
    cluster.close()


def test_zeroed_pages_change_the_tokens(case: Case) -> None:
    """The comparison can fail: KV that arrives as zeros gives other tokens."""
    cluster = case.cluster(prefill=1, decode=1)
    answer = cluster.submit(case.prompts[-1], NUM_NEW, Sampling())
    while not answer.tokens or cluster.workers["d0"].traffic.num_transfers == 0:
        assert cluster.step()
    cluster.parts["d0"].pool.view[:] = 0
    cluster.run_until([answer])
    assert answer.tokens[1:] != case.expected[-1].tokens[1:]
    cluster.close()
