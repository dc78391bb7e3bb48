"""The seam between deciding and computing: what a worker's driver asks of whatever runs the model.

Implementations: `torch_executor.TorchExecutor` (the real one) and `paced.PacedExecutor` (real KV bytes, slept time).
An executor keeps the token ids and block tables of the sequences it was told of, and nothing else: it
decides nothing, and never sees a request's history beyond its tokens.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol

from msgspec import Meta

from diptych.policy.messages import Run
from diptych.transfer.pool import Pool

Pooling = Literal["", "last", "mean", "labels"]
"""What is wanted after a prompt: a token (""), its last or mean hidden state, or what a classifier says of it."""


_Id = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
_Top = Annotated[int, Meta(ge=-1, le=100)]
_Share = Annotated[float, Meta(ge=0.0, le=1.0)]
_Shift = Annotated[float, Meta(ge=-100.0, le=100.0)]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a sequence's next token. A function of these, the seed, the position, the tokens and the logits.

    temperature 0 is greedy. `top_k` 0, `top_p` 1.0, `min_p` 0.0 are off. `stop_ids` end the sequence and are not among
    the first `min_new` tokens; the executor reports such an end, the policy knows `max_new`.
    `repetition_penalty` (1.0 is off) looks at prompt and answer, the other two (0.0 is off) at the answer alone.
    Whoever decodes one from a socket gets these ranges checked; that ids are the model's is for the receiver.
    """

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    top_k: _Count = 0
    top_p: _Share = 1.0
    seed: int = 0
    stop_ids: tuple[_Id, ...] = ()
    min_new: _Count = 0
    min_p: _Share = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100.0)] = 1.0
    presence_penalty: _Shift = 0.0
    frequency_penalty: _Shift = 0.0
    logit_bias: tuple[tuple[_Id, _Shift], ...] = ()  # (token id, what is added to its logit), each id once
    allowed_ids: tuple[_Id, ...] = ()  # no other token is written; () is any
    logprobs: _Top = -1  # report each new token's log-probability, and those of so many most likely ones; -1 is off
    grammar: str = ""  # what the answer must be, in llguidance's form; "" is anything
    prompt_logprobs: _Top = -1  # the same for the tokens of the prompt that are computed
    pooling: Pooling = ""  # what is wanted after the prompt instead of a token


class Score(NamedTuple):
    """Log-probabilities at one place of a text: of the token that is there (first), then of the most likely ones.

    As the model gave them, before temperature, penalties or any other shaping. `rank` 1: there was none more likely.
    """

    rank: int
    ids: bytes  # int32
    values: bytes  # float32, one for each id


@dataclass(slots=True)
class Result:
    """What a step yielded: for each slice with `sample`, in order, (rid, token, ended by a stop id).

    `scores`: by rid, of the token just sampled, where asked for. `prompt_scores`: by rid, of prompt tokens, with the
    position of the first of them. `vectors`: by rid, float32, in place of a token where the sequence asks for pooling.
    """

    tokens: list[tuple[int, int, bool]] = field(default_factory=list)
    elapsed_s: float = 0.0
    scores: dict[int, Score] = field(default_factory=dict)
    prompt_scores: dict[int, tuple[int, list[Score]]] = field(default_factory=dict)
    vectors: dict[int, bytes] = field(default_factory=dict)


class Executor(Protocol):
    """Runs steps over a paged pool. Calls come from one thread; `collect` blocks until its step is done.

    Up to two steps may be in flight: a slice launched before its predecessor was collected means by
    "last known token" the one the earlier step will sample. `pool` is the memory the KV lives in.
    """

    pool: Pool

    def admit(self, rid: int, tokens: list[int], num_prompt: int, sampling: Sampling) -> None:
        """Make a sequence known: its token ids so far (prompt, then generated). Costs no compute."""

    def extend(self, rid: int, tokens: list[int]) -> None:
        """Append token ids computed elsewhere (the first token, sampled by the prefill side)."""

    def tokens(self, rid: int) -> list[int]:
        """All token ids of a sequence known by now (a live list: do not change it)."""

    def forget(self, rid: int) -> None:
        """Drop everything known of a sequence; unknown ids are ignored."""

    def truncate(self, rid: int, num_tokens: int) -> None:
        """Keep only the first `num_tokens` token ids of a sequence."""

    def launch(self, step: Run) -> Any:
        """Start a step; returns a handle for `collect`."""

    def collect(self, handle: Any) -> Result:
        """Wait for a launched step and return what it sampled."""
