"""Activation recomputation compared: the bytes held for backward, the peak, the recomputed FLOPs and the step time.

    python3 benchmarks/memory.py

Our arms are the policies chain and block and the plans of harness.planning. The others are torch.compile's plans for
its activation_memory_budget (under aot_eager the same plans run operator by operator, which can be traced), each with
our plans for the same held bytes and for the same peak; the usual block-wise torch.utils.checkpoint; and the original
study's nested scheme. Simulated annealing searches for plans that are cheaper than ours.

Held bytes are counted by saved-tensor hooks, which also see what compiled code saves. The peak is the most bytes of
activations and their gradients at any time in forward and backward: on a CPU, of the tensors that operators return
(unknown for Inductor's code, whose buffers no operator returns); on CUDA, including cuDNN's workspaces. Recomputed
FLOPs are those of forward convolutions that run in backward, as a share of the plain step's. Steps are timed in turn
with the plain model's. The 95 % interval of the ratio decides (yes, no or undecided) whether it is at most the limit in
TIMED, and whether the prediction is within 10 %.

The exit code is 1 if an arm fails, if its gradients are more than four times as far from float64 as the plain model's,
or if a plan exceeds its limits, is predicted with an error above 1 %, or recomputes more FLOPs than PLANS,
torch.compile's plan or the annealing's plan. The arm's row says so. Times are judged, but cause no failure.
"""

import contextlib
import functools
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # Where python3 -P does not look.

from common import DEVICE, ON_CUDA, finish, get_parser, new_record, save

import torch
import torch.nn.functional as F
from annealing import anneal
from memory_steps import failed, train_all
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from experiment import model_name
from harness import arguments, endings
from harness.endings import UserError
from harness.memory import LiveBytes, SavedBytes
from harness.planning import convolution_flops, describe, plan_recomputation
from harness.precision import choose_precision, half_precision_type
from models.resnext import ResNeXt, parse_name
from models.resnext_checkpoint import POLICIES, CheckpointResNeXt

CLAIMED = "resnext29_4x64d"
# name -> (limits as shares of the plain step's, the most FLOPs that may be recomputed for CLAIMED)
PLANS = {
    "budget 0.5": ({"peak": 0.5}, None),
    "budget 0.394": ({"peak": 0.394}, 0.101),
    "budget 0.36": ({"peak": 0.36}, 0.18),
    "budget 0.3": ({"peak": 0.3}, None),
    "budget held 0.4": ({"held": 0.4}, 0.036),
    "budget held 0.25, peak 0.405": ({"held": 0.25, "peak": 0.405}, 0.121),
    "budget held 0.25, peak 0.394": ({"held": 0.25, "peak": 0.394}, 0.155),
}
COMPILE_BUDGETS = (1.0, 0.5, 0.4, 0.25)
# Timed on a CPU, where all arms would take too long, with the largest ratio to the plain step's time that they claim.
TIMED = {"chain": 1.12, "block": 1.32, "budget 0.5": 1.2, "budget 0.394": None, "torch.utils.checkpoint": None}
# torch.compile recomputes BatchNorm's means, 0.1 % of the held bytes. Ours keeps them, which costs this at equal bytes.
SLACK = 1e-4
SHARES, BYTES = {"held": "share", "peak": "peak_share"}, {"held": "bytes", "peak": "peak_bytes"}  # Keys of a row.
ANNEALED = ("budget 0.394", "budget 0.36", "budget held 0.4", "budget held 0.25, peak 0.394")


def get_args_parser():
    parser = get_parser(__doc__, "memory", rounds=9)
    add, positive_int = parser.add_argument, arguments.positive_int
    backends = ("aot_eager", "inductor", "none")
    add("--model", type=model_name, default=CLAIMED)
    add("--batch_size", type=positive_int, default=4, help="batch size for counting bytes and FLOPs")
    add("--policies", nargs="+", help="only these arms, by their names in the table, and plain")
    add("--compile_backend", choices=backends, default="inductor" if ON_CUDA else "aot_eager")
    add("--steps", type=arguments.non_negative_int, default=5 if ON_CUDA else 2, help="training steps per round")
    add("--timed_batch_size", type=positive_int, default=128 if ON_CUDA else 4)
    add("--half_precision", type=half_precision_type, nargs="?", const="float16", help="precision of the timed steps")
    add("--annealing_tries", type=arguments.non_negative_int, default=40_000, help="plans that each search tries")
    return parser


def main():
    args = get_args_parser().parse_args()
    torch.manual_seed(0)
    bench = Bench(ResNeXt(*parse_name(args.model)).to(DEVICE).train(), args, DEVICE)
    arms = bench.arms()
    unknown = set(args.policies or ()) - arms.keys()
    if unknown:
        raise UserError(f"--policies: {min(unknown)!r} is unknown; choose from {', '.join(arms)}")
    arms = {name: arm for name, arm in arms.items() if name in ("plain", *(args.policies or arms))}
    timed = {name: arm for name, arm in arms.items() if DEVICE.type == "cuda" or args.policies or name in TIMED}
    targets = TIMED if DEVICE.type == "cpu" and args.model == CLAIMED else {}
    settings = {name: getattr(args, name) for name in ("model", "batch_size", "compile_backend", "steps", "rounds")}
    record = new_record("memory", DEVICE, **settings)
    tables = {
        "rows": count_all(arms, args, DEVICE, bench.rows),
        "annealing": anneal_all(bench, args),
        "training": train_all(timed, arms["plain"], args, DEVICE, bench.rows, targets) if args.steps else (),
    }
    record |= {name: [] for name in tables}
    for name, rows in tables.items():
        for row in rows:  # Saved after each, since a borrowed GPU may be withdrawn.
            record[name].append(row)
            save(record, args)
    finish(record, args)
    missed = [f"{row['policy']}: {row['missed']}" for name in tables for row in record[name] if "missed" in row]
    if missed:
        sys.exit("\n".join(missed))


# ---------------------------------------------------------------------- the arms


class BlockwiseResNeXt(ResNeXt):
    """Ordinary user code with checkpointing. BatchNorm statistics are updated twice per step; gradients are correct."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            out = checkpoint(block, out, use_reentrant=False)
        return self.linear(F.avg_pool2d(out, 8).flatten(1))


class Bench:
    """Makes the models of all arms, with the weights of `plain`, ready to train.

    rows: {name: row} of the arms counted so far; our plans "as" those of torch.compile need its rows.
    """

    def __init__(self, plain, args, device):
        self._plain, self._args, self.device = plain, args, device
        self._shape = parse_name(args.model)
        self._timelines = {}
        self.rows = {}

    def arms(self):
        """{name: function(batch size, Precision of training) that returns a model}."""
        of, is_compiled = functools.partial, self._args.compile_backend != "none"
        arms = {"plain": of(self._make, ResNeXt), "torch.utils.checkpoint": of(self._make, BlockwiseResNeXt)}
        arms |= {policy: of(self._follow, policy) for policy in POLICIES}
        arms["nested"] = of(self._make, functools.partial(CheckpointResNeXt, policy="nested"))
        arms |= {name: of(self._planned, limits) for name, (limits, _) in PLANS.items()}
        # If the peak of compiled code is unknown, there are no plans for the same peak.
        known = ("held",) if is_hidden(self._args, self.device) else ("held", "peak")
        for budget in COMPILE_BUDGETS if is_compiled else ():
            arms[name := f"compile {budget:g}"] = of(self._compiled, budget)
            arms |= {f"budget {what} as {name}": of(self._like, name, what) for what in known}
        return arms

    def timeline(self, batch_size, precision):
        key = batch_size, precision.label
        if key not in self._timelines:
            with precision.autocast():
                model = CheckpointResNeXt(*self._shape).to(self.device)
                self._timelines[key] = model.rehearse(batch_size, timed=self._args.steps > 0)
        return self._timelines[key]

    def _make(self, kind, batch_size=None, precision=None):
        model = kind(*self._shape)
        model.load_state_dict(self._plain.state_dict())
        return model.to(self.device).train()

    def _follow(self, policy, batch_size, precision):
        model, timeline = self._make(CheckpointResNeXt), self.timeline(batch_size, precision)
        model.policy = policy
        model.the_plan = describe(timeline, frozenset(filter(model.redo, timeline.steps)))
        return model

    def _planned(self, limits, batch_size, precision):
        plan = plan_recomputation(self.timeline(batch_size, precision), **limits, cost="flops")
        return self._follow(plan.redo, batch_size, precision)

    def _like(self, name, what, batch_size, precision):
        """A model with our plan for the held bytes or the peak (`what`) of torch.compile's arm `name`."""
        if SHARES[what] not in self.rows.get(name, {}):
            raise UserError(f"it needs the row of {name}")
        return self._planned({what: self.rows[name][SHARES[what]]}, batch_size, precision)

    def _compiled(self, budget, batch_size, precision):
        torch.compiler.reset()
        model = self._make(ResNeXt)
        # The budget applies when the first call compiles the model, and the graph keeps it. So call it here as training
        # does: under another autocast setting it would be compiled again, without the budget.
        model.compile(backend=self._args.compile_backend, dynamic=False)
        images = torch.zeros(batch_size, 3, 32, 32, device=self.device)
        with torch._functorch.config.patch(activation_memory_budget=budget), kept_state(model):
            with precision.autocast():
                output = model(images)
            output.sum().backward()
        return model


def is_hidden(args, device):
    """Whether the peak of compiled code is unknown: on a CPU, no operator returns the buffers of Inductor's code."""
    return args.compile_backend == "inductor" and device.type == "cpu"


@contextlib.contextmanager
def kept_state(model):
    """Restore the state of `model` after the block, and discard its gradients."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------- bytes and FLOPs


def count_all(arms, args, device, rows):
    """Yield a row for each arm, and add it to `rows`. It has a text `missed` if the arm fails, its gradients are wrong,
    or it breaks a claim."""
    # TensorFloat-32 off: gradients are compared between arms that run the same convolutions in different orders.
    torch.backends.cudnn.allow_tf32 = False
    single = choose_precision(None, device)
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (args.batch_size,), device=device)
    plain = arms["plain"](args.batch_size, single)
    with FlopCounterMode(display=False) as counter, kept_state(plain):
        plain(images)
    forward_flops = convolution_flops(counter)
    with kept_state(plain.double()):
        exact, *_ = count_bytes_and_flops(plain, images.double(), labels)
    with kept_state(plain.float()):
        allowed = 4 * relative_error(count_bytes_and_flops(plain, images, labels)[0], exact)
    for name, make in arms.items():
        is_compiled = name.startswith("compile")
        try:
            model = make(args.batch_size, single)
            with kept_state(model):
                gradient, saved, recomputed = count_bytes_and_flops(model, images, labels)
            hidden = is_compiled and is_hidden(args, device)
            peak = None if hidden else peak_bytes(model, images, labels, is_compiled)
        except Exception as error:
            rows[name] = failed(name, error)
            yield rows[name]
            continue
        # Relative to the FLOPs of plain forward and backward; backward counts as twice forward.
        row = {"policy": name, "bytes": saved, "extra": recomputed / (3 * forward_flops), "peak_bytes": peak}
        plain_row = rows.get("plain", row)
        row["share"], row["peak_share"] = saved / plain_row["bytes"], peak and peak / plain_row["peak_bytes"]
        if plan := getattr(model, "the_plan", None):
            row |= {"predicted_bytes": plan.held_bytes, "predicted_peak_bytes": plan.peak_bytes}
        error = relative_error(gradient, exact)
        missed = [f"gradients off by {error:.1e} of their norm, {allowed:.1e} allowed"] if error > allowed else []
        missed += broken_claims(row, rows, args.model, device)
        rows[name] = row | ({"missed": "; ".join(missed)} if missed else {})
        yield rows[name]


def relative_error(gradient, exact):
    return float((gradient - exact).norm() / exact.norm())


def broken_claims(row, rows, model, device):
    """The claims about one of our plans that its row does not meet, a list of str."""
    name, broken = row["policy"], []
    limits, most = PLANS.get(name, ({}, None))
    if " as " in name:
        what, _, other = name.removeprefix("budget ").partition(" as ")
        limits, most = {what: rows[other][SHARES[what]]}, rows[other]["extra"] + SLACK
    if model == CLAIMED and most is not None and row["extra"] > most:
        broken.append(f"recomputes {100 * row['extra']:.2f} % of the FLOPs, over {100 * most:.2f} %")
    # On CUDA, the measured peak includes the workspaces of the device's libraries.
    for what in ("held", "peak") if device.type == "cpu" else ("held",):
        share = row[SHARES[what]]
        if share is not None and share > limits.get(what, 1e9) + 1e-3:
            broken.append(f"its {what} share is {share:.3f}, over {limits[what]:.3f}")
        if "predicted_bytes" in row and (off := off_by(row, what)) > 0.01:
            broken.append(f"its {what} bytes are not as predicted: off by {100 * off:.1f} %")
    return broken


def off_by(row, what):
    """The relative error of the prediction; what: "held" or "peak"."""
    key = BYTES[what]
    return abs(row[f"predicted_{key}"] / row[key] - 1)


def count_bytes_and_flops(model, images, labels):
    """(gradient [n] of all weights, bytes saved for backward, FLOPs of forward convolutions that run in backward)."""
    with SavedBytes(model) as saved:
        loss = F.cross_entropy(model(images), labels)
    with FlopCounterMode(display=False) as backward:  # Not around forward, where it would disable torch.compile.
        loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return gradient, saved.bytes, convolution_flops(backward)


def peak_bytes(model, images, labels, is_compiled):
    """The peak bytes of activations and their gradients in forward and backward."""
    with kept_state(model):
        if images.device.type == "cuda":
            # A first step, so that the weights' gradients and the memory that cuDNN keeps are allocated already.
            F.cross_entropy(model(images), labels).backward()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            F.cross_entropy(model(images), labels).backward()
            return torch.cuda.max_memory_allocated() - before
        live = LiveBytes(model)
        if is_compiled:
            # A dispatch mode around forward would disable torch.compile. So only backward is followed, starting from
            # what forward has saved. It contains the peak, since everything saved is still there when it begins.
            loss = saved_under(live, lambda: F.cross_entropy(model(images), labels))
        else:
            with live:
                loss = F.cross_entropy(model(images), labels)
        with live:
            loss.backward()
        return live.peak


def saved_under(live, forward):
    """Return `forward()`; the LiveBytes `live` follows the tensors that it saves for backward."""

    def pack(tensor):
        live.follow(tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return forward()


def anneal_all(bench, args):
    """Yield a row for each of ANNEALED: the FLOPs that our plan recomputes, and the fewest that annealing finds."""
    if not args.annealing_tries or args.policies:
        return
    timeline = bench.timeline(args.batch_size, choose_precision(None, bench.device))
    for name in ANNEALED:
        limits, _ = PLANS[name]
        ours = plan_recomputation(timeline, **limits, cost="flops")
        found = anneal(timeline, limits, args.annealing_tries)
        row = {"policy": name, "extra": ours.extra_flops / ours.plain_flops}
        row["extra_found"] = found if math.isfinite(found) else None
        yield row | ({"missed": "annealing finds a cheaper plan"} if found < row["extra"] - 1e-9 else {})


if __name__ == "__main__":
    endings.run(main)
