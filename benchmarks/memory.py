"""What each way of recomputing activations holds, its peak, the FLOPs that it redoes, and the time: one table.

    python3 benchmarks/memory.py

Ours are the policies chain and block and the plans of harness.planning. Beside them stand torch.compile's plans for its
activation_memory_budget (under aot_eager: the same plans run by operators, which can be followed), each with our plans
for what it holds and for its peak; the usual block-wise torch.utils.checkpoint; and the original study's nested scheme.
A search by annealing looks for plans that are cheaper than ours.

Bytes are counted by saved-tensor hooks, which see what compiled code saves too. The peak is the most bytes of
activations and their gradients at once in forward and backward: on a CPU of the tensors that operators return (not
known for Inductor's code, whose buffers no operator returns), on CUDA with what cuDNN works in. FLOPs are those of
forward convolutions that run in backward, over those of the plain step. Steps are timed in turn with the plain model's;
their ratio is judged by its 95 % interval, yes, no or undecided: whether it is at most that of TIMED, and whether
what was predicted is within 10 % of it.

It ends with exit code 1 where an arm fails, or has gradients that are further from those in float64 than four times the
plain model's, or where a plan is over its limits, is not predicted within 1 %, or redoes more FLOPs than PLANS or
torch.compile's plan or the search's does. Such an arm's row says so. Times are shown with their verdicts, and do not
fail.
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
# name -> (limits, shares of the plain step's; the most FLOPs to redo on CLAIMED)
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
# On a CPU, where all would take too long, these are timed; the times of plain steps that they should take at most.
TIMED = {"chain": 1.12, "block": 1.32, "budget 0.5": 1.2, "budget 0.394": None, "torch.utils.checkpoint": None}
# torch.compile redoes BatchNorm's means, 0.1 % of what is held; ours are kept, and at the same bytes cost it this much.
SLACK = 1e-4
SHARES, BYTES = {"held": "share", "peak": "peak_share"}, {"held": "bytes", "peak": "peak_bytes"}  # Keys of a row.
ANNEALED = ("budget 0.394", "budget 0.36", "budget held 0.4", "budget held 0.25, peak 0.394")


def get_args_parser():
    parser = get_parser(__doc__, "memory", rounds=9)
    add, positive_int = parser.add_argument, arguments.positive_int
    backends = ("aot_eager", "inductor", "none")
    add("--model", type=model_name, default=CLAIMED)
    add("--batch_size", type=positive_int, default=4, help="of the pass that bytes and FLOPs are counted in")
    add("--policies", nargs="+", help="of these arms alone, and plain, as the table names them")
    add("--compile_backend", choices=backends, default="inductor" if ON_CUDA else "aot_eager")
    add("--steps", type=arguments.non_negative_int, default=5 if ON_CUDA else 2, help="training steps in a round")
    add("--timed_batch_size", type=positive_int, default=128 if ON_CUDA else 4)
    add("--half_precision", type=half_precision_type, nargs="?", const="float16", help="of the timed steps")
    add("--annealing_tries", type=arguments.non_negative_int, default=40_000, help="plans that a search looks at")
    return parser


def main():
    args = get_args_parser().parse_args()
    torch.manual_seed(0)
    bench = Bench(ResNeXt(*parse_name(args.model)).to(DEVICE).train(), args, DEVICE)
    arms = bench.arms()
    unknown = set(args.policies or ()) - arms.keys()
    if unknown:
        raise UserError(f"--policies: there is no {min(unknown)!r}; there are {', '.join(arms)}")
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
        for row in rows:  # Written after each, since a lent GPU may be taken back.
            record[name].append(row)
            save(record, args)
    finish(record, args)
    missed = [f"{row['policy']}: {row['missed']}" for name in tables for row in record[name] if "missed" in row]
    if missed:
        sys.exit("\n".join(missed))


# ---------------------------------------------------------------------- the arms


class BlockwiseResNeXt(ResNeXt):
    """Checkpointing as a plain user writes it. Its BatchNorm statistics move twice a step; gradients are unharmed."""

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        for block in (*self.layer1, *self.layer2, *self.layer3):
            out = checkpoint(block, out, use_reentrant=False)
        return self.linear(F.avg_pool2d(out, 8).flatten(1))


class Bench:
    """Makes the models of all arms, with the weights of `plain`, ready to train.

    rows: {name: row} of what has been counted; the plans that torch.compile's are compared with need its rows.
    """

    def __init__(self, plain, args, device):
        self._plain, self._args, self.device = plain, args, device
        self._shape = parse_name(args.model)
        self._timelines = {}
        self.rows = {}

    def arms(self):
        """name -> function of the batch size and the Precision of its training that gives a model."""
        of, is_compiled = functools.partial, self._args.compile_backend != "none"
        arms = {"plain": of(self._make, ResNeXt), "torch.utils.checkpoint": of(self._make, BlockwiseResNeXt)}
        arms |= {policy: of(self._follow, policy) for policy in POLICIES}
        arms["nested"] = of(self._make, functools.partial(CheckpointResNeXt, policy="nested"))
        arms |= {name: of(self._planned, limits) for name, (limits, _) in PLANS.items()}
        # Of code that hides its peak there is nothing to plan like.
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
        """A model with our plan for what the arm `name` of torch.compile holds, or for its peak."""
        if SHARES[what] not in self.rows.get(name, {}):
            raise UserError(f"it needs the row of {name}")
        return self._planned({what: self.rows[name][SHARES[what]]}, batch_size, precision)

    def _compiled(self, budget, batch_size, precision):
        torch.compiler.reset()
        model = self._make(ResNeXt)
        # In place, so that what is called first, and so compiled, has the budget; the graph keeps it. Called as it will
        # be in training: under another autocast it would be compiled again, without the budget.
        model.compile(backend=self._args.compile_backend, dynamic=False)
        images = torch.zeros(batch_size, 3, 32, 32, device=self.device)
        with torch._functorch.config.patch(activation_memory_budget=budget), kept_state(model):
            with precision.autocast():
                output = model(images)
            output.sum().backward()
        return model


def is_hidden(args, device):
    """Whether nobody knows the peak of compiled code: on a CPU no operator returns the buffers of Inductor's."""
    return args.compile_backend == "inductor" and device.type == "cpu"


@contextlib.contextmanager
def kept_state(model):
    """What happens to `model` within the block is undone."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------- bytes and FLOPs


def count_all(arms, args, device, rows):
    """Yield a row for each arm, and put it into `rows`; it has a text `missed` where the arm fails, its gradients are
    wrong, or a claim is."""
    # The gradients are compared between arms that run the same convolutions in different orders.
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
        # Over the FLOPs of plain forward and backward, the latter counted as twice the former.
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
    """What is claimed of the row of one of our plans and does not hold, in words: a list."""
    name, broken = row["policy"], []
    limits, most = PLANS.get(name, ({}, None))
    if " as " in name:
        what, _, other = name.removeprefix("budget ").partition(" as ")
        limits, most = {what: rows[other][SHARES[what]]}, rows[other]["extra"] + SLACK
    if model == CLAIMED and most is not None and row["extra"] > most:
        broken.append(f"redoes {100 * row['extra']:.2f} % FLOPs, over {100 * most:.2f} %")
    # On CUDA the measured peak has in it what the device's libraries work in.
    for what in ("held", "peak") if device.type == "cpu" else ("held",):
        share = row[SHARES[what]]
        if share is not None and share > limits.get(what, 1e9) + 1e-3:
            broken.append(f"its {what} share is {share:.3f}, over {limits[what]:.3f}")
        if "predicted_bytes" in row and (off := off_by(row, what)) > 0.01:
            broken.append(f"its {what} bytes are not as predicted: off by {100 * off:.1f} %")
    return broken


def off_by(row, what):
    """How far the prediction is from what was measured, over that; what: "held" or "peak"."""
    key = BYTES[what]
    return abs(row[f"predicted_{key}"] / row[key] - 1)


def count_bytes_and_flops(model, images, labels):
    """(gradient [n] of all weights, bytes saved for backward, FLOPs of forward convolutions that run in backward)."""
    with SavedBytes(model) as saved:
        loss = F.cross_entropy(model(images), labels)
    with FlopCounterMode(display=False) as backward:  # Not in forward: under it torch.compile does nothing.
        loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return gradient, saved.bytes, convolution_flops(backward)


def peak_bytes(model, images, labels, is_compiled):
    """Bytes of activations and their gradients at their highest in forward and backward."""
    with kept_state(model):
        if images.device.type == "cuda":
            # Once before, so that the gradients of the weights and what cuDNN keeps are there already.
            F.cross_entropy(model(images), labels).backward()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            F.cross_entropy(model(images), labels).backward()
            return torch.cuda.max_memory_allocated() - before
        live = LiveBytes(model)
        if is_compiled:
            # torch.compile does nothing in a forward under such a mode: backward alone is followed, from what it finds
            # saved. The peak is there, since all that is saved is there when it begins.
            loss = saved_under(live, lambda: F.cross_entropy(model(images), labels))
        else:
            with live:
                loss = F.cross_entropy(model(images), labels)
        with live:
            loss.backward()
        return live.peak


def saved_under(live, forward):
    """What `forward()` returns; the tensors that it saves for backward are followed by the LiveBytes `live`."""

    def pack(tensor):
        live.follow(tensor)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return forward()


def anneal_all(bench, args):
    """Yield a row for each of ANNEALED: the FLOPs that our plan redoes, and those of the best that a search finds."""
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
