"""A picture of a comparison: for TTFT, TPOT and ITL, how many % of the samples took longer than so many milliseconds.

The tail is the point, so the share is on a logarithmic axis: at 1 % stands the p99. matplotlib is an optional extra.
Not responsible for the samples.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diptych.bench.client import Record
from diptych.bench.comparison import Found, kept_rounds
from diptych.bench.report import gaps, tpot, ttft
from diptych.errors import ConfigError

SUFFIXES = (".png", ".svg", ".pdf")
MOST_POINTS = 2000  # of one line
PANELS: tuple[tuple[str, Callable[[Record], list[float]]], ...] = (
    ("TTFT", lambda record: [ttft(record)] if record.times_s else []),
    ("TPOT", lambda record: [tpot(record)] if len(record.times_s) > 1 else []),
    ("ITL (stalls to the right)", gaps),
)


def check(path: Path) -> None:
    """ConfigError where the chart could not be written."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("a chart needs matplotlib: pip install 'diptych[chart]'") from None
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a chart is one of {', '.join(SUFFIXES)}")


def draw(path: Path, found: Found, about: dict[str, Any]) -> None:
    """Write the chart of the rounds that count, for the kind of request that matters most."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    kept = kept_rounds(found)
    focus = next(iter(found.values()))[0].focus
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, samples_of) in zip(figure.subplots(1, 3), PANELS, strict=True):
        for mode, some in found.items():
            records = [r for i in kept for r in some[i].records if focus in (r.kind, "all")]
            axes.plot(*exceeding([s for record in records for s in samples_of(record)]), label=mode)
        axes.set(xscale="log", yscale="log", xlabel=f"{name}, ms", ylabel="% that took longer")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    what = "requests" if focus == "all" else f"{focus}s"
    figure.suptitle(f"{what}: {about['load']}\n{about['engine']} engine, {about['model']}", fontsize=9)
    figure.savefig(path)


def exceeding(samples: Sequence[float]) -> tuple[list[float], list[float]]:
    """Milliseconds, and how many % of the samples took at least as long; every sample of the tail, some before."""
    if not samples:
        return [], []
    ordered = np.sort(samples)[::-1] * 1e3
    num, tail = len(ordered), min(MOST_POINTS // 2, len(ordered))
    ranks = np.union1d(np.arange(1, tail + 1), np.geomspace(tail, num, MOST_POINTS // 2).astype(int))
    return ordered[ranks - 1].tolist(), (100 * ranks / num).tolist()
