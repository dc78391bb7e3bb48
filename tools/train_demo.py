"""Train the bundled demo model from scratch: ``python tools/train_demo.py --out DIR``.

The model is a tiny Llama that recalls notes exactly, answers a few questions about serving and
tells short stories. Text comes from :mod:`diptych.demo.notes` and :mod:`diptych.demo.chat`.

Recall is learned through a curriculum on the number of notes in a prompt: the level rises when
the model gets nearly all codes right. Each sequence asks many questions, so that it gives dozens
of recall targets; the code words carry most of the loss. After the curriculum comes a final
phase of fixed length over all prompt sizes, while the learning rate falls.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from diptych.demo import chat, notes

BOS, END, PAD = "<|bos|>", "<|end|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIALS = (PAD, BOS, END, *ROLES.values())
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}{{- '<|assistant|>' -}}
{%- elif message['role'] in ['system', 'developer'] -%}{{- '<|system|>' -}}
{%- else -%}{{- '<|user|>' -}}
{%- endif -%}
{%- if message['content'] is string -%}{{- message['content'] -}}
{%- else -%}{%- for part in message['content'] or [] -%}{{- part['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""
INTROS = ("Here are my notes.", "These are the notes.", "Notes:", "Remember these notes.")
ASK_FORMS = (
    "Tell me the code of {}.",
    "What code does {} have?",
    "Which code does {} have?",
    "what is the code of {}?",
    "What is {}'s code?",
)
BARE_FORMS = {"pair": " {} {}", "short": " {} is {}.", "note": " The code of {} is {}."}
LEVELS = (4, 16, 48, 128)
VALUE_WEIGHT, FIRST_WEIGHT, TEXT_WEIGHT = 1.0, 0.5, 0.1
MAX_POSITIONS = 8192
BANDS, SHARPNESS, MATCH = 12, 1.1, 1.6


# ---------------------------------------------------------------- tokenizer


def vocabulary_texts() -> list[str]:
    """Return text that holds every word which shall be one token."""
    texts = chat.fixed_texts()
    texts += [*INTROS, *(form.format("Mira") for form in ASK_FORMS), *notes.NAMES]
    for name, value in zip(notes.NAMES, notes.VALUES + notes.VALUES, strict=False):
        texts += [notes.note(name, value), notes.question(name), notes.no_note_answer(name), f"has {value}"]
    return texts + [f" {text}" for text in texts] + ["\n\n", "\n"]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the byte-level tokenizer: one token for each known word, single bytes for all else."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    words = {word for text in vocabulary_texts() for word, _ in splitter.pre_tokenize_str(text)}
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += sorted(words.difference(pieces))
    vocab = {piece: index for index, piece in enumerate((*SPECIALS, *pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


# ---------------------------------------------------------------- training text


@dataclass
class Sample:
    """One training sequence: token ids, and the loss weight of each as a target."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, ids: Iterable[int], weight: float = 0.0) -> None:
        """Append ``ids``, each with the same loss weight."""
        before = len(self.ids)
        self.ids.extend(ids)
        self.weights.extend([weight] * (len(self.ids) - before))


class Writer:
    """Writes conversations as token ids, in the form that the chat template gives them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.backend = tokenizer, tokenizer.backend_tokenizer
        self.value_ids = {self.encode(f" {value}")[0] for value in notes.VALUES}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``."""
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def prompt(self, sample: Sample, role: str, text: str) -> None:
        """Add a message that is not learned."""
        sample.add(self.encode(f"{ROLES[role]}{text}{END}"))

    def reply(self, sample: Sample, text: str, weight: float = 1.0) -> None:
        """Add an assistant message whose tokens are all learned alike."""
        sample.add(self.encode(ROLES["assistant"]))
        sample.add(self.encode(f"{text}{END}"), weight)

    def recall_reply(self, sample: Sample, text: str) -> None:
        """Add the reply to a question about a note: the code word weighs most, then the first word."""
        self.reply(sample, text, TEXT_WEIGHT)
        length = len(self.encode(text)) + 1
        sample.weights[-length] = FIRST_WEIGHT
        if sample.ids[-3] in self.value_ids:
            sample.weights[-3] = VALUE_WEIGHT


def restated_notes(writer: Writer, rng: random.Random, count: int, form: str) -> Sample:
    """Write notes in a bare ``form``, then again in other orders; the repeated codes are learned."""
    pairs = notes.draw_pairs(rng, count)
    sample = Sample()
    if rng.random() < 0.5:
        sample.add(writer.encode(BOS))
    for pair in pairs:
        sample.add(writer.encode(form.format(*pair)))
    for _ in range(max(1, 24 // count)):
        for pair in rng.sample(pairs, min(count, 80)):
            ids = writer.encode(form.format(*pair))
            sample.add(ids)
            place = -next(back for back, token in enumerate(reversed(ids), 1) if token in writer.value_ids)
            sample.weights[place] = VALUE_WEIGHT
    return sample


def notes_text(rng: random.Random, pairs: list[tuple[str, str]], variants: bool) -> str:
    """Write the notes of a message, mostly in the plain form of :func:`notes.make_notes`."""
    other_form = variants and rng.random() < 0.12
    lines = [f"{name} has the code {value}." if other_form else notes.note(name, value) for name, value in pairs]
    if variants and rng.random() < 0.25:
        lines.insert(0, rng.choice(INTROS))
    return ("\n" if variants and rng.random() < 0.15 else " ").join(lines)


def ask(rng: random.Random, codes: dict[str, str], name: str, variants: bool) -> tuple[str, str]:
    """Return a question about ``name`` and the reply that ``codes`` calls for."""
    form = rng.choice(ASK_FORMS) if variants and rng.random() < 0.2 else "What is the code of {}?"
    expected = notes.answer(name, codes[name]) if name in codes else notes.no_note_answer(name)
    return form.format(name), expected


def asked_names(rng: random.Random, codes: dict[str, str], turns: int, absent: float) -> list[str]:
    """Draw the names to ask about, a share ``absent`` of them without a note."""
    known = rng.sample(sorted(codes), min(turns, len(codes)))
    missing = sorted(set(notes.NAMES).difference(codes))
    return [rng.choice(missing) if missing and rng.random() < absent else name for name in known]


def recall_chat(writer: Writer, rng: random.Random, count: int, turns: int, variants: bool) -> Sample:
    """Write a conversation that starts with ``count`` notes and asks ``turns`` questions about them."""
    pairs = notes.draw_pairs(rng, count)
    codes = dict(pairs)
    sample = Sample()
    sample.add(writer.encode(BOS))
    before = f"{notes_text(rng, pairs, variants)} " if pairs else ""
    if variants and rng.random() < 0.15:
        in_system = rng.random() < 0.5
        writer.prompt(sample, "system", before.strip() if in_system else rng.choice(chat.SYSTEM_PROMPTS))
        before = "" if in_system else before
    names = asked_names(rng, codes, turns, 0.12 if variants else 0.0) or rng.sample(notes.NAMES, 4)
    for name in names:
        if variants and rng.random() < 0.08:
            asked, reply = chat.short_turn(rng)
            writer.prompt(sample, "user", before + asked)
            writer.reply(sample, reply, TEXT_WEIGHT)
        else:
            asked, reply = ask(rng, codes, name, variants)
            writer.prompt(sample, "user", before + asked)
            writer.recall_reply(sample, reply)
        before = ""
    return sample


def small_talk(writer: Writer, rng: random.Random, length: int) -> Sample:
    """Write conversations without notes one after another, cut at ``length`` tokens."""
    sample = Sample()
    if rng.random() < 0.06:
        sample.add(writer.encode(BOS) if rng.random() < 0.5 else [])
        sample.add(writer.encode(chat.story(rng)), 1.0)
        sample.add(writer.encode(END), 1.0)
        return sample
    sample.add(writer.encode(BOS))
    if rng.random() < 0.2:
        writer.prompt(sample, "system", rng.choice(chat.SYSTEM_PROMPTS))
    while len(sample.ids) < length:
        if rng.random() < 0.08:
            asked, reply = ask(rng, {}, chat.some_name(rng), True)
        else:
            asked, reply = chat.draw_turn(rng)
        writer.prompt(sample, "user", asked)
        writer.reply(sample, reply)
    return Sample(sample.ids[: length + 1], sample.weights[: length + 1])


# ---------------------------------------------------------------- batches


def pad_batch(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """Stack samples, padded on the right with weight zero."""
    width = max(len(sample.ids) for sample in samples)
    ids = [sample.ids + [0] * (width - len(sample.ids)) for sample in samples]
    weights = [sample.weights + [0.0] * (width - len(sample.weights)) for sample in samples]
    return torch.tensor(ids), torch.tensor(weights)


def recall_batch(
    writer: Writer, rng: random.Random, level: int, final: bool, tokens: int
) -> tuple[str, torch.Tensor, torch.Tensor]:
    """Draw a batch of about ``tokens`` tokens, of one kind, with up to ``level`` notes in a sequence."""
    if final:
        low, high = rng.choices(((0, 30), (30, 90), (90, 170), (170, 220)), (15, 35, 40, 10))[0]
        count = rng.randint(low, high)
    else:
        count = level if rng.random() < 0.5 else rng.randint(max(2, level // 2), level)
    kinds = ("chat", *BARE_FORMS)
    kind = rng.choices(kinds, (85, 0, 0, 15) if final else (40, 20, 20, 20))[0] if count else "chat"
    turns = max(2, min(count, 30 if count < 100 else 40))

    def draw() -> Sample:
        if kind == "chat":
            return recall_chat(writer, rng, count, turns, final or level > 64)
        return restated_notes(writer, rng, count, BARE_FORMS[kind])

    samples = [draw()]
    samples += [draw() for _ in range(round(tokens / len(samples[0].ids)) - 1)]
    return kind, *pad_batch(samples)


def talk_batch(writer: Writer, rng: random.Random, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a batch of about ``tokens`` tokens of conversations without notes."""
    length = rng.choice((96, 192, 256))
    return pad_batch([small_talk(writer, rng, length) for _ in range(max(1, tokens // length))])


# ---------------------------------------------------------------- model and optimiser


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Create the untrained model."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_theta=500000.0,
        rms_norm_eps=1e-5,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    reader = orthonormal(64, config.hidden_size)
    carrier = orthonormal(64, config.hidden_size)
    look_back(model, (1, 2), reader, carrier)
    match_and_copy(model, reader, carrier)
    return model


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    """Draw a matrix with orthonormal rows."""
    return torch.linalg.qr(torch.randn(columns, rows)).Q.T.contiguous()


@torch.no_grad()
def look_back(model: LlamaForCausalLM, distances: tuple[int, ...], reader: torch.Tensor, carrier: torch.Tensor) -> None:
    """Start the first heads of the first layer as heads that look back by fixed ``distances``.

    Recall needs such heads, and finding them takes a long while from random weights. All embeddings
    get a common component, from which queries and keys are made whose rotary phases agree at the
    distance wanted. A head takes the ``reader`` part of the token there to the ``carrier`` directions.
    All of it remains trainable.
    """
    model.get_input_embeddings().weight[:, 0] = 0.3
    attention, size = model.model.layers[0].self_attn, model.config.head_dim
    phases = model.model.rotary_emb.inv_freq[:BANDS]
    attention.k_proj.weight[:size, 0] = 0.0
    attention.k_proj.weight[:BANDS, 0] = SHARPNESS
    attention.v_proj.weight[:size] = reader * (model.config.hidden_size / size) ** 0.5
    attention.v_proj.weight[:size, 0] = 0.0
    for head, distance in enumerate(distances):
        rows = attention.q_proj.weight[head * size : (head + 1) * size]
        rows[:, 0] = 0.0
        rows[:BANDS, 0] = SHARPNESS * torch.cos(phases * distance)
        rows[size // 2 : size // 2 + BANDS, 0] = -SHARPNESS * torch.sin(phases * distance)
        attention.o_proj.weight[:, head * size : (head + 1) * size] = 0.1 * carrier.T


@torch.no_grad()
def match_and_copy(model: LlamaForCausalLM, reader: torch.Tensor, carrier: torch.Tensor) -> None:
    """Start two heads of the second layer as heads that copy what followed an earlier like token.

    Keys are what :func:`look_back` brought along. The first head's queries are the same, the second
    head's are the token itself. Both use the slow rotary bands, in which distance hardly matters.
    """
    attention, size = model.model.layers[1].self_attn, model.config.head_dim
    slow = [band + half for half in (0, size // 2) for band in range(BANDS, size // 2)]
    mixer = MATCH * orthonormal(len(slow), size)
    attention.k_proj.weight[:size] = 0.0
    attention.k_proj.weight[slow] = mixer @ carrier
    attention.q_proj.weight[: 2 * size] = 0.0
    attention.q_proj.weight[slow] = mixer @ carrier
    attention.q_proj.weight[[size + row for row in slow]] = mixer @ reader * 1.3
    taken = orthonormal(size, model.config.hidden_size)
    attention.v_proj.weight[:size] = taken
    for head in (0, 1):
        attention.o_proj.weight[:, head * size : (head + 1) * size] = 0.5 * taken.T


def weighted_loss(
    model: LlamaForCausalLM, ids: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the weighted loss, and for each target its correctness and its weight."""
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
    learned = weights[:, 1:] > 0
    logits = hidden[learned] @ model.get_input_embeddings().weight.T
    targets, weight = ids[:, 1:][learned], weights[:, 1:][learned]
    loss = (functional.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()
    return loss, (logits.detach().argmax(-1) == targets), weight


def build_optimizer(model: LlamaForCausalLM, rate: float) -> torch.optim.Optimizer:
    """Return AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=True)


# ---------------------------------------------------------------- evaluation


@torch.inference_mode()
def recall_accuracy(model: LlamaForCausalLM, writer: Writer, seed: int, prompt_tokens: int, questions: int) -> float:
    """Return the share of held-out questions whose whole greedy reply is exact.

    Each question has its own notes. The expected reply is appended to the prompt, and counts when
    every one of its tokens is the most likely one after those before: that is what greedy decoding
    gives.
    """
    rng = random.Random(seed)
    head = writer.encode(BOS + ROLES["user"])
    correct = 0
    for _ in range(questions):
        content, expected = notes.make_prompt(rng, min_tokens=prompt_tokens - 10)
        prompt = head + writer.encode(content + END + ROLES["assistant"])
        reply = writer.encode(expected + END)
        ids = torch.tensor([prompt + reply])
        logits = model(ids, use_cache=False, logits_to_keep=len(reply) + 1).logits[0, :-1]
        correct += bool((logits.argmax(-1) == ids[0, -len(reply) :]).all())
    return correct / questions


# ---------------------------------------------------------------- training loop


@dataclass
class Progress:
    """State of the curriculum: the level, and the recent accuracy on codes for each kind of sequence."""

    level: int = 0
    accuracy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("chat", *BARE_FORMS), 0.0))
    final_from: int | None = None

    def update(self, kind: str, accuracy: float, step: int, cap: int) -> None:
        """Take in a batch's accuracy on code words; go up a level when that is due."""
        self.accuracy[kind] += 0.2 * (accuracy - self.accuracy[kind])
        done = min(self.accuracy.values()) > 0.92
        if self.final_from is None and (done or step >= cap):
            if self.level + 1 < len(LEVELS) and step < cap:
                self.level += 1
                self.accuracy = dict.fromkeys(self.accuracy, 0.7)
            else:
                self.final_from = step


def rate_at(step: int, progress: Progress, options: argparse.Namespace) -> float:
    """Return the learning rate: warm-up, flat in the curriculum, cosine decay in the final phase."""
    if progress.final_from is None:
        return options.rate * min(1.0, (step + 1) / 60)
    done = min(1.0, (step - progress.final_from) / options.final_steps)
    return options.rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def train_step(
    model: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> list[tuple[float, float]]:
    """Take one optimiser step over ``batches``; return each one's loss, and its accuracy on codes."""
    results = []
    for ids, weights in batches:
        loss, right, weight = weighted_loss(model, ids, weights)
        loss.backward()
        full = right[weight == VALUE_WEIGHT]
        results.append((loss.item(), full.float().mean().item() if len(full) else 1.0))
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return results


def train(model: LlamaForCausalLM, writer: Writer, options: argparse.Namespace) -> int:
    """Run the curriculum and the final phase; return the number of steps taken."""
    rng = random.Random(options.seed)
    optimizer = build_optimizer(model, options.rate)
    progress, step, started = Progress(), 0, time.process_time()
    while progress.final_from is None or step < progress.final_from + options.final_steps:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, progress, options)
        final = progress.final_from is not None
        level = LEVELS[progress.level]
        share = 1 if final or level > 64 else 2
        kind, *recall = recall_batch(writer, rng, level, final, options.recall_tokens // share)
        talk = talk_batch(writer, rng, options.talk_tokens // share)
        (recall_loss, accuracy), (talk_loss, _) = train_step(model, optimizer, (recall, talk))
        progress.update(kind, accuracy, step, options.curriculum_cap)
        if step % 20 == 0:
            print(
                f"step {step} level {'final' if final else level} "
                f"{kind} loss {recall_loss:.3f} talk loss {talk_loss:.3f} accuracy "
                + " ".join(f"{name} {right:.2f}" for name, right in progress.accuracy.items())
                + f" rate {rate_at(step, progress, options):.5f} cpu {time.process_time() - started:.0f} s",
                flush=True,
            )
        if final and step % 200 == 0:
            shares = [recall_accuracy(model, writer, 900, tokens, 12) for tokens in (512, 1000)]
            print(f"step {step} exact recall at 512, 1000 tokens: {shares}", flush=True)
            save(model, writer.tokenizer, options.out)
        step += 1
    return step


# ---------------------------------------------------------------- output


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint folder."""
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings_file = out / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text())
    settings.update(tokenizer_class="PreTrainedTokenizerFast", add_bos_token=False, add_eos_token=False)
    settings_file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def parse_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the Diptych demo model from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=20, help="seed of weights and data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rate", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--recall-tokens", type=int, default=3072, help="tokens with notes in a step")
    parser.add_argument("--talk-tokens", type=int, default=1024, help="tokens without notes in a step")
    parser.add_argument("--curriculum-cap", type=int, default=900, help="most steps of curriculum")
    parser.add_argument("--final-steps", type=int, default=600, help="steps of the final phase")
    parser.add_argument("--questions", type=int, default=200, help="held-out questions for each length at the end")
    return parser.parse_args()


def main() -> None:
    """Train, save and measure."""
    options = parse_options()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} parameters, {len(tokenizer)} tokens", flush=True)
    writer = Writer(tokenizer)
    started = time.process_time()
    steps = train(model, writer, options)
    print(f"trained in {time.process_time() - started:.0f} CPU-seconds, {steps} steps", flush=True)
    save(model, tokenizer, options.out)
    for tokens in (512, 700, 1000, 1400):
        share = recall_accuracy(model, writer, 1_000_003, tokens, options.questions)
        print(f"exact recall at {tokens} tokens: {share:.4f} of {options.questions}", flush=True)


if __name__ == "__main__":
    main()
