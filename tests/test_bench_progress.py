"""Running numbers, on records as a load fills them."""

import asyncio
import io

from rich.console import Console

from diptych.bench.client import Record
from diptych.bench.progress import Watch


def test_it_counts_what_ended_since_the_last_look() -> None:
    records: list[Record] = []
    watch = Watch(records, 3, Console(file=io.StringIO()))
    assert watch.look() == "0 running, 0 errors, TTFT - ms, TPOT - ms"
    records += [Record(), Record(), Record()]
    assert watch.look().startswith("3 running")
    records[0].times_s, records[0].ended_s, records[0].num_tokens = [0.25, 0.5, 0.75], 1.0, 3
    records[2].error, records[2].ended_s = "gone", 1.0
    assert watch.look() == "1 running, 1 errors, TTFT 250 ms, TPOT 250 ms" and watch.num_done == 2
    assert watch.look().startswith("1 running") and watch.num_done == 2, "each once"


def test_a_terminal_sees_it() -> None:
    shown = io.StringIO()
    records = [Record(ended_s=1.0, error="gone")]

    async def main() -> None:
        async with Watch(records, 1, Console(file=shown, force_terminal=True, width=100)):
            pass

    asyncio.run(main())
    assert "1/1" in shown.getvalue() and "1 errors" in shown.getvalue()


def test_a_file_does_not() -> None:
    shown = io.StringIO()

    async def main() -> None:
        async with Watch([], 1, Console(file=shown)):
            pass

    asyncio.run(main())
    assert shown.getvalue().strip() == ""
