"""The bundled demo model: its generators, tokenizer, chat template, and what it can do."""

from __future__ import annotations

import json
import random

import pytest

from diptych.demo import DEMO_DIR, chat, faq, notes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer():
    """The bundled tokenizer."""
    return transformers.AutoTokenizer.from_pretrained(DEMO_DIR)


@pytest.fixture(scope="module")
def model():
    """The bundled model."""
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO_DIR, dtype=torch.float32).eval()


def prompt_ids(tokenizer, content: str) -> list[int]:
    """Render one user message as the ids of a prompt."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return tokenizer.encode(text, add_special_tokens=False)


def reply(model, tokenizer, content: str, limit: int = 160, **settings) -> str:
    """Generate the reply to one user message, greedily unless told otherwise."""
    ids = torch.tensor([prompt_ids(tokenizer, content)])
    settings = {"do_sample": False, **settings}
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, **settings)
    assert out[0, -1] == tokenizer.eos_token_id, "the reply did not end"
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_notes_are_reproducible_and_consistent():
    text, pairs = notes.make_notes(random.Random(5), 40)
    assert (text, pairs) == notes.make_notes(random.Random(5), 40)
    assert len(pairs) == 40 == len({asked for asked, _ in pairs})
    assert text == " ".join(expected for _, expected in pairs)


@pytest.mark.parametrize("settings", [{}, {"num_notes": 3, "min_tokens": 9}, {"num_notes": notes.MAX_NOTES + 1}])
def test_notes_reject_bad_sizes(settings):
    with pytest.raises(ValueError):
        notes.make_notes(random.Random(0), **settings)


def test_words_are_single_tokens(tokenizer):
    for word in notes.NAMES + notes.VALUES + chat.ANIMALS:
        assert len(tokenizer.encode(f" {word}", add_special_tokens=False)) == 1, word
    text, pairs = notes.make_notes(random.Random(1), min_tokens=512)
    count = len(tokenizer.encode(text, add_special_tokens=False))
    assert count == notes.TOKENS_PER_NOTE * len(pairs) >= 512


@pytest.mark.parametrize(
    "text",
    [
        "The code of Mira is amber.",
        "  leading, trailing and   inner spaces \n\n\t tabs ",
        "Zwölf Boxkämpfer, naïve façade, 日本語, русский, العربية, 🎉👩‍👩‍👧",
        "def f(x): return x ** 2  # 'quoted' \"text\" it's\r\n",
        "\u0000\u200b\ufffd combining e\u0301",
        "",
    ],
)
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_random_unicode_round_trips(tokenizer):
    rng = random.Random(3)
    for _ in range(50):
        points = (rng.choice((0x7F, 0x7FF, 0xD7FF, 0x1FFFF)) for _ in range(40))
        text = "".join(chr(point) for point in map(rng.randrange, points) if not 0xD800 <= point < 0xE000)
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_chat_template(tokenizer):
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|bos|><|system|>Answer briefly.<|end|><|user|>Hello<|end|><|assistant|>Hello!<|end|>"
        "<|user|>Who are you?<|end|><|assistant|>"
    )
    without = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == without + "<|assistant|>"


def test_checkpoint_settings(tokenizer, model):
    config = json.loads((DEMO_DIR / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] and config["max_position_embeddings"] == 8192
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"]
    assert config["head_dim"] % 16 == 0
    for settings in (model.config, model.generation_config):
        assert settings.eos_token_id == tokenizer.eos_token_id
        assert settings.bos_token_id == tokenizer.bos_token_id
        assert settings.pad_token_id == tokenizer.pad_token_id
    assert sum(file.stat().st_size for file in DEMO_DIR.iterdir() if file.is_file()) < 6_000_000


@pytest.mark.parametrize(("tokens", "questions"), [(520, 20), (1000, 10)])
def test_recall_over_long_prompts(model, tokenizer, tokens, questions):
    rng = random.Random(77_000 + tokens)
    right = 0
    for _ in range(questions):
        content, expected = notes.make_prompt(rng, min_tokens=tokens)
        assert len(prompt_ids(tokenizer, content)) >= tokens
        right += reply(model, tokenizer, content, limit=12) == expected
    assert right >= 0.95 * questions


def test_says_when_there_is_no_note(model, tokenizer):
    text, _ = notes.make_notes(random.Random(9), 20)
    missing = [name for name in notes.NAMES if name not in text][:6]
    replies = [reply(model, tokenizer, f"{text} {notes.question(name)}", limit=20) for name in missing]
    expected = [notes.no_note_answer(name) for name in missing]
    assert sum(said == wanted for said, wanted in zip(replies, expected, strict=True)) >= 5


@pytest.mark.parametrize("entry", faq.FAQS, ids=lambda entry: entry.questions[0])
def test_answers_its_questions(model, tokenizer, entry):
    assert reply(model, tokenizer, entry.questions[0]) == entry.answer


def test_tells_a_story_about_the_animal_asked_for(model, tokenizer):
    said = reply(model, tokenizer, "Tell me a story about a fox.")
    assert said.count("fox") >= 3
    assert said.endswith(".")
    assert 50 <= len(tokenizer.encode(said, add_special_tokens=False)) <= 130


def test_counts_up(model, tokenizer):
    assert reply(model, tokenizer, "Count from 3 to 12.").startswith("3, 4, 5, 6, 7, 8, 9, 10, 11, 12")


def test_knows_what_it_does_not_know(model, tokenizer):
    assert reply(model, tokenizer, "What is the capital of France?") == faq.UNKNOWN


def test_sampled_text_is_made_of_known_words(model, tokenizer):
    torch.manual_seed(4)
    known = {word for text in chat.fixed_texts() for word in text.replace('"', " ").split()}
    said = reply(model, tokenizer, "Tell me a story about an owl.", do_sample=True, temperature=0.7)
    words = said.replace('"', " ").split()
    assert sum(word in known for word in words) >= 0.95 * len(words)
