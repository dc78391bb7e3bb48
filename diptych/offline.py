"""`LLM`: a whole cluster inside one Python process, for scripts and notebooks. A few lines are enough:

    from diptych import LLM
    llm = LLM("demo", prefill=1, decode=1)
    print(llm.generate("The fox").text)
    print(llm.score("The fox", ["A fox", "The code"]))

The same policy, engine and handover as `diptych serve`; steps run one after the other, so pairs show how things work
and give no speed. Not responsible for serving several users at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, overload

import numpy as np

from diptych.config import load_cluster
from diptych.engine.executor import Pooling, Sampling
from diptych.errors import BadRequest
from diptych.modelfacts import locate
from diptych.serve.build import build
from diptych.serve.local import Answer, LocalCluster
from diptych.serve.openai import check_writes
from diptych.serve.pooling import Vector, check_embeds, compare, encode, shaped
from diptych.serve.text import Text

Prompt = str | list[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """An answer: its text and token ids, and why it ended ("stop" or "length")."""

    text: str
    tokens: list[int]
    reason: str


class LLM:
    """A model, served by `mixed` workers or by `prefill` and `decode` ones (default: one mixed worker).

    Other keywords are those of cluster.toml, for example `chunk`, `dtype` or `kv_memory`. Raises ConfigError.
    """

    def __init__(self, model: str = "demo", *, prefill: int = 0, decode: int = 0, mixed: int = 0, **settings: Any):
        if not (prefill or decode or mixed):
            mixed = 1
        topology = {"prefill": prefill or None, "decode": decode or None, "mixed": mixed or None}
        config = load_cluster(None, {"model": model, **topology, **settings})
        self.text = Text.load(locate(config.folder))
        self.cluster = LocalCluster([build(config, worker) for worker in config.workers])

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @overload
    def generate(self, prompts: Prompt, max_tokens: int = 64, **sampling: Any) -> Completion: ...
    @overload
    def generate(self, prompts: Sequence[Prompt], max_tokens: int = 64, **sampling: Any) -> list[Completion]: ...
    def generate(
        self, prompts: Prompt | Sequence[Prompt], max_tokens: int = 64, **sampling: Any
    ) -> Completion | list[Completion]:
        """Continue one prompt, or several at once. `sampling`: temperature (default 0), and all that `Sampling` has."""
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            return self._run([prompts], max_tokens, sampling)[0]  # type: ignore[list-item]
        return self._run(list(prompts), max_tokens, sampling)  # type: ignore[arg-type]

    def chat(self, messages: list[dict[str, Any]], max_tokens: int = 256, **sampling: Any) -> Completion:
        """Answer a conversation."""
        return self._run([self.text.encode_chat(messages)], max_tokens, sampling)[0]

    @overload  # a str is a sequence of str too
    def embed(  # type: ignore[overload-overlap]
        self, prompts: Prompt, *, pooling: str | None = None, normalize: bool = True
    ) -> Vector: ...
    @overload
    def embed(
        self, prompts: Sequence[Prompt], *, pooling: str | None = None, normalize: bool = True
    ) -> list[Vector]: ...
    def embed(
        self, prompts: Prompt | Sequence[Prompt], *, pooling: str | None = None, normalize: bool = True
    ) -> Vector | list[Vector]:
        """The embedding of one prompt, or of several at once: float32 [hidden]. `pooling`: "last" or "mean"."""
        how = check_embeds(self.cluster.card, pooling, None)
        vectors = self._pool(encode(prompts, True, self.text, self.cluster.card, "prompts"), how)  # type: ignore[arg-type]
        shown = [shaped(vector, normalize=normalize) for vector in vectors]
        return shown[0] if isinstance(prompts, str) or isinstance(prompts[0], int) else shown

    def score(self, first: str | Sequence[str], second: str | Sequence[str]) -> list[float]:
        """How well each second text goes with the first one, or with the first one of its pair (`/v1/score`)."""
        firsts, seconds = ([texts] if isinstance(texts, str) else texts for texts in (first, second))
        compared = compare(firsts, seconds, self.text, self.cluster.card, ("first", "second"))
        return compared.scores(self._pool(compared.prompts, compared.pooling))

    def close(self) -> None:
        """Give the memory back."""
        self.cluster.close()

    def _pool(self, prompts: list[list[int]], how: Pooling) -> list[Vector]:
        sampling = Sampling(pooling=how)
        answers = [self.cluster.submit(tokens, 0, sampling, find=how != "mean") for tokens in prompts]
        self.cluster.run_until(answers)
        for answer in answers:
            if answer.error is not None:
                raise answer.error
        return [np.frombuffer(answer.vector, np.float32) for answer in answers]

    def _run(self, prompts: list[Prompt], max_tokens: int, sampling: dict[str, Any]) -> list[Completion]:
        check_writes(self.cluster.card)
        how = Sampling(**{"stop_ids": self.cluster.card.stop_ids, **sampling})
        answers = []
        for prompt in prompts:
            tokens = self.text.encode(prompt) if isinstance(prompt, str) else prompt
            limit = self.cluster.card.max_tokens
            if len(tokens) + max_tokens > limit:
                raise BadRequest(f"{len(tokens)} prompt tokens and {max_tokens} new ones are more than {limit}")
            answers.append(self.cluster.submit(tokens, max_tokens, how))
        self.cluster.run_until(answers)
        return [self._completion(answer) for answer in answers]

    def _completion(self, answer: Answer) -> Completion:
        if answer.error is not None:
            raise answer.error
        return Completion(self.text.decode(answer.tokens), answer.tokens, str(answer.reason))
