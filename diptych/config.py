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
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from diptych.engine.paced import PacedModel
from diptych.errors import ConfigError
from diptych.keys import VARIABLES, cluster_key
from diptych.linkrates import LinkRates, LinkRule, parse_rate
from diptych.modelfacts import num_tokens
from diptych.policy.batching import WorkerSpec
from diptych.policy.books import RouterSpec
from diptych.policy.messages import Role
from diptych.units import parse_bytes
from diptych.wording import sentence

DEMO = Path(__file__).parent / "demo"

_WILDCARDS = ("0.0.0.0", "[::]")

Dtype = Literal["float32", "bfloat16", "float16"]
Transport = Literal["auto", "shm", "tcp"]
KvCodec = Literal["raw", "int8", "auto"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
ToolFormat = Literal["hermes", "llama3", "none"]
Quantize = Literal["int8"]
_AtLeast0 = Annotated[int, Meta(ge=0)]
_AtLeast1 = Annotated[int, Meta(ge=1)]
_Port = Annotated[int, Meta(ge=0, le=65535)]
_Seconds = Annotated[float, Meta(ge=0.0)]
_MoreThan0 = Annotated[float, Meta(gt=0.0)]


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
    replicate: bool = True
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
            replicate=self.replicate,
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
    served_model_name: str | None = None
    cors_origins: tuple[str, ...] = ()  # of web pages that may ask
    listen: str | None = None  # host:port for workers that join
    address: str | None = None  # the host by which workers elsewhere call those of this host
    cluster_key: str | None = None
    transport: Transport = "auto"
    codec: KvCodec = "raw"
    links: LinkRates = LinkRates()  # how slow the links between workers are made
    drain_timeout_s: float = 300.0
    stuck_s: float = 10.0  # how long a process may show no sign of life; 0: for ever
    tool_parser: ToolFormat | None = None  # how the model writes calls; None: as its chat template says
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    router: RouterSpec = RouterSpec()
    paced: PacedModel = PacedModel()
    guest: WorkerConfig = WorkerConfig(name="guest", role=Role.MIXED)  # what a worker that joins is unless it differs

    @property
    def folder(self) -> str:
        """Where the model is: a path or a hub name."""
        return str(DEMO) if self.model == "demo" else self.model


class _Paced(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    base_ms: _Seconds = 4.0
    new_token_us: _Seconds = 50.0
    context_token_us: _Seconds = 0.1
    kv_bytes_per_token: int = 64
    vocab: _AtLeast1 | None = None

    def model(self, vocab: int) -> PacedModel:
        return PacedModel(
            self.base_ms / 1e3, self.new_token_us / 1e6, self.context_token_us / 1e6, self.kv_bytes_per_token, vocab
        )


class _Defaults(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    dtype: Dtype | None = None
    quantize: Quantize | None = None
    chunk: int | Literal["off"] | None = None
    block_size: _AtLeast1 | None = None
    max_batch: _AtLeast1 | None = None
    itl_budget: _MoreThan0 | None = None  # seconds
    lease: _MoreThan0 | None = None  # seconds
    depth: int | None = None
    replicate: bool | None = None
    kv_memory: int | str | None = None


class _Worker(_Defaults, frozen=True, kw_only=True, forbid_unknown_fields=True):
    role: Role
    count: _AtLeast0 = 1
    cores: tuple[_AtLeast0, ...] = ()


class _Router(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    policy: Literal["round-robin", "least-loaded", "prefix-aware"] = "prefix-aware"
    max_requests: _AtLeast1 = 4096
    max_queued_tokens: _AtLeast1 | None = None
    disaggregate_above: _AtLeast0 = 256


class _Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rate: str | float
    one: str = msgspec.field(name="from", default="")
    other: str = msgspec.field(name="to", default="")

    def rule(self) -> LinkRule:
        return LinkRule(self.one, self.other, parse_rate(self.rate))


class _File(_Defaults, frozen=True, kw_only=True, forbid_unknown_fields=True):
    worker: list[_Worker] = []
    model: str = "demo"
    engine: Literal["torch", "paced"] = "torch"
    host: str = "127.0.0.1"
    port: _Port = 8000
    journal: str | None = None
    api_key: str | None = None
    served_model_name: Annotated[str, Meta(min_length=1)] | None = None
    cors_origins: tuple[str, ...] = ()
    listen: str | None = None
    address: str | None = None
    cluster_key: str | None = None
    key_file: str | None = None
    transport: Transport = "auto"
    codec: KvCodec = "raw"
    link: str | float | list[_Link] | None = None
    drain_timeout: _Seconds = 300.0
    stuck: _Seconds = 10.0
    tool_parser: ToolFormat | None = None
    log_format: LogFormat = "text"
    log_level: LogLevel = "info"
    router: _Router = _Router()
    paced: _Paced = _Paced()


def load_cluster(path: Path | None, flags: dict[str, Any]) -> Cluster:
    """The cluster a file and flags describe; flags that are not None win over the file.

    flags: any key of the file, and `prefill`, `decode`, `mixed` (numbers of workers, instead of `[[worker]]`), `cores`.
    """
    data: dict[str, Any] = _read(path) if path else {}
    flags = {key: value for key, value in flags.items() if value is not None}
    for key, variable in VARIABLES.items():
        if os.environ.get(variable) and (key == "api_key" or "key_file" not in data | flags):
            flags.setdefault(key, os.environ[variable])
    counts = {role: flags.pop(role.value) for role in Role if role.value in flags}
    for role, count in counts.items():
        if count < 0:
            raise ConfigError(f"--{role.value} is {count}; it must be at least 0")
    cores = flags.pop("cores", None)
    if counts:
        if data.get("worker"):
            raise ConfigError(f"{path} lists workers already; leave out --prefill, --decode and --mixed")
        data["worker"] = [{"role": role.value, "count": count} for role, count in counts.items() if count]
    data.setdefault("worker", [{"role": "prefill"}, {"role": "decode"}])
    data |= flags
    try:
        file = msgspec.convert(data, _File)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path or 'flags'}: {sentence(error)[0]}") from None
    workers = _workers(file, cores)
    _check(workers, file.listen is not None)
    _check_door(file)
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
        served_model_name=file.served_model_name,
        cors_origins=file.cors_origins,
        listen=file.listen,
        address=file.address or (file.listen.rpartition(":")[0].strip("[]") if file.listen else None),
        cluster_key=cluster_key(file.cluster_key, file.key_file),
        transport=file.transport,
        codec=file.codec,
        links=_links(file, workers),
        drain_timeout_s=file.drain_timeout,
        stuck_s=file.stuck,
        guest=_worker("guest", _Worker(role=Role.MIXED), file, ()),
        tool_parser=file.tool_parser,
        log_format=file.log_format,
        log_level=file.log_level,
        router=RouterSpec(**msgspec.structs.asdict(file.router)),
        paced=_paced(file),
    )


def guest_of(terms: Cluster, name: str, role: Role, flags: dict[str, Any]) -> Cluster:
    """The cluster as a worker that joins it sees it: the router's terms, and flags that are not None instead of them.

    flags: `model`, `dtype`, `chunk`, `kv_memory`, `cores`, `transport`, `journal`, `drain_timeout`.
    """
    flags = {key: value for key, value in flags.items() if value is not None}
    own: dict[str, Any] = {key: flags.pop(key) for key in ("dtype", "cores") if key in flags}
    if "kv_memory" in flags:
        own["kv_bytes"] = parse_bytes(flags.pop("kv_memory"))
    if "chunk" in flags:
        chunk = flags.pop("chunk")
        own["chunk"] = None if chunk == "off" else chunk
    if "drain_timeout" in flags:
        flags["drain_timeout_s"] = flags.pop("drain_timeout")
    worker = msgspec.structs.replace(terms.guest, name=name, role=role, **own)
    return msgspec.structs.replace(terms, workers=(worker,), **flags)


def _read(path: Path) -> dict[str, Any]:
    model = f"; a model is given with a flag: --model {path}"
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{'' if path.suffix == '.toml' else model}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder, and no cluster file{model}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from None


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
        replicate=setting("replicate", True),
        kv_bytes=parse_bytes(setting("kv_memory", 128 << 20)),
    )
    if config.chunk is not None and config.chunk < 1:
        raise ConfigError(f"chunk is {config.chunk}; it must be at least 1")
    if config.depth not in (1, 2):
        raise ConfigError(f"depth is {config.depth}; one or two steps can be in flight")
    return config


def _deal(cores: list[int], num_workers: int) -> list[tuple[int, ...]]:
    """An equal share of the cores for each worker; with more workers than cores they take turns."""
    if num_workers == 0:
        return []
    each = max(len(cores) // num_workers, 1)
    return [tuple(cores[(i * each) % len(cores) :][:each]) for i in range(num_workers)]


def _check(workers: tuple[WorkerConfig, ...], others_join: bool) -> None:
    roles = {worker.role for worker in workers}
    if not roles and not others_join:
        raise ConfigError("a cluster needs at least one worker")
    if not others_join and (Role.PREFILL in roles) != (Role.DECODE in roles):
        raise ConfigError(
            "prefill and decode workers only work in pairs: give at least one of each, or mixed workers, or let others "
            "join (--listen)"
        )
    for key in ("block_size", "dtype"):
        if len({getattr(worker, key) for worker in workers}) > 1:
            raise ConfigError(f"all workers of a cluster need the same {key}: their KV has to fit together")


def _paced(file: _File) -> PacedModel:
    """What the paced engine pretends to be. Its words are the tokenizer's, so that texts can be asked and shown."""
    vocab = file.paced.vocab
    if vocab is None and file.engine == "paced":
        vocab = num_tokens(DEMO if file.model == "demo" else file.model)
    return file.paced.model(512 if vocab is None else vocab)


def _links(file: _File, workers: tuple[WorkerConfig, ...]) -> LinkRates:
    """How slow links are made: one rate for all, or rules, of which the last that is about a pair counts."""
    if not isinstance(file.link, list):
        return LinkRates(None if file.link is None else parse_rate(file.link))
    known = {worker.name for worker in workers} | {""}
    for name in (name for link in file.link for name in (link.one, link.other)):
        if name not in known and file.listen is None:
            raise ConfigError(f"[[link]] names {name!r}, and there is no such worker")
    return LinkRates(None, tuple(link.rule() for link in file.link))


def _check_door(file: _File) -> None:
    """What workers of other hosts need to find this one."""
    if file.listen is not None and not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]\s]+):[0-9]{1,5}", file.listen):
        raise ConfigError(f"listen is {file.listen!r}; write it as host:port, like 10.0.0.1:7000")
    if file.listen is not None and file.listen.rpartition(":")[0] in _WILDCARDS and not file.address:
        raise ConfigError(f"listen is {file.listen}: say with --address by which host name or address others reach it")
    for origin in file.cors_origins:
        if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
            raise ConfigError(f"{origin!r} is no origin; write it like https://chat.example.org, or *")
    if not (file.stuck >= 2 or file.stuck == 0):
        raise ConfigError(f"stuck is {file.stuck}; it is a number of seconds, at least 2, or 0: never")
