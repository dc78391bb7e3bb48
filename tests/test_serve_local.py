"""A cluster in one process: what leaves it leaves nothing behind."""

from diptych.config import load_cluster
from diptych.engine.executor import Sampling
from diptych.engine.paced import oracle
from diptych.serve.build import build
from diptych.serve.local import LocalCluster


def test_a_worker_that_drains_finishes_what_it_has() -> None:
    flags = {"engine": "paced", "kv_memory": "64KiB", "prefill": 1, "decode": 2, "paced": {"base_ms": 0.0, "vocab": 50}}
    config = load_cluster(None, flags)
    cluster = LocalCluster([build(config, worker) for worker in config.workers])
    prompts = [[i, 2, 3] * 20 for i in range(6)]
    given = [cluster.submit(prompt, 12, Sampling()) for prompt in prompts]
    while not any(answer.tokens for answer in given):
        cluster.step()
    cluster.drain("d0")
    late = cluster.submit(prompts[0], 12, Sampling())
    cluster.run_until([*given, late])
    cluster.settle()
    assert [answer.tokens for answer in (*given, late)] == [
        oracle(prompt, 12, config.paced) for prompt in (*prompts, prompts[0])
    ]
    assert sorted(cluster.router.policy.workers) == ["d1", "p0"] and not cluster.router.policy.drains
    cluster.close()
