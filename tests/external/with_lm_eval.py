"""lm-eval's `local-completions` against a server, and its `hf` on the same checkpoint: python with_lm_eval.py URL

Three tiny tasks of the bundled model's own world: multiple choice, perplexity, answers. Their numbers must be the same.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from rows import Rows

from diptych.config import DEMO
from diptych.demo.notes import make_notes

TASKS = Path(__file__).parent / "tasks"
NUM_ITEMS = 40
TOLERANCE = 2e-3  # of one item's log-likelihood in float32, a sum over its tokens
scenario = Rows("lm-eval")


def write_data() -> None:
    """Questions about notes with four choices, and texts, into the current folder."""
    rng = random.Random(4)
    items, texts = [], []
    for _ in range(NUM_ITEMS):
        notes, pairs = make_notes(rng, 8)
        chosen = rng.sample(pairs, 4)
        question = f"<|user|>{notes} {chosen[0][0]}<|end|><|assistant|>"
        choices = [answer for _, answer in chosen]
        correct = choices[0]
        rng.shuffle(choices)
        items.append({"question": question, "choices": choices, "answer": choices.index(correct)})
        texts.append({"text": notes})
    Path("recall.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    Path("stories.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))


def evaluate(model: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """All tasks with one of lm-eval's models."""
    tasks = ["diptych_recall", "diptych_stories", "diptych_answers"]
    return simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )


write_data()
theirs = evaluate("hf", {"pretrained": str(DEMO), "dtype": "float32", "device": "cpu", "batch_size": 4})
ours = evaluate(
    "local-completions",
    {
        "model": "diptych-demo",
        "base_url": f"{sys.argv[1]}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(DEMO),
        "num_concurrent": 4,
        "max_length": 8192,
    },
)


def samples(results: dict[str, Any], task: str) -> list[Any]:
    """What each item yielded, in order."""
    found = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in found]


def metrics(results: dict[str, Any], task: str) -> dict[str, float]:
    """The task's numbers."""
    return {k: v for k, v in results["results"][task].items() if isinstance(v, float) and "stderr" not in k}


def same_metrics(task: str) -> None:
    here, there = metrics(ours, task), metrics(theirs, task)
    print(f"      {task}: hf {there}, served {here}")
    assert here.keys() == there.keys() and here
    assert all(abs(here[key] - there[key]) <= 1e-3 * max(1.0, abs(there[key])) for key in here)


@scenario
def multiple_choice_of_forty_items() -> None:
    same_metrics("diptych_recall")
    assert metrics(ours, "diptych_recall")["acc,none"] > 0.5, "a model that guesses proves nothing"
    worst = 0.0
    for mine, other in zip(samples(ours, "diptych_recall"), samples(theirs, "diptych_recall"), strict=True):
        for (logprob, greedy), (expected, expected_greedy) in zip(mine, other, strict=True):
            worst = max(worst, abs(logprob - expected))
            assert greedy == expected_greedy
    print(f"      largest difference of a log-likelihood: {worst:.2e}")
    assert worst < TOLERANCE


@scenario
def perplexity() -> None:
    same_metrics("diptych_stories")


@scenario
def answers() -> None:
    same_metrics("diptych_answers")
    assert samples(ours, "diptych_answers") == samples(theirs, "diptych_answers")


scenario.run()
