"""The torch executor, driven by a hand-written step loop: tokens are those of transformers' `generate()`."""

import random
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from checkpoints import ARCHITECTURES, make_checkpoint  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from diptych.engine import adapter, attention, kernels  # noqa: E402
from diptych.engine.executor import Sampling  # noqa: E402
from diptych.engine.probe import check  # noqa: E402
from diptych.engine.torch_executor import TorchExecutor, kv_layout, pages_of  # noqa: E402
from diptych.errors import ConfigError, UnsupportedModel  # noqa: E402
from diptych.policy.messages import Run, Slice  # noqa: E402
from diptych.transfer.pool import Pool  # noqa: E402

torch.set_num_threads(1)

BLOCK_SIZE = 8
TIE = 1e-4  # a reference whose two best logits are closer than this may be followed either way


class Loop:
    """The simplest worker: gives out shuffled blocks of one pool, and runs steps of (rid, number of new tokens)."""

    def __init__(self, model, num_blocks=120, block_size=BLOCK_SIZE, seed=0):
        layout = kv_layout(model.facts, str(model.dtype).removeprefix("torch."), block_size)
        self.executor = TorchExecutor(model, Pool(layout, num_blocks), num_threads=1)
        self.block_size = block_size
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)
        self.blocks: dict[int, list[int]] = {}
        self.done: dict[int, int] = {}
        self.known: dict[int, int] = {}  # tokens known, those sampled by steps in flight included
        self.steps = 0

    def admit(self, rid, tokens, num_prompt=None, sampling=None, shared=(), done=0):
        self.executor.admit(rid, tokens, num_prompt or len(tokens), sampling or Sampling())
        self.blocks[rid], self.done[rid], self.known[rid] = list(shared), done, len(tokens)
        self.fresh = getattr(self, "fresh", set()) | {rid}

    def launch(self, work):
        slices = []
        for rid, count in work:
            start, end = self.done[rid], self.done[rid] + count
            first = 0 if rid in self.fresh else len(self.blocks[rid])
            while len(self.blocks[rid]) * self.block_size < end:
                self.blocks[rid].append(self.free.pop())
            sample = end == self.known[rid]
            delta = tuple(self.blocks[rid][first:])
            slices.append(Slice(rid, start, count, delta, sample, admit=rid in self.fresh))
            self.fresh.discard(rid)
            self.done[rid] = end
            self.known[rid] += sample
        self.steps += 1
        return self.executor.launch(Run(self.steps, tuple(slices)))

    def step(self, work):
        return self.executor.collect(self.launch(work)).tokens

    def release(self, rid):
        self.free = self.blocks.pop(rid) + self.free  # at the other end: reused late, and by someone else
        random.Random(len(self.free)).shuffle(self.free)
        self.executor.forget(rid)

    def run(self, rid, num_new, chunk=10**9):
        """Prefill by chunks, then decode; returns the new tokens."""
        new = []
        while len(new) < num_new:
            count = min(chunk, self.known[rid] - self.done[rid])
            new += [token for _, token, _ in self.step([(rid, count)])]
        return new


class Reference:
    """generate() of the same checkpoint, and how close its choices were."""

    def __init__(self, folder):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.generation_config.eos_token_id = None
        self.ties = 0

    def check(self, prompt, tokens):
        out = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=len(tokens),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        wanted = out.sequences[0, len(prompt) :].tolist()
        for ours, theirs, logits in zip(tokens, wanted, out.logits, strict=True):
            if ours != theirs:
                best = logits[0].topk(2).values
                assert best[0] - best[1] < TIE, f"{tokens} is not {wanted}"
                self.ties += 1
                break
        assert self.ties <= 2, "ties are rare; so many are a mistake"
        assert len(set(wanted)) > min(3, len(wanted) - 1), "a reference that repeats one token proves little"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {arch: make_checkpoint(arch, root / arch, seed=1) for arch in ARCHITECTURES}


@pytest.fixture(scope="module")
def models(folders):
    return {arch: adapter.load(folder) for arch, folder in folders.items()}


@pytest.fixture(scope="module")
def references(folders):
    return {arch: Reference(folder) for arch, folder in folders.items()}


def prompt_of(length, seed):
    return random.Random(seed).choices(range(3, 300), k=length)


@pytest.fixture(params=["native", "torch"])
def few(request, monkeypatch):
    """Who answers for sequences with few new tokens: the compiled kernel (where there is one), then torch."""
    if request.param == "torch":
        monkeypatch.setattr(kernels, "WANTED", "off")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_equal_generate_whatever_the_chunks(arch, models, references, few):
    loop = Loop(models[arch])
    for rid, (length, chunk) in enumerate([(1, 1), (8, 8), (61, 10**9), (61, 7), (100, 32), (97, 8)]):
        prompt = prompt_of(length, rid)
        loop.admit(rid, prompt)
        references[arch].check(prompt, loop.run(rid, 12, chunk))
        loop.release(rid)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_equal_generate_in_mixed_steps(arch, models, references, few, monkeypatch):
    """Sequences arrive one after the other; chunks ride with decodes of very different lengths."""
    monkeypatch.setattr(attention, "GATHER_BYTES", 4 * 8192)  # so that decodes of a step fall into several groups
    loop, rng = Loop(models[arch], num_blocks=100), random.Random(arch)
    waiting = [(rid, prompt_of(rng.choice([1, 5, 40, 64, 130]), rid)) for rid in range(9)]
    prompts, new, active = dict(waiting), {rid: [] for rid, _ in waiting}, []
    while waiting or active:
        if waiting and len(active) < 5:
            rid, prompt = waiting.pop()
            loop.admit(rid, prompt)
            active.append(rid)
        rng.shuffle(active)
        work = [(r, min(rng.choice([3, 7, 32]), loop.known[r] - loop.done[r])) for r in active]
        for rid, token, _ in loop.step(work):
            new[rid].append(token)
        for rid in [r for r in active if len(new[r]) == 14]:
            active.remove(rid)
            loop.release(rid)
    for rid, prompt in prompts.items():
        references[arch].check(prompt, new[rid])


def test_two_steps_in_flight(models, references):
    """The second step's token is the one that the first samples, not yet collected."""
    loop = Loop(models["llama"])
    prompts = {rid: prompt_of(20 + rid, rid) for rid in range(2)}
    new = {0: [], 1: []}
    for rid, prompt in prompts.items():
        loop.admit(rid, prompt)
    flying = [loop.launch([(0, 20), (1, 9)]), loop.launch([(0, 1), (1, 12)])]
    for _ in range(12):
        flying.append(loop.launch([(0, 1), (1, 1)]))
        for rid, token, _ in loop.executor.collect(flying.pop(0)).tokens:
            new[rid].append(token)
    for handle in flying:
        for rid, token, _ in loop.executor.collect(handle).tokens:
            new[rid].append(token)
    for rid, prompt in prompts.items():
        references["llama"].check(prompt, new[rid])
        assert loop.executor.tokens(rid) == prompt + new[rid]


def test_a_preempted_sequence_goes_on_as_before(models, references):
    """Its blocks were taken; everything is computed again, into others, the table started anew."""
    loop = Loop(models["qwen3"])
    prompt = prompt_of(30, 5)
    loop.admit(0, prompt)
    new = loop.run(0, 6)
    loop.free[:0] = loop.blocks[0]
    loop.blocks[0], loop.done[0] = [], 0
    loop.fresh.add(0)
    loop.admit(1, prompt_of(50, 6))
    loop.run(1, 3)  # someone else writes over the blocks
    new += loop.run(0, 6, chunk=16)
    references["qwen3"].check(prompt, new)


def test_a_prefix_hit_shares_blocks(models, references):
    loop = Loop(models["llama"])
    shared, tails = prompt_of(24, 7), [prompt_of(9, 8), prompt_of(1, 9), prompt_of(20, 10)]
    loop.admit(0, shared + tails[0])
    references["llama"].check(shared + tails[0], loop.run(0, 8))
    for rid, tail in enumerate(tails[1:], start=1):
        loop.admit(rid, shared + tail, shared=loop.blocks[0][:3], done=24)
        references["llama"].check(shared + tail, loop.run(rid, 8))


def test_kv_moved_to_another_pool_continues_the_answer(models, references):
    """A handover: blocks copied into other ids of another pool, and the first token passed on."""
    here, there = Loop(models["mistral"]), Loop(models["mistral"], seed=9)
    prompt = prompt_of(43, 11)
    here.admit(0, prompt)
    (first,) = here.run(0, 1)
    target = [there.free.pop() for _ in here.blocks[0]]
    there.executor.pool.view[target] = here.executor.pool.view[here.blocks[0]]
    there.admit(0, prompt, shared=target, done=43)
    there.executor.extend(0, [first])
    there.known[0] += 1
    references["mistral"].check(prompt, [first, *there.run(0, 9)])


def test_stale_bytes_of_a_block_are_never_read(models, references, few):
    """A pool full of NaN: one multiplication with what was there before would spread it."""
    loop = Loop(models["llama"])
    pages_of(loop.executor.pool).fill_(float("nan"))
    prompts = {0: prompt_of(5, 1), 1: prompt_of(33, 2)}
    for rid, prompt in prompts.items():
        loop.admit(rid, prompt)
    loop.step([(0, 5), (1, 20)])
    new = {0: [], 1: []}
    for rid, token, _ in loop.step([(1, 13)]):
        new[rid].append(token)
    for _ in range(9):
        for rid, token, _ in loop.step([(0, 1), (1, 1)]):
            new[rid].append(token)
    references["llama"].check(prompts[1], new[1])
    assert all(0 <= token < 300 for token in new[0])
    assert not torch.isnan(pages_of(loop.executor.pool)[loop.blocks[0]]).any()


def test_a_corrupted_page_changes_the_answer(models):
    loop = Loop(models["llama"])
    prompt = prompt_of(40, 3)
    answers = []
    for rid in (0, 1):
        loop.admit(rid, prompt)
        loop.run(rid, 1)
        if rid:
            loop.executor.pool.view[loop.blocks[rid][2]] = 0
        answers.append(loop.run(rid, 12))
    assert answers[0] != answers[1]


def test_stop_ids_and_min_new(models):
    loop = Loop(models["llama"])
    prompt = prompt_of(20, 4)
    loop.admit(0, prompt)
    free_run = loop.run(0, 8)
    stop = free_run[2]
    for rid, min_new, ends_at in ((1, 0, free_run.index(stop)), (2, 8, 10**9)):
        loop.admit(rid, prompt, sampling=Sampling(stop_ids=(stop,), min_new=min_new))
        ended = [loop.step([(rid, loop.known[rid] - loop.done[rid])])[0][2] for _ in range(7)]
        assert ended[: ends_at + 1].count(True) == (1 if ends_at < 7 else 0)
        assert ended.index(True) == ends_at if ends_at < 7 else not any(ended)


def test_sampling_does_not_depend_on_the_batch_or_on_where_it_resumed(models):
    how = Sampling(temperature=0.9, top_k=50, top_p=0.95, seed=42)
    loop, prompt = Loop(models["qwen2"]), prompt_of(25, 12)
    loop.admit(0, prompt, sampling=how)
    alone = loop.run(0, 10)
    loop.admit(1, prompt + alone[:4], num_prompt=25, sampling=how)
    assert loop.run(1, 6) == alone[4:]
    loop.admit(2, prompt, sampling=how)
    loop.admit(3, prompt_of(31, 13))
    together = []
    for _ in range(10):
        step = loop.step([(rid, loop.known[rid] - loop.done[rid]) for rid in (3, 2)])
        together += [token for rid, token, _ in step if rid == 2]
    assert together == alone
    loop.admit(4, prompt, sampling=Sampling(temperature=0.9, seed=43))
    assert loop.run(4, 10) != alone


def test_bfloat16_runs_and_agrees_with_itself_across_chunks(folders):
    model = adapter.load(folders["llama"], "bfloat16")
    loop = Loop(model)
    prompt = prompt_of(50, 14)
    loop.admit(0, prompt)
    loop.run(0, 1)
    loop.admit(1, prompt)
    loop.run(1, 1, chunk=16)
    pages = pages_of(loop.executor.pool)
    whole, chunked = (pages[loop.blocks[rid][:6]].float() for rid in (0, 1))
    assert (whole - chunked).pow(2).mean().sqrt() < 0.05 * whole.pow(2).mean().sqrt()


def test_a_sequence_without_enough_blocks_or_tokens_is_an_error(models):
    loop = Loop(models["llama"])
    loop.admit(0, prompt_of(20, 0))
    with pytest.raises(RuntimeError, match="needs 3 blocks, its table has 1"):
        loop.executor.launch(Run(1, (Slice(0, 0, 20, (4,), True, True),)))
    handle = loop.executor.launch(Run(2, (Slice(0, 0, 22, (4, 5, 6), True, True),)))
    with pytest.raises(RuntimeError, match="only 20 are known"):
        loop.executor.collect(handle)


def test_a_pool_of_another_model_or_dtype_is_refused(models):
    facts = models["llama"].facts
    with pytest.raises(ConfigError, match="must agree"):
        TorchExecutor(models["llama"], Pool(kv_layout(facts, "bfloat16", 8), 4))
    with pytest.raises(Exception, match="model"):
        TorchExecutor(models["qwen2"], Pool(kv_layout(facts, "float32", 8), 4))


# --- what the adapter refuses ------------------------------------------------------------------------------------


def test_rotary_scaling_by_the_batch_is_refused(tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = make_checkpoint("llama", tmp_path / "dynamic", rope_parameters=rope, num_hidden_layers=1)
    with pytest.raises(UnsupportedModel, match="longest sequence in the batch"):
        adapter.load(folder)


def test_other_families_and_broken_folders_are_refused(tmp_path, folders):
    config = (folders["llama"] / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"llama"', '"alpaca"'))
    with pytest.raises(UnsupportedModel, match="'alpaca' model .*has no language model class"):
        adapter.load(tmp_path)
    (tmp_path / "config.json").write_text(config.replace("LlamaForCausalLM", "AlpacaForSequenceClassification"))
    with pytest.raises(UnsupportedModel, match="is a AlpacaForSequenceClassification, not a sequence classification"):
        adapter.load(tmp_path)
    (tmp_path / "config.json").write_text(config.replace("LlamaForCausalLM", "LlavaForConditionalGeneration"))
    with pytest.raises(UnsupportedModel, match="is a LlavaForConditionalGeneration, not a language model"):
        adapter.load(tmp_path)
    (tmp_path / "config.json").write_text(
        config.replace('"bos_token_id"', '"is_encoder_decoder": true, "bos_token_id"')
    )
    with pytest.raises(UnsupportedModel, match="is an encoder-decoder model"):
        adapter.load(tmp_path)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        adapter.load(tmp_path)
    with pytest.raises(ConfigError, match="not floating|cannot compute"):
        adapter.load(folders["llama"], "int8")


def test_missing_weights_are_refused(tmp_path, folders):
    from safetensors.torch import load_file, save_file

    weights = load_file(folders["llama"] / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((folders["llama"] / "config.json").read_text())
    with pytest.raises(ConfigError, match="lacks weights.*layers.1.mlp.up_proj"):
        adapter.load(tmp_path)


def _without_mask(monkeypatch):
    monkeypatch.setattr(attention, "reversed_causal", lambda count, n, *_: torch.zeros(count, n))


def _without_offset(monkeypatch):
    original = attention.Chunk.attend
    reversed_queries = lambda s, kv, layer, q, scale: original(s, kv, layer, q.flip(1), scale)  # noqa: E731
    monkeypatch.setattr(attention.Chunk, "attend", reversed_queries)


def _with_swapped_heads(monkeypatch):
    original = attention._by_group
    monkeypatch.setattr(attention, "_by_group", lambda q, k, v: original(q, k.flip(0), v.flip(0)))


def _with_misplaced_slots(monkeypatch):
    original = attention.PagedKV.slot_index
    monkeypatch.setattr(attention.PagedKV, "slot_index", lambda s, b, o: original(s, b, (o + 1) % s.block_size))
    native = kernels.lay_out
    monkeypatch.setattr(kernels, "lay_out", lambda kernel, pieces, b, o: native(kernel, pieces, b, (o + 1) % 4))


@pytest.mark.parametrize("sabotage", [_without_mask, _without_offset, _with_swapped_heads, _with_misplaced_slots])
def test_the_probe_notices_broken_attention(models, monkeypatch, few, sabotage):
    check(models["llama"])
    sabotage(monkeypatch)
    with pytest.raises(UnsupportedModel, match="differ from the model's own"):
        check(models["llama"])


def test_the_probe_notices_layers_that_attend_otherwise(models):
    """As in a family whose class ignores the attention interface in some layers, and may be right by luck."""
    model = adapter.load(Path(models["llama"].facts.folder), probe=False)
    first = model.module.model.layers[1].self_attn
    first.forward = lambda hidden_states, **_: (hidden_states * 0, None)
    with pytest.raises(UnsupportedModel, match="called 2 times in a forward of 3 layers"):
        check(model)
