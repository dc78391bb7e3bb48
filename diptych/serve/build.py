"""From configuration to a worker's parts: pool, executor, policy, and the card of the model it serves.

torch is imported here, and only where the engine is torch. Not responsible for processes or sockets.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from diptych import __version__
from diptych.config import DEMO, Cluster, WorkerConfig
from diptych.engine.executor import Executor
from diptych.engine.layouts import kv_layout
from diptych.engine.paced import VECTOR_WIDTH, PacedExecutor, paced_layout
from diptych.errors import ConfigError
from diptych.modelfacts import read_facts
from diptych.policy.messages import Role
from diptych.policy.worker import Worker
from diptych.serve.frontend import ModelCard
from diptych.transfer.layout import Layout
from diptych.transfer.pool import Pool

PACED_POSITIONS = 1 << 18  # a paced model has no context limit of its own; this is 256k tokens


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything a worker's driver is made of."""

    policy: Worker
    executor: Executor
    pool: Pool
    card: ModelCard


def layout_of(cluster: Cluster, worker: WorkerConfig) -> Layout:
    """The layout of a worker's KV pool."""
    if cluster.engine == "paced":
        return paced_layout(cluster.paced, worker.block_size)
    return kv_layout(read_facts(cluster.folder), worker.dtype, worker.block_size)


def facts_of(cluster: Cluster, worker: WorkerConfig) -> tuple[tuple[str, str], ...]:
    """What every worker of a cluster must have in common, so that KV means the same everywhere."""
    layout = layout_of(cluster, worker)
    return (
        ("diptych", __version__),
        ("engine", cluster.engine),
        ("model", layout.model),
        ("dtype", worker.dtype),
        ("block_size", str(worker.block_size)),
        ("KV layout", layout.card()),
    )


def differences(ours: tuple[tuple[str, str], ...], theirs: tuple[tuple[str, str], ...]) -> str:
    """In words, where the facts of a worker that would join are not the cluster's; "" where they are."""
    said = dict(theirs)
    return "; ".join(
        f"{name} is {said.get(name, 'not said')!r} there and {value!r} in this cluster"
        for name, value in ours
        if said.get(name) != value
    )


def num_blocks_of(layout: Layout, worker: WorkerConfig) -> int:
    """How many blocks a worker's KV memory holds; ConfigError where that is none."""
    num_blocks = worker.kv_bytes // layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"kv_memory of {worker.kv_bytes} bytes is less than one block of {layout.block_bytes}; give worker "
            f"{worker.name} more"
        )
    return num_blocks


def build(cluster: Cluster, worker: WorkerConfig) -> Parts:
    """Make a worker's parts; loads the model."""
    layout = layout_of(cluster, worker)
    num_blocks = num_blocks_of(layout, worker)
    model = model_card(cluster, layout, num_blocks)
    pool = Pool(layout, num_blocks)
    policy = Worker(worker.spec(num_blocks))
    return Parts(policy, _executor(cluster, worker, pool), pool, model)


def cluster_card(cluster: Cluster) -> ModelCard:
    """The card of the model a whole cluster serves: a request must fit into the smallest worker that may write it."""
    writers = [worker for worker in cluster.workers if worker.role != Role.PREFILL] or [cluster.guest]
    layout = layout_of(cluster, writers[0])
    return model_card(cluster, layout, min(num_blocks_of(layout_of(cluster, w), w) for w in writers))


def model_card(cluster: Cluster, layout: Layout, num_blocks: int) -> ModelCard:
    """What the API must know: limits, stop tokens, and what salts block hashes."""
    paced = cluster.engine == "paced"
    facts = None if paced else read_facts(cluster.folder)
    positions = facts.max_positions if facts else PACED_POSITIONS
    own = "diptych-demo" if cluster.folder == str(DEMO) else Path(cluster.model).name or cluster.model
    named = cluster.served_model_name
    return ModelCard(
        name=named or own,
        max_tokens=min(num_blocks * layout.block_size, positions),
        vocab_size=facts.vocab if facts else cluster.paced.vocab,
        block_size=layout.block_size,
        stop_ids=facts.eos_ids if facts else (),
        fingerprint=layout.model,
        layout=layout.fingerprint(),
        aliases=(cluster.model,) if cluster.model != "demo" and not named else (),
        task=facts.task if facts else "generate",
        pooling=facts.pooling if facts else "last",
        width=facts.hidden if facts else VECTOR_WIDTH,
        matryoshka=facts.matryoshka if facts else None,
        labels=facts.labels if facts else (),
        scored=not paced,
        structured=bool(facts and facts.eos_ids) and find_spec("llguidance") is not None,
    )


def _executor(cluster: Cluster, worker: WorkerConfig, pool: Pool) -> Executor:
    if cluster.engine == "paced":
        return PacedExecutor(cluster.paced, pool)
    from diptych.engine.adapter import load
    from diptych.engine.torch_executor import TorchExecutor

    model = load(cluster.folder, worker.dtype, quantize=worker.quantize)
    return TorchExecutor(model, pool, num_threads=max(len(worker.cores), 1))
