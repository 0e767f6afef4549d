"""What every benchmark shares: where its figures go, and fair timing of two or more arms in one run."""

import re
import statistics
import time
from pathlib import Path

from harness.recording import hardware_name

RESULTS = Path(__file__).resolve().parent / "results"


def results_path(benchmark_name, device):
    """`benchmarks/results/<hardware>/<benchmark_name>.json`, the hardware's name in lower case with hyphens.

    device: torch.device.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", hardware_name(device).lower()).strip("-")
    return RESULTS / slug / f"{benchmark_name}.json"


def interleaved(arms, rounds):
    """Run every arm once a round, and return each arm's wall-clock seconds by round: dict[str, list[float]].

    Odd rounds go through the arms backwards, so that a machine that slows down or speeds up favours none. Warm up
    before. An arm that works on a GPU has to synchronise before it returns.

    arms: dict[str, callable without arguments].
    """
    seconds = {name: [] for name in arms}
    for index in range(rounds):
        order = list(arms) if index % 2 == 0 else list(reversed(arms))
        for name in order:
            start = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio_summary(base, new):
    """How many times faster `new` is: {"median", "low", "high"} of base / new, round by round.

    base, new: seconds by round, as `interleaved` returns them.
    """
    ratios = [slow / fast for slow, fast in zip(base, new, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
