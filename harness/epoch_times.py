"""An epoch's times as plain values: what the samples of its phases come to, and how to read it back. Without torch."""

import re

import numpy as np

WARMUP_STEPS = 5  # Per process: allocator growth, cuDNN's algorithm selection and worker start-up happen here.
STEP = re.compile(r".+ - step \d+")


def describe_epoch(seconds, samples, warmup_steps):
    """What PhaseTimer.end_epoch returns, without the memory.

    samples: name of a phase -> (host milliseconds, device milliseconds or None, float [n] each, number of warm-up
    samples at the start).
    """
    phases = {}
    for name, (host, device, warmup) in samples.items():
        host_ms, device_ms = summarise(host, warmup), None if device is None else summarise(device, warmup)
        share = (device_ms or host_ms)["total"] / (1e3 * seconds)
        phases[name] = {"count": len(host) - warmup, "share": share, "host_ms": host_ms, "device_ms": device_ms}
    return {
        "seconds": seconds,
        "steps": len(samples["step"][0]) if "step" in samples else 0,
        "warmup_steps": warmup_steps,
        "unphased_seconds": seconds * (1 - sum(phases[name]["share"] for name in phases if name != "step")),
        "phases": phases,
    }


def phase_times(phase):
    """A phase's "median", "p95" and "total" in ms, on the device if timed there, else on the host."""
    return phase["device_ms"] or phase["host_ms"]


def training_seconds(timing):
    """Seconds of an epoch's training steps, from its timing as returned by PhaseTimer.end_epoch, without the
    validations within it. A scorer may validate between steps."""
    validation = timing["phases"].get("validation")
    return timing["seconds"] - (phase_times(validation)["total"] / 1e3 if validation else 0.0)


def typical_milliseconds(phase):
    """Milliseconds of one occurrence of a phase from PhaseTimer.end_epoch, on the device if timed there: the median, or
    the total if there was only warm-up."""
    found = phase_times(phase)
    return found["total"] if found["median"] is None else found["median"]


def summarise(samples, warmup=0):
    """Median and 95th percentile of `samples` [n] after the first `warmup`, and the total of all, in their unit.

    Without samples after the warm-up, median and percentile are None.
    """
    counted = np.asarray(samples)[warmup:]
    return {
        "median": float(np.median(counted)) if len(counted) else None,
        "p95": float(np.percentile(counted, 95)) if len(counted) else None,
        "total": float(np.sum(samples)),
    }
