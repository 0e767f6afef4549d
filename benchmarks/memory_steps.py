"""The training steps of benchmarks/memory.py, timed in turn with the plain model's, and the largest batch that fits."""

import contextlib
import gc
import sys
from statistics import median

from common import interleaved, ratio_summary

import torch
import torch.nn.functional as F

from harness import endings
from harness.memory import SavedBytes, reset_peak_memory
from harness.precision import choose_precision
from reporting.verdicts import judge

GOAL = {"peak_share": 0.60, "step_times_plain": 1.10}  # On CUDA, for at least one arm.
BATCH_STEP = 128  # The largest batch is a multiple of it.
# The search's limit: from 4096 images on, the first stage's outputs have 2**31 elements or more, which kernels with
# 32-bit indices reject.
LARGEST_BATCH = 4096 - BATCH_STEP
NO_CONTEXT = contextlib.nullcontext()


def train_all(arms, make_plain, args, device, counted, targets):
    """Yield a flat row for each arm: the step time relative to the plain model's, timed in turn; the saved bytes and
    the peak; and the largest batch.

    arms: {name: maker}. make_plain: the maker of the plain arm. counted: {name: row} of `count_all`.
    targets: {name: the largest ratio to the plain step's time that is claimed, or None}.
    """
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    on_cuda = device.type == "cuda"
    for name, make in arms.items():
        try:
            arm = AdamSteps(make, args, device, args.timed_batch_size)
            plain = AdamSteps(make_plain, args, device, args.timed_batch_size)
            seconds = interleaved({"plain": plain.run, "arm": arm.run}, args.rounds)
            precision, peak = arm.precision.label, arm.peak_bytes
            saved_share, peak_share = arm.saved_bytes / plain.saved_bytes, peak and peak / plain.peak_bytes
            plan = getattr(arm.model, "the_plan", None)
            arm = plain = None  # Frees their memory for the search.
            # Not for compiled models, which would be compiled again for every size.
            largest = largest_that_fits(make, args, device) if on_cuda and not name.startswith("compile") else None
        except Exception as error:
            arm = plain = None
            yield failed(name, error)
            continue
        time, plain_step = ratio_summary(seconds["arm"], seconds["plain"]), median(seconds["plain"]) / args.steps
        predicted, most = 1 + plan.extra_seconds / plain_step if plan else None, targets.get(name)
        row = {
            "policy": name,
            "batch_size": args.timed_batch_size,
            "precision": precision,
            "step_times_plain": time["median"],
            "step_low": time["low"],
            "step_high": time["high"],
            "predicted_step": predicted,
            "predicted_within_10_percent": predicted and judge_prediction(predicted, time["interval"]),
            "target": most and f"at most {most}",
            "reached": most and judge("at most", most, time["interval"]),
            "saved_share": saved_share,
            "peak_allocated_bytes": peak,
            # Without an allocator that counts (CPU), the peak that was counted from the tensors.
            "peak_share": peak_share or counted.get(name, {}).get("peak_share"),
        }
        if on_cuda:
            row["reaches_goal"] = all(row[key] <= limit for key, limit in GOAL.items())
        row["largest_batch"] = largest
        print(f"{name}: step {time['median']:.2f} x plain", flush=True)
        yield row


def judge_prediction(predicted, interval):
    """Whether `predicted` is within 10 % of the value with this `interval`: "yes", "no" or "undecided"."""
    above = judge("at least", predicted / 1.1, interval)
    below = judge("at most", predicted / 0.9, interval)
    return "no" if "no" in (above, below) else "undecided" if "undecided" in (above, below) else "yes"


def failed(name, error):
    """The row of an arm that raised `error`, so that the others can go on. An error of the plain model is raised."""
    if name == "plain":
        raise error
    text = str(error).strip() or type(error).__name__
    print(f"{name}: {text}", file=sys.stderr, flush=True)
    return {"policy": name, "missed": text.splitlines()[0]}


class AdamSteps:
    """Training steps with Adam, as in resnext.py, always on the same batch.

    saved_bytes: saved for backward. peak_bytes: allocated at the peak of a step, including weights and Adam's moments;
    None without CUDA.
    """

    def __init__(self, make, args, device, batch_size):
        on_cuda = device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_cuda else None
        self.precision = choose_precision(args.half_precision, device, say=lambda line: None)
        self.steps = args.steps
        self.images = torch.randn(batch_size, 3, 32, 32, device=device)
        self.labels = torch.randint(10, (batch_size,), device=device)
        self.model = make(batch_size, self.precision)
        self.optimizer = torch.optim.Adam(self.model.parameters(), fused=on_cuda)
        saved = SavedBytes(self.model)
        self.step(saved)
        self.saved_bytes = saved.bytes
        reset_peak_memory(device)
        self.step()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before if on_cuda else None

    def run(self):
        for _ in range(self.steps):
            self.step()

    def step(self, forward_context=NO_CONTEXT):
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast(), forward_context:
            loss = F.cross_entropy(self.model(self.images), self.labels)
        self.precision.scaler.scale(loss).backward()
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()


def largest_that_fits(make, args, device):
    """The largest batch, a multiple of BATCH_STEP, whose training step fits in memory; 0 if none does.

    A step's memory is linear in the batch size, so two small batches tell where to start the search.
    """

    def peak_bytes(batch_size):
        """The peak bytes of a step; None if it does not fit."""
        gc.collect()  # A caught exception and the memory it refers to may be in a reference cycle.
        torch.cuda.empty_cache()
        try:
            return AdamSteps(make, args, device, batch_size).peak_bytes
        except RuntimeError as error:
            if not endings.is_out_of_gpu_memory(error):
                raise
            return None

    # Otherwise cuDNN searches for its fastest algorithms at each size.
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        one, two = peak_bytes(BATCH_STEP), peak_bytes(2 * BATCH_STEP)
        if two is None:
            return BATCH_STEP if one else 0
        spare = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - two
        guess = 2 + max(0, int(spare // (two - one)))
        good = min(guess * BATCH_STEP, LARGEST_BATCH)
        while not peak_bytes(good):
            good -= BATCH_STEP
        while good < LARGEST_BATCH and peak_bytes(good + BATCH_STEP):
            good += BATCH_STEP
        return good
    finally:
        torch.backends.cudnn.benchmark = before
        gc.collect()
        torch.cuda.empty_cache()
