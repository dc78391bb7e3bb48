"""Which model families give `generate()`'s tokens in which mode, and why the others are refused.

    python benchmarks/conformance.py [--families llama,gemma2] [--tcp] [--markdown] > docs/conformance.md

Runs every family of `tests/checkpoints.py` as a tiny random checkpoint in fp32 through whole clusters in this process,
five prompts at once, and compares greedy tokens. A difference counts as a tie only where the reference's two best
logits are closer than 1e-4. Takes a minute or two on one core. `--tcp` adds, for each family, two worker processes
between which KV crosses by TCP: some fifteen seconds each. Exits with 1 where tokens differ. Not responsible for
trained weights, speed or low precision; `tests/test_models.py` holds the same in the suite.
"""

import argparse
import asyncio
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
import transformers
from checkpoints import FAMILIES, REFUSED, make_checkpoint
from clusters import answer_of, connected, live, settled
from reference import Expected, Reference, answers
from serve_doubles import write_checkpoint

from diptych.engine.executor import Sampling
from diptych.errors import ConfigError
from diptych.serve.build import cluster_card
from diptych.serve.frontend import Job
from diptych.serve.supervisor import Supervisor
from diptych.serve.text import prompt_hashes

LENGTHS = (1, 5, 17, 40, 110)
NUM_NEW = 24
MODES: dict[str, dict[str, object]] = {
    "unified": {"mixed": 1, "chunk": "off"},
    "chunked, 32": {"mixed": 1, "chunk": 32},
    "chunked, 100": {"mixed": 1, "chunk": 100},
    "disaggregated": {"prefill": 1, "decode": 1, "chunk": "off"},
    "disaggregated, 32": {"prefill": 1, "decode": 1, "chunk": 32},
}


TCP = "TCP, 32"


def modes_of(tcp: bool) -> dict[str, dict[str, object]]:
    """The modes to run a family in."""
    return MODES | ({TCP: {"prefill": 1, "decode": 1, "chunk": 32, "transport": "tcp"}} if tcp else {})


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


def judge(name: str, folder: Path, tcp: bool) -> Verdict:
    """Run a family through every mode."""
    make_checkpoint(name, folder, seed=1)
    rng = random.Random(name)
    prompts = [rng.choices(range(3, 300), k=length) for length in LENGTHS]
    modes: dict[str, str] = {}
    reference = Reference(folder) if name in FAMILIES else None
    expected = [reference.greedy(prompt, NUM_NEW) for prompt in prompts] if reference else []
    for mode, flags in modes_of(tcp).items():
        try:
            answer = over_tcp if mode == TCP else answers
            modes[mode] = compare(reference, expected, answer(folder, prompts, NUM_NEW, **flags), mode)
        except ConfigError as error:
            return Verdict(name, modes, refused=reason_of(error, folder))
    return Verdict(name, modes, reference.num_ties if reference else 0)


def over_tcp(folder: Path, prompts: list[list[int]], num_new: int, **flags: object) -> list[list[int]]:
    """What a live cluster answers to all prompts at once; the KV of each has crossed by TCP."""
    write_checkpoint(folder)  # an API process wants a tokenizer

    async def run(supervisor: Supervisor) -> list[list[int]]:
        card = cluster_card(supervisor.cluster)
        async with connected(supervisor) as frontend:
            jobs = [Job(p, num_new, Sampling(), 0, *prompt_hashes(p, card)) for p in prompts]
            streams = [frontend.submit(job)[1] for job in jobs]
            found = [tokens for tokens, _ in await asyncio.gather(*map(answer_of, streams))]
            assert sum(row["kv"]["transfers"] for row in await settled(frontend)) == len(prompts)
            return found

    with live(model=str(folder), kv_memory="4MiB", **flags) as supervisor:
        return asyncio.run(run(supervisor))


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


def markdown(verdicts: list[Verdict]) -> Iterable[str]:
    """The page docs/conformance.md."""
    ran = [v for v in verdicts if not v.refused]
    columns = list(dict.fromkeys(mode for v in ran for mode in v.modes))
    yield "# Which models run"
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
    parser.add_argument("--tcp", action="store_true", help="also between two processes, over TCP")
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
            verdicts.append(judge(name, Path(folder), flags.tcp))
        print(f"{len(verdicts)}/{len(names)} {name}", file=sys.stderr)
    print("\n".join(markdown(verdicts) if flags.markdown else plain(verdicts)))
    return 0 if all(verdict.good for verdict in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
