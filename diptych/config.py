"""The one frozen configuration of a cluster, and the one place that reads files and flags into it.

A topology is data: a list of workers, each with a role. `cluster.toml` says it in full,

    model = "demo"                 # a folder, a hub name, or "demo", the bundled model
    chunk = 512                    # defaults for every worker ...
    [[worker]]
    role = "prefill"
    count = 2
    chunk = 1024                   # ... which a worker may override
    [[worker]]
    role = "decode"

and `--prefill 2 --decode 1` or `--mixed 2` are short for the usual ones. Unknown keys are refused. Not responsible
for what the numbers mean to a worker (`policy/batching.py`) or for model facts (`modelfacts.py`).
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from diptych.engine.paced import PacedModel
from diptych.errors import ConfigError
from diptych.policy.batching import WorkerSpec
from diptych.policy.messages import Role
from diptych.policy.router import RouterSpec

KEY_VARIABLE = "DIPTYCH_API_KEY"  # the one setting the environment may make: a flag would show in process lists
DEMO = Path(__file__).parent / "demo"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}

Dtype = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["int8"]


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One worker. None means: take the cluster's default."""

    name: str
    role: Role
    cores: tuple[int, ...] = ()
    dtype: Dtype = "float32"
    quantize: Quantize | None = None
    chunk: int | None = 512
    block_size: int = 16
    max_batch: int = 256
    itl_budget_s: float | None = None
    lease_s: float = 30.0
    depth: int = 1
    kv_bytes: int = 128 << 20

    def spec(self, num_blocks: int) -> WorkerSpec:
        """What its policy is told, once the number of blocks is known."""
        return WorkerSpec(
            name=self.name,
            role=self.role,
            num_blocks=num_blocks,
            block_size=self.block_size,
            chunk=self.chunk,
            max_batch=self.max_batch,
            itl_budget_s=self.itl_budget_s,
            lease_s=self.lease_s,
            depth=self.depth,
        )


class Cluster(msgspec.Struct, frozen=True, kw_only=True):
    """A whole cluster: what is served, by which workers, and where the door is."""

    workers: tuple[WorkerConfig, ...]
    model: str = "demo"
    engine: Literal["torch", "paced"] = "torch"
    host: str = "127.0.0.1"
    port: int = 8000
    journal: str | None = None
    api_key: str | None = None
    router: RouterSpec = RouterSpec()
    paced: PacedModel = PacedModel()

    @property
    def folder(self) -> str:
        """Where the model is: a path or a hub name."""
        return str(DEMO) if self.model == "demo" else self.model


class _Paced(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    base_ms: float = 4.0
    new_token_us: float = 50.0
    context_token_us: float = 0.1
    kv_bytes_per_token: int = 64
    vocab: int = 512

    def model(self) -> PacedModel:
        return PacedModel(
            self.base_ms / 1e3,
            self.new_token_us / 1e6,
            self.context_token_us / 1e6,
            self.kv_bytes_per_token,
            self.vocab,
        )


class _Defaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    dtype: Dtype | None = None
    quantize: Quantize | None = None
    chunk: int | Literal["off"] | None = None
    block_size: int | None = None
    max_batch: int | None = None
    itl_budget: float | None = None  # seconds
    lease: float | None = None  # seconds
    depth: int | None = None
    kv_memory: int | str | None = None


class _Worker(_Defaults, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Role
    count: int = 1
    cores: tuple[int, ...] = ()


class _Router(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    policy: Literal["round-robin", "least-loaded", "prefix-aware"] = "prefix-aware"
    max_requests: int = 4096
    disaggregate_above: int = 256


class _File(_Defaults, frozen=True, kw_only=True, forbid_unknown_fields=True):
    worker: list[_Worker] = []
    model: str = "demo"
    engine: Literal["torch", "paced"] = "torch"
    host: str = "127.0.0.1"
    port: int = 8000
    journal: str | None = None
    api_key: str | None = None
    router: _Router = _Router()
    paced: _Paced = _Paced()


def load_cluster(path: Path | None, flags: dict[str, Any]) -> Cluster:
    """The cluster a file and flags describe; flags that are not None win over the file.

    flags: any key of the file, and `prefill`, `decode`, `mixed` (numbers of workers, instead of `[[worker]]`), `cores`.
    """
    data: dict[str, Any] = _read(path) if path else {}
    flags = {key: value for key, value in flags.items() if value is not None}
    if os.environ.get(KEY_VARIABLE):
        flags.setdefault("api_key", os.environ[KEY_VARIABLE])
    counts = {role: flags.pop(role.value, 0) for role in Role}
    cores = flags.pop("cores", None)
    if any(counts.values()):
        if data.get("worker"):
            raise ConfigError(f"{path} lists workers already; leave out --prefill, --decode and --mixed")
        data["worker"] = [{"role": role.value, "count": count} for role, count in counts.items() if count]
    data.setdefault("worker", [{"role": "prefill"}, {"role": "decode"}])
    data |= flags
    try:
        file = msgspec.convert(data, _File)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path or 'flags'}: {error}") from None
    workers = _workers(file, cores)
    _check(workers)
    if file.api_key == "":
        raise ConfigError("the API key is empty: leave it out, or give one")
    return Cluster(
        workers=workers,
        model=file.model,
        engine=file.engine,
        host=file.host,
        port=file.port,
        journal=file.journal,
        api_key=file.api_key,
        router=RouterSpec(file.router.policy, file.router.max_requests, file.router.disaggregate_above),
        paced=file.paced.model(),
    )


def parse_bytes(text: int | str) -> int:
    """A number of bytes: 1048576, "64MiB", "1.5GB"."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([KMG]I?)?B?\s*", str(text).upper())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; write it like 512MiB or 2GB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_cores(text: str) -> list[int]:
    """Core numbers: "0,1" or "0-3,8"."""
    cores: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not first.strip().isdigit() or (last and not last.strip().isdigit()):
            raise ConfigError(f"{text!r} is not a list of cores; write it like 0,1 or 0-3")
        cores += range(int(first), int(last or first) + 1)
    return cores


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: {error}") from None


def _workers(file: _File, cores: list[int] | None) -> tuple[WorkerConfig, ...]:
    """Every worker by name (p0, p1, d0, m0 ...), with its defaults filled in and its cores dealt out."""
    wanted = [worker for worker in file.worker for _ in range(worker.count)]
    shares = _deal(cores or sorted(os.sched_getaffinity(0)), len(wanted)) if file.engine == "torch" or cores else None
    numbers = dict.fromkeys(Role, 0)
    workers = []
    for i, worker in enumerate(wanted):
        number = numbers[worker.role]
        numbers[worker.role] += 1
        own = worker.cores or (shares[i] if shares else ())
        workers.append(_worker(f"{worker.role.value[0]}{number}", worker, file, own))
    return tuple(workers)


def _worker(name: str, own: _Worker, file: _File, cores: tuple[int, ...]) -> WorkerConfig:
    def setting(key: str, default: Any) -> Any:
        value = getattr(own, key)
        value = getattr(file, key) if value is None else value
        return default if value is None else value

    chunk = setting("chunk", 512)
    config = WorkerConfig(
        name=name,
        role=own.role,
        cores=cores,
        dtype=setting("dtype", "float32"),
        quantize=setting("quantize", None),
        chunk=None if chunk == "off" else chunk,
        block_size=setting("block_size", 16),
        max_batch=setting("max_batch", 256),
        itl_budget_s=setting("itl_budget", None),
        lease_s=setting("lease", 30.0),
        depth=setting("depth", 1),
        kv_bytes=parse_bytes(setting("kv_memory", 128 << 20)),
    )
    positive = {"chunk": config.chunk or 1, "block_size": config.block_size, "max_batch": config.max_batch}
    for key, value in positive.items():
        if value < 1:
            raise ConfigError(f"{key} is {value}; it must be at least 1")
    if config.depth not in (1, 2):
        raise ConfigError(f"depth is {config.depth}; one or two steps can be in flight")
    return config


def _deal(cores: list[int], num_workers: int) -> list[tuple[int, ...]]:
    """An equal share of the cores for each worker; with more workers than cores they take turns."""
    if num_workers == 0:
        return []
    each = max(len(cores) // num_workers, 1)
    return [tuple(cores[(i * each) % len(cores) :][:each]) for i in range(num_workers)]


def _check(workers: tuple[WorkerConfig, ...]) -> None:
    roles = {worker.role for worker in workers}
    if not roles:
        raise ConfigError("a cluster needs at least one worker")
    if (Role.PREFILL in roles) != (Role.DECODE in roles):
        raise ConfigError("prefill and decode workers only work in pairs: give at least one of each, or mixed workers")
    for key in ("block_size", "dtype"):
        if len({getattr(worker, key) for worker in workers}) > 1:
            raise ConfigError(f"all workers of a cluster need the same {key}: their KV has to fit together")
