"""The paced executor: its tokens are the oracle's, exactly as long as every page is where it should be."""

import random
import subprocess
import sys
import time

import numpy as np
import pytest

from diptych.engine.executor import Sampling
from diptych.engine.paced import VECTOR_WIDTH, PacedExecutor, PacedModel, content, oracle, paced_layout, vector_oracle
from diptych.errors import ConfigError
from diptych.policy.messages import Run, Slice
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool

MODEL = PacedModel(vocab=5000)


class Loop:
    """Steps of (rid, count) over shuffled blocks of one pool."""

    def __init__(self, model=MODEL, num_blocks=200, block_size=8, seed=0):
        self.executor = PacedExecutor(model, Pool(paced_layout(model, block_size), num_blocks))
        self.block_size = block_size
        self.free = random.Random(seed).sample(range(num_blocks), num_blocks)
        self.blocks, self.done, self.known, self.fresh = {}, {}, {}, set()

    def admit(self, rid, tokens, num_prompt=None, sampling=None, blocks=(), done=0):
        self.executor.admit(rid, tokens, num_prompt or len(tokens), sampling or Sampling())
        self.blocks[rid], self.done[rid], self.known[rid] = list(blocks), done, len(tokens)
        self.fresh.add(rid)

    def launch(self, work):
        slices = []
        for rid, count in work:
            start, end = self.done[rid], self.done[rid] + count
            old = 0 if rid in self.fresh else len(self.blocks[rid])
            while len(self.blocks[rid]) * self.block_size < end:
                self.blocks[rid].append(self.free.pop())
            sample = end == self.known[rid]
            slices.append(Slice(rid, start, count, tuple(self.blocks[rid][old:]), sample, rid in self.fresh))
            self.fresh.discard(rid)
            self.done[rid], self.known[rid] = end, self.known[rid] + sample
        return self.executor.launch(Run(1, tuple(slices)))

    def run(self, rid, num_new, chunk=10**9):
        new = []
        while len(new) < num_new:
            count = min(chunk, self.known[rid] - self.done[rid])
            new += [token for _, token, _ in self.executor.collect(self.launch([(rid, count)])).tokens]
        return new


def prompt_of(length, seed):
    return random.Random(seed).choices(range(MODEL.vocab), k=length)


def splitmix64(x):
    mask = (1 << 64) - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


def test_content_is_splitmix64_of_token_position_and_word():
    """Against plain integers; the generator itself against its published first output for seed 0."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    tokens, start, kv_bytes = [0, 7, 4999], 130, 40
    words = content(tokens, start, kv_bytes).view("<u8")
    for i, token in enumerate(tokens):
        inner = splitmix64((token * golden + start + i) & mask)
        assert words[i].tolist() == [splitmix64((inner + w * golden) & mask) for w in range(kv_bytes // 8)]


@pytest.mark.parametrize("kv_bytes", [8, 64, 200])
@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_tokens_are_the_oracles_whatever_the_chunks_and_blocks(kv_bytes, block_size):
    model = PacedModel(kv_bytes_per_token=kv_bytes, vocab=5000)
    loop = Loop(model, num_blocks=800 // block_size, block_size=block_size)
    for rid, (length, chunk) in enumerate([(1, 1), (8, 8), (50, 10**9), (61, 7), (100, 32), (97, 1)]):
        prompt = prompt_of(length, rid)
        loop.admit(rid, prompt)
        assert loop.run(rid, 20, chunk) == oracle(prompt, 20, model)
        loop.free[:0] = loop.blocks[rid]
        loop.executor.forget(rid)


def test_mixed_steps_two_in_flight():
    loop = Loop()
    prompts = {rid: prompt_of(10 + 7 * rid, rid) for rid in range(4)}
    new = {rid: [] for rid in prompts}
    for rid, prompt in prompts.items():
        loop.admit(rid, prompt)
    flying = [loop.launch([(rid, len(p)) for rid, p in prompts.items()])]
    for _ in range(15):
        flying.append(loop.launch([(rid, 1) for rid in prompts]))
        for rid, token, _ in loop.executor.collect(flying.pop(0)).tokens:
            new[rid].append(token)
    for rid, prompt in prompts.items():
        assert new[rid] == oracle(prompt, 15, MODEL)


def test_a_resumed_or_recomputed_sequence_goes_on_alike():
    loop, prompt = Loop(), prompt_of(30, 1)
    wanted = oracle(prompt, 10, MODEL)
    loop.admit(0, prompt + wanted[:4], num_prompt=30)
    assert loop.run(0, 6, chunk=16) == wanted[4:]


def test_a_handover_to_other_blocks_of_another_pool():
    here, there = Loop(), Loop(seed=3)
    prompt = prompt_of(45, 2)
    here.admit(0, prompt)
    (first,) = here.run(0, 1)
    target = [there.free.pop() for _ in here.blocks[0]]
    there.executor.pool.view[target] = here.executor.pool.view[here.blocks[0]]
    there.admit(0, prompt, blocks=target, done=45)
    there.executor.extend(0, [first])
    there.known[0] += 1
    assert [first, *there.run(0, 12)] == oracle(prompt, 13, MODEL)


def _zero(view, blocks):
    view[blocks[2]] = 0


def _flip_a_bit(view, blocks):
    view[blocks[4], -1] ^= 1


def _swap(view, blocks):
    view[[blocks[1], blocks[3]]] = view[[blocks[3], blocks[1]]]


def _stale(view, blocks):
    view[blocks[0]] = view[blocks[1]]


def _swap_keys_and_values(view, blocks):
    view[blocks[1]] = np.roll(view[blocks[1]], view.shape[1] // 2)


@pytest.mark.parametrize("damage", [_zero, _flip_a_bit, _swap, _stale, _swap_keys_and_values])
def test_any_damage_to_a_page_changes_the_next_token(damage):
    loop, prompt = Loop(), prompt_of(40, 3)
    wanted = oracle(prompt, 4, MODEL)
    loop.admit(0, prompt)
    assert loop.run(0, 2) == wanted[:2]
    undamaged = loop.executor.pool.view.copy()
    damage(loop.executor.pool.view, loop.blocks[0])
    assert loop.run(0, 1) != wanted[2:3]
    loop.executor.truncate(0, 42)
    loop.done[0], loop.known[0] = 41, 42
    loop.executor.pool.view[:] = undamaged
    assert loop.run(0, 2) == wanted[2:], "and repaired, it goes on"


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("chunk", [1, 7, 10**9])
def test_a_vector_is_the_oracles_whatever_the_chunks(pooling, chunk):
    loop, prompt = Loop(), prompt_of(41, 6)
    loop.admit(0, prompt, sampling=Sampling(pooling=pooling))
    results = []
    while loop.done[0] < 41:
        results.append(loop.executor.collect(loop.launch([(0, min(chunk, 41 - loop.done[0]))])))
    assert not any(result.tokens for result in results)
    assert [result.vectors for result in results] == [{}] * (len(results) - 1) + [
        {0: vector_oracle(prompt, MODEL, pooling)}
    ]
    numbers = np.frombuffer(results[-1].vectors[0], np.float32)
    assert numbers.shape == (VECTOR_WIDTH,) and -1 <= numbers.min() < numbers.max() < 1


def test_bytes_behind_the_last_token_do_not_matter():
    loop, prompt = Loop(), prompt_of(41, 4)  # one token in its last block
    loop.executor.pool.view[:] = 0xEE
    loop.admit(0, prompt)
    assert loop.run(0, 5) == oracle(prompt, 5, MODEL)


def test_stop_ids_end_a_sequence_as_in_the_oracle():
    prompt = prompt_of(20, 5)
    free_run = oracle(prompt, 6, MODEL)
    how = Sampling(stop_ids=(free_run[3],))
    assert oracle(prompt, 6, MODEL, stop_ids=how.stop_ids) == free_run[:4]
    assert oracle(prompt, 6, MODEL, stop_ids=how.stop_ids, min_new=5) == free_run
    loop = Loop()
    loop.admit(0, prompt, sampling=how)
    ended = [loop.executor.collect(loop.launch([(0, loop.known[0] - loop.done[0])])).tokens[0][2] for _ in range(5)]
    assert ended == [False, False, False, True, False]


def test_steps_take_their_time_one_after_the_other():
    model = PacedModel(base_s=0.02, new_token_s=0.001, context_token_s=0.0001)
    assert model.cost_s(10, 100) == pytest.approx(0.04)
    loop = Loop(model)
    loop.admit(0, prompt_of(10, 0))
    begin = time.monotonic()
    flying = [loop.launch([(0, 10)]), loop.launch([(0, 1)])]
    assert time.monotonic() - begin < 0.02
    results = [loop.executor.collect(handle) for handle in flying]
    assert time.monotonic() - begin >= 0.0310 + 0.0221
    assert results[0].elapsed_s >= 0.031 and results[1].elapsed_s >= 0.0221


def test_sizes_that_make_no_model_or_pool_are_refused():
    with pytest.raises(ConfigError, match="multiple of 8"):
        PacedModel(kv_bytes_per_token=20)
    other = Layout.uniform(layers=2, kv_heads=1, head_dim=32, block_size=8, dtype="uint8")
    with pytest.raises(ConfigError, match="not a paced model's"):
        PacedExecutor(MODEL, Pool(other, 4))


def test_a_process_of_it_is_small_and_knows_no_torch():
    code = (
        "import sys, time\n"
        "import diptych.engine.paced\n"
        "assert not {'torch', 'transformers', 'asyncio'} & set(sys.modules)\n"
        # Not ru_maxrss: that outlives exec, so it would be the size of the process that runs the tests.
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(peak.split()[1], time.process_time())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    peak_kb, cpu_s = out.stdout.split()
    assert int(peak_kb) < 80 * 1024
    assert float(cpu_s) < 2  # a quarter of a second on a quiet machine
