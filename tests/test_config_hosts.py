"""What a cluster of several hosts is told: where others call, by which key, and what a worker that joins takes over."""

from pathlib import Path

import pytest

from diptych.config import Cluster, guest_of, load_cluster
from diptych.errors import ConfigError
from diptych.keys import read_key
from diptych.policy.messages import Role

KEY = "sixteen letters!"


def test_others_may_bring_what_is_missing() -> None:
    cluster = load_cluster(None, {"listen": "10.0.0.1:7000", "prefill": 1})
    assert [worker.name for worker in cluster.workers] == ["p0"] and cluster.address == "10.0.0.1"
    assert load_cluster(None, {"listen": "[fd00::1]:7000", "mixed": 0}).workers == ()
    for flags in ({"prefill": 1}, {"mixed": 0}):
        with pytest.raises(ConfigError):
            load_cluster(None, flags)


@pytest.mark.parametrize("listen", ["7000", "host", "host:", ":7000", "host:port", "a b:1", "0.0.0.0:7000", "[::]:1"])
def test_where_others_call_is_a_host_and_a_port_that_they_can_reach(listen: str) -> None:
    with pytest.raises(ConfigError, match="listen"):
        load_cluster(None, {"listen": listen})


def test_behind_a_wildcard_the_host_has_to_be_said() -> None:
    assert load_cluster(None, {"listen": "0.0.0.0:7000", "address": "node7"}).address == "node7"


def test_the_key_comes_from_a_flag_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "key"
    file.write_text(f"{KEY} in a file\n")
    monkeypatch.setenv("DIPTYCH_CLUSTER_KEY", f"{KEY} in the environment")
    assert load_cluster(None, {}).cluster_key == read_key(None, None) == f"{KEY} in the environment"
    assert load_cluster(None, {"cluster_key": KEY}).cluster_key == read_key(KEY, None) == KEY
    assert load_cluster(None, {"key_file": str(file)}).cluster_key == read_key(None, str(file)) == f"{KEY} in a file"
    monkeypatch.delenv("DIPTYCH_CLUSTER_KEY")
    assert load_cluster(None, {}).cluster_key is None, "the supervisor makes one"
    for key, key_file in ((None, None), ("short", None), (KEY, str(file)), (None, str(tmp_path / "none"))):
        with pytest.raises(ConfigError):
            read_key(key, key_file)


def test_a_guest_is_what_the_cluster_says_unless_it_says_otherwise(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('engine = "paced"\nchunk = 64\nkv_memory = "1MiB"\nlisten = "h:1"\n[paced]\nvocab = 77\n')
    terms = load_cluster(file, {})
    made: Cluster = guest_of(terms, "d9", Role.DECODE, {"model": None, "kv_memory": "2MiB", "chunk": "off"})
    (worker,) = made.workers
    assert (worker.name, worker.role, worker.kv_bytes, worker.chunk) == ("d9", Role.DECODE, 2 << 20, None)
    assert (made.paced.vocab, made.engine, worker.block_size) == (77, "paced", 16)
    (plain,) = guest_of(terms, "d9", Role.DECODE, {}).workers
    assert (plain.chunk, plain.kv_bytes) == (64, 1 << 20)


@pytest.mark.parametrize(
    "flags",
    [
        {"transport": "pigeon"},
        {"drain_timeout": -1.0},
        {"drain_timeout": float("nan")},
        {"stuck": 0.5},
        {"stuck": float("nan")},
    ],
)
def test_what_makes_no_sense_is_refused(flags: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        load_cluster(None, flags)
