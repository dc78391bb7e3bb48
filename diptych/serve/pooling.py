"""The dialects of embeddings (OpenAI's), scores (vLLM's), reranking (Jina's and Cohere's) and classes (vLLM's).

What a body may say, what it comes down to in prompts, and what is made of the vectors that come back. Fields unknown to
us are ignored; known ones that would change the result and are not supported are refused. Not responsible for HTTP
(`retrieval.py`), nor for computing anything but a few numbers of each vector.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from diptych.engine.executor import Pooling, Sampling
from diptych.errors import BadRequest
from diptych.serve.frontend import Job, ModelCard
from diptych.serve.intake import check_size
from diptych.serve.openai import Prompt, check_prompt, listed, too_long
from diptych.serve.text import Text, prompt_hashes

Vector = NDArray[np.float32]
Inputs = str | list[str | int | list[int]]
Texts = str | list[str]

MAX_INPUTS = 2048  # in one request, as OpenAI has it


class _Common(msgspec.Struct, kw_only=True):
    """What every body may say."""

    model: str | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_salt: str | None = None
    truncate_prompt_tokens: int | None = None  # refused: a text that is cut silently has another vector


class EmbeddingCall(_Common, kw_only=True):
    """The body of `/v1/embeddings`. `pooling` is ours; `normalize` is vLLM's, and `use_activation` its newer name."""

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    normalize: bool | None = None
    use_activation: bool | None = None
    pooling: Literal["last", "mean"] | None = None
    add_special_tokens: bool | None = None


class ScoreCall(_Common, kw_only=True):
    """The body of `/v1/score`: one pair of names, each with a text or several."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    use_activation: bool | None = None


class Document(msgspec.Struct, frozen=True):
    """A document of a reranking."""

    text: str


class RerankCall(_Common, kw_only=True):
    """The body of `/v1/rerank`."""

    query: str
    documents: list[str | Document]
    top_n: Annotated[int, Meta(ge=0)] | None = None
    return_documents: bool | None = None
    use_activation: bool | None = None
    max_tokens_per_doc: int | None = None  # refused, likewise


class ClassifyCall(_Common, kw_only=True):
    """The body of `/v1/classify`."""

    input: Inputs
    use_activation: bool | None = None
    add_special_tokens: bool | None = None


class PromptUsage(msgspec.Struct, frozen=True):
    """Nothing is written, so both are the tokens of all that was computed."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, frozen=True):
    """One vector: numbers, or base64 of little-endian float32."""

    index: int
    embedding: list[float] | str
    object: str = "embedding"


class Embeddings(msgspec.Struct, frozen=True):
    """What `/v1/embeddings` answers."""

    id: str
    created: int
    model: str
    data: list[Embedding]
    usage: PromptUsage
    object: str = "list"


class Score(msgspec.Struct, frozen=True):
    """Of one pair."""

    index: int
    score: float
    object: str = "score"


class Scores(msgspec.Struct, frozen=True):
    """What `/v1/score` answers."""

    id: str
    created: int
    model: str
    data: list[Score]
    usage: PromptUsage
    object: str = "list"


class Ranked(msgspec.Struct, frozen=True, omit_defaults=True):
    """A document's place in a reranking, and its index in the request."""

    index: int
    relevance_score: float
    document: Document | None = None


class Reranked(msgspec.Struct, frozen=True):
    """What `/v1/rerank` answers, the most relevant document first."""

    id: str
    model: str
    results: list[Ranked]
    usage: PromptUsage


class Class(msgspec.Struct, frozen=True):
    """What one input is, and how probable each label is."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classes(msgspec.Struct, frozen=True):
    """What `/v1/classify` answers."""

    id: str
    created: int
    model: str
    data: list[Class]
    usage: PromptUsage
    object: str = "list"


# --- what a request comes down to --------------------------------------------------------------------------------


def refuse_cuts(**asked: int | None) -> None:
    """Refuse fields that ask for texts to be cut."""
    for name, value in asked.items():
        if value:
            raise BadRequest(f"'{name}' is not supported: cut the text yourself", name, "unsupported_parameter")


def check_embeds(card: ModelCard, pooling: str | None, dimensions: int | None) -> Pooling:
    """How to make an embedding; BadRequest where this checkpoint has none of that kind."""
    if card.task == "classify":
        raise BadRequest(
            "this model classifies texts and has no embeddings; use /v1/score, /v1/rerank or /v1/classify",
            "model",
            "unsupported_model",
        )
    chosen = pooling or card.pooling
    if chosen not in ("last", "mean"):
        raise BadRequest(
            "this checkpoint makes embeddings in a way that is not supported (its modules.json); "
            "'pooling' may say 'last' or 'mean'",
            "pooling",
        )
    if dimensions is not None and dimensions != card.width:
        _check_dimensions(card, dimensions)
    return chosen  # type: ignore[return-value]  # a str by its source, one of the two by now


def _check_dimensions(card: ModelCard, dimensions: int) -> None:
    if card.matryoshka is None:
        what = f"this model was not trained for shorter embeddings; 'dimensions' can only be {card.width}"
    elif dimensions > card.width:
        what = f"'dimensions' is {dimensions}, and embeddings of this model have {card.width}"
    elif card.matryoshka and dimensions not in card.matryoshka:
        what = f"'dimensions' must be one of {', '.join(map(str, card.matryoshka))}, or {card.width}"
    else:
        return
    raise BadRequest(what, "dimensions")


def check_classifies(card: ModelCard) -> None:
    """Refuse to classify where the checkpoint has no labels."""
    if card.task != "classify":
        raise BadRequest("this model has no labels; it is not a classifier", "model", "unsupported_model")


def encode(inputs: Inputs, special: bool, text: Text, card: ModelCard, param: str = "input") -> list[list[int]]:
    """Each input's token ids; BadRequest for what is empty or too long."""
    if not inputs:
        raise BadRequest(f"'{param}' must not be empty", param)
    return [_fitting(_ids(each, special, text, card, param), card, param) for each in listed(inputs, MAX_INPUTS, param)]


def _ids(given: Prompt, special: bool, text: Text, card: ModelCard, param: str) -> list[int]:
    if not given:
        raise BadRequest(f"'{param}' must not be empty, nor have anything empty in it", param)
    if isinstance(given, list):
        return given
    check_size(len(given), text, card, param)
    return text.encode(given, special)


def _fitting(tokens: list[int], card: ModelCard, param: str) -> list[int]:
    check_prompt(tokens, card, param)
    if len(tokens) > card.max_tokens:
        raise too_long(f"the text has {len(tokens)} tokens", card, param)
    return tokens


@dataclass(frozen=True, slots=True)
class Comparison:
    """Pairs of texts as prompts, and how what comes of the prompts becomes one score for each pair.

    With a classifier of one label (a cross-encoder) every pair is a prompt: both texts, joined as the tokenizer joins
    pairs. Otherwise every text is a prompt, the first texts before the second ones, and a score is the cosine of two
    embeddings. One first text is compared with all second ones.
    """

    prompts: list[list[int]]
    pooling: Pooling
    num_first: int  # texts among the prompts that are the first of a pair; 0 where a prompt is a pair

    def scores(self, vectors: Sequence[Vector], activate: bool = True) -> list[float]:
        """One for each pair. `activate`: a cross-encoder's are squeezed into 0 .. 1 by the logistic function."""
        if self.num_first == 0:
            return [float((probabilities(vector) if activate else vector)[0]) for vector in vectors]
        firsts, seconds = vectors[: self.num_first], vectors[self.num_first :]
        return [cosine(firsts[i % self.num_first], second) for i, second in enumerate(seconds)]


def compare(
    firsts: Sequence[str], seconds: Sequence[str], text: Text, card: ModelCard, params: Sequence[str]
) -> Comparison:
    """Make a Comparison; `params` are the names of both sides in an error. Raises BadRequest."""
    for texts, param in zip((firsts, seconds), params, strict=True):
        if not texts or not all(texts):
            raise BadRequest(f"'{param}' must not be empty, nor have an empty text in it", param)
        for each in texts:
            check_size(len(each), text, card, param)
    if len(firsts) not in (1, len(seconds)):
        raise BadRequest(f"{len(firsts)} and {len(seconds)} texts: give one and several, or as many of both", params[0])
    if len(seconds) > MAX_INPUTS:
        raise BadRequest(f"at most {MAX_INPUTS} pairs in one request", params[1])
    if card.task == "classify":
        return Comparison(_paired(firsts, seconds, text, card, params[1]), "labels", 0)
    pooling = check_embeds(card, None, None)
    prompts = [_fitting(text.encode(each), card, param) for each, param in _sides(firsts, seconds, params)]
    return Comparison(prompts, pooling, len(firsts))


def _paired(firsts: Sequence[str], seconds: Sequence[str], text: Text, card: ModelCard, param: str) -> list[list[int]]:
    if len(card.labels) != 1:
        raise BadRequest(
            f"this model has {len(card.labels)} labels; a score needs one. Use /v1/classify",
            "model",
            "unsupported_model",
        )
    pairs = ((firsts[i % len(firsts)], second) for i, second in enumerate(seconds))
    return [_fitting(text.encode_pair(*pair), card, param) for pair in pairs]


def _sides(firsts: Sequence[str], seconds: Sequence[str], params: Sequence[str]) -> list[tuple[str, str]]:
    return [*((each, params[0]) for each in firsts), *((each, params[1]) for each in seconds)]


_SCORE_NAMES = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))


def sides(call: ScoreCall) -> tuple[list[str], list[str], tuple[str, str]]:
    """The first texts of a score's body, the second ones, and their names."""
    given = {name for names in _SCORE_NAMES for name in names if getattr(call, name) is not None}
    for names in _SCORE_NAMES:
        if given == set(names):
            first, second = (getattr(call, name) for name in names)
            return _as_list(first), _as_list(second), names
    raise BadRequest("give 'text_1' and 'text_2', or 'queries' and 'documents', and nothing else", "text_1")


def _as_list(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def jobs(prompts: Sequence[list[int]], pooling: Pooling, call: _Common, card: ModelCard) -> list[Job]:
    """Prompts that are to be pooled. A mean needs every token computed, so nothing of its prompt may be found."""
    made = []
    for tokens in prompts:
        root, hashes = prompt_hashes(tokens, card, call.cache_salt or "")
        found = () if pooling == "mean" else hashes
        made.append(Job(tokens, 0, Sampling(pooling=pooling), call.priority or 0, root, found))
    return made


# --- what is made of a vector ------------------------------------------------------------------------------------


def shaped(vector: Vector, dimensions: int | None = None, normalize: bool = True) -> Vector:
    """The first `dimensions` numbers (Kusupati et al., "Matryoshka representation learning", 2022), of length 1."""
    vector = vector[:dimensions]
    return vector / max(float(np.linalg.norm(vector)), 1e-12) if normalize else vector


def cosine(one: Vector, other: Vector) -> float:
    """The cosine of the angle between two vectors."""
    return float(np.dot(shaped(one), shaped(other)))


def probabilities(logits: Vector) -> NDArray[np.float64]:
    """The logistic function of a single logit, the softmax of several: as transformers and vLLM do by default."""
    wide = logits.astype(np.float64)
    if len(wide) == 1:
        return 0.5 + 0.5 * np.tanh(0.5 * wide)
    powers = np.exp(wide - wide.max())
    return np.asarray(powers / powers.sum())


def encoded(vector: Vector, form: str | None) -> list[float] | str:
    """A vector as a reply has it."""
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers


def usage(prompts: Sequence[Sequence[Any]]) -> PromptUsage:
    """The tokens of all prompts."""
    total = sum(map(len, prompts))
    return PromptUsage(total, total)
