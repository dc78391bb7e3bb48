"""Which model families give `generate()`'s tokens in which mode, why others are refused, and which features are alike.

    python benchmarks/conformance.py [--families llama,gemma2] [--no-features] [--markdown] > docs/conformance.md

Runs every family of `tests/checkpoints.py` as a tiny random checkpoint in fp32 through whole clusters in this process,
five prompts at once, and compares greedy tokens; KV crosses by copy, by shared memory and by TCP. A difference counts
as a tie only where the reference's two best logits are closer than 1e-4. Then every way of asking of `tests/ways.py`
is put to live servers of the bundled model in each mode, and the replies are compared with the unified one's. Takes
some three minutes. Exits with 1 where something differs. Not responsible for speed or low precision; in the suite
`tests/test_models.py` and `tests/test_live_tcp.py` hold the same.
"""

import argparse
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import httpx
import torch
import transformers
from checkpoints import FAMILIES, REFUSED, make_checkpoint
from clusters import live
from reference import Expected, Reference, answers
from ways import WAYS, ask, difference

from diptych.errors import ConfigError

LENGTHS = (1, 5, 17, 40, 110)
NUM_NEW = 24
MODES: dict[str, dict[str, Any]] = {
    "unified": {"mixed": 1, "chunk": "off"},
    "chunked, 32": {"mixed": 1, "chunk": 32},
    "chunked, 100": {"mixed": 1, "chunk": 100},
    "disaggregated": {"prefill": 1, "decode": 1, "chunk": "off"},
    "disaggregated, 32": {"prefill": 1, "decode": 1, "chunk": 32},
    "the same, shm": {"prefill": 1, "decode": 1, "chunk": 32, "lane": "shm"},
    "the same, TCP": {"prefill": 1, "decode": 1, "chunk": 32, "lane": "tcp"},
}
LIVE: dict[str, dict[str, Any]] = {
    "unified": {"mixed": 1, "chunk": "off"},
    "chunked, 32": {"mixed": 1, "chunk": 32},
    "disaggregated, shm": {"prefill": 1, "decode": 1, "chunk": "off", "transport": "shm"},
    "disaggregated, 32, shm": {"prefill": 1, "decode": 1, "chunk": 32, "transport": "shm"},
    "disaggregated, 32, TCP": {"prefill": 1, "decode": 1, "chunk": 32, "transport": "tcp"},
    "hybrid": {"mixed": 1, "prefill": 1, "decode": 1, "chunk": 64},
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """A family in every mode ("yes", or what went wrong), or the reason why it is refused."""

    name: str
    modes: dict[str, str]
    ties: int = 0
    refused: str = ""

    @property
    def good(self) -> bool:
        """Equal in every mode, or refused."""
        return bool(self.refused) or all(outcome == "yes" for outcome in self.modes.values())


def judge(name: str, folder: Path) -> Verdict:
    """Run a family through every mode."""
    make_checkpoint(name, folder, seed=1)
    rng = random.Random(name)
    prompts = [rng.choices(range(3, 300), k=length) for length in LENGTHS]
    modes: dict[str, str] = {}
    reference = Reference(folder) if name in FAMILIES else None
    expected = [reference.greedy(prompt, NUM_NEW) for prompt in prompts] if reference else []
    for mode, flags in MODES.items():
        try:
            modes[mode] = compare(reference, expected, answers(folder, prompts, NUM_NEW, **flags), mode)
        except ConfigError as error:
            return Verdict(name, modes, refused=reason_of(error, folder))
    return Verdict(name, modes, reference.num_ties if reference else 0)


def compare(reference: Reference | None, expected: list[Expected], got: list[list[int]], mode: str) -> str:
    """The word yes, or what is wrong."""
    if reference is None:
        return "runs, though a reason to refuse it is known"
    try:
        for wanted, tokens in zip(expected, got, strict=True):
            reference.check(wanted, tokens, mode)
    except AssertionError as error:
        return f"differs: {error}"
    return "yes"


def reason_of(error: ConfigError, folder: Path) -> str:
    """The message without the folder."""
    message = str(error)
    return message.partition(" is not supported: ")[2] or message.replace(f"{folder}/", "")


def features() -> dict[str, dict[str, str]]:
    """Way of asking -> mode -> "yes", or how the reply differs from the unified server's."""
    found: dict[str, dict[str, str]] = {way: {} for way in WAYS}
    wanted: dict[str, Any] = {}
    for mode, flags in LIVE.items():
        print(f"features, {mode}", file=sys.stderr)
        with live(log_level="error", **flags) as supervisor, httpx.Client(timeout=120) as http:
            for way in WAYS:
                got = ask(http, supervisor.url, way)
                found[way][mode] = difference(wanted.setdefault(way, got), got) or "yes"
    return found


def feature_table(found: dict[str, dict[str, str]]) -> Iterable[str]:
    """What docs/conformance.md says of them."""
    yield "## Which features are alike"
    yield ""
    yield (
        "The bundled model, live servers, one request of each kind (`tests/ways.py`). ✓ is the same reply as from one "
        "worker that computes whole prompts: texts, ends and usage alike, log-probabilities and vectors to 1e-3. What "
        "comes after the tokens (stop strings, several answers, streams, tool calls) is the API process's and knows no "
        "modes; what comes before and with them is the workers'."
    )
    yield ""
    yield f"| feature | {' | '.join(LIVE)} |"
    yield "|---" * (len(LIVE) + 1) + "|"
    for way, modes in found.items():
        yield f"| {way} | {' | '.join('✓' if said == 'yes' else said for said in modes.values())} |"


def markdown(verdicts: list[Verdict]) -> Iterable[str]:
    """The page docs/conformance.md."""
    ran = [v for v in verdicts if not v.refused]
    columns = list(dict.fromkeys(mode for v in ran for mode in v.modes))
    yield "# Which models run, and which features are alike"
    yield ""
    yield "<!-- written by: python benchmarks/conformance.py --markdown > docs/conformance.md -->"
    yield ""
    yield (
        "Any decoder-only checkpoint that transformers can load runs through its own model class, or is refused when "
        "it is loaded, with the reason. Below: families as tiny random checkpoints (3 layers, hidden 64, window 16 "
        f"where there is one), fp32, greedy, {len(LENGTHS)} prompts of {min(LENGTHS)} to {max(LENGTHS)} tokens sharing "
        f"their steps, {NUM_NEW} new tokens each, compared with `generate()`. torch {torch.__version__}, transformers "
        f"{transformers.__version__}, CPU. ✓ is equal tokens; a tie is a difference where the reference's two best "
        "logits are closer than 1e-4."
    )
    yield ""
    yield (
        "A family that is not listed is not thereby refused: at load, some twenty tokens go through our attention and "
        "the model's own, once as it is and once with its window and soft cap made so small that they must show. "
        "Refused are, besides the families below: encoder-decoders, quantized weights, rotary scaling that depends on "
        "the batch (`dynamic`, `longrope`), and code that is not in transformers. Multimodal checkpoints answer to "
        "text alone; their image encoders are loaded, and idle."
    )
    yield ""
    yield (
        "What is not saved yet: a layer with a sliding window keeps the KV of all tokens, as others do (the window is "
        "a mask), and latent attention (DeepSeek, MiniCPM 3) keeps the keys and values that its latents expand to, "
        "values as wide as keys."
    )
    yield ""
    yield f"| model | {' | '.join(columns)} | ties |"
    yield "|---" * (len(columns) + 2) + "|"
    for verdict in ran:
        cells = ["✓" if verdict.modes[mode] == "yes" else verdict.modes[mode] for mode in columns]
        yield f"| {verdict.name} | {' | '.join(cells)} | {verdict.ties} |"
    yield ""
    yield "| refused | the reason given |"
    yield "|---|---|"
    for verdict in verdicts:
        if verdict.refused:
            yield f"| {verdict.name} | {verdict.refused} |"


def plain(verdicts: list[Verdict]) -> Iterable[str]:
    """A line for each family."""
    for verdict in verdicts:
        modes = ", ".join(f"{mode}: {outcome}" for mode, outcome in verdict.modes.items())
        yield f"{verdict.name:28} {'refused: ' + verdict.refused if verdict.refused else modes}"


def main() -> int:
    """Judge what was asked for and print it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", help="comma-separated model types; default: all")
    parser.add_argument("--no-features", action="store_true", help="families only")
    parser.add_argument("--markdown", action="store_true", help="print docs/conformance.md")
    flags = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    wanted = set(flags.families.split(",")) if flags.families else None
    names = [n for n in (*FAMILIES, *REFUSED) if wanted is None or n.partition(",")[0] in wanted]
    verdicts = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            verdicts.append(judge(name, Path(folder)))
        print(f"{len(verdicts)}/{len(names)} {name}", file=sys.stderr)
    print("\n".join(markdown(verdicts) if flags.markdown else plain(verdicts)))
    alike = {} if flags.no_features else features()
    if alike:
        print("\n".join(("", *feature_table(alike))))
    same = all(said == "yes" for modes in alike.values() for said in modes.values())
    return 0 if same and all(verdict.good for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
