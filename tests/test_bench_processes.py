"""CPU accounting, on processes that are known to work or to sleep."""

import os
import subprocess
import sys
import time

from diptych.bench.processes import MAX_FOREIGN, Stopwatch, Usage, cpu_seconds, footprint

BURN = (
    "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass\nprint('done', flush=True)\n"
)


def test_work_is_charged_to_who_did_it() -> None:
    with subprocess.Popen([sys.executable, "-c", BURN + "time.sleep(60)"], stdout=subprocess.PIPE) as child:
        stopwatch = Stopwatch({"child": child.pid, "nobody": 2**22 + 1})
        assert child.stdout is not None and child.stdout.readline() == b"done\n"
        usage = stopwatch.lap()
        child.kill()
    assert set(usage.processes) == {"child"}, "a process that is not there is left out"
    assert 0.2 < usage.processes["child"].cpu_s < 5.0
    assert 0.0 < usage.processes["child"].busy <= 1.1
    assert usage.wall_s > 0.2


def test_what_a_process_holds() -> None:
    before = footprint(os.getpid())
    held = bytearray(b"x" * (32 << 20))
    with open("/dev/null") as file:
        after = footprint(os.getpid())
        assert after.num_fds == before.num_fds + 1 and not file.closed
    assert after.anon_bytes - before.anon_bytes > len(held) // 2
    assert after.rss_bytes >= after.pss_bytes > 0 and after.num_threads >= 1


def test_cpu_time_only_grows() -> None:
    before = cpu_seconds(os.getpid())
    end = time.process_time() + 0.05
    while time.process_time() < end:
        pass
    assert cpu_seconds(os.getpid()) >= before + 0.02


def test_a_round_with_others_on_the_cores_is_not_believed() -> None:
    assert Usage(1.0, {}, foreign=MAX_FOREIGN / 2, steal=0.0).valid
    assert not Usage(1.0, {}, foreign=MAX_FOREIGN, steal=0.001).valid
