"""The memory that each checkpointing policy and budget saves for backward, what it recomputes, and the peak.

    python3 benchmarks/memory.py

On any device. It ends with exit code 1 where an arm fails, or has other gradients than the plain model, or where a plan
for a budget keeps more than that, is not predicted within 3 %, or on ResNeXt29_4x64d recomputes more than claimed: no
convolution for 0.75, 8 % more FLOPs for 0.50, 31 % for 0.25. Such an arm's row says so.

Beside them stand the usual block-wise torch.utils.checkpoint, the original study's nested scheme, and torch.compile's
own activation_memory_budget.

Every arm's gradients are checked, too: they may differ from those in float64 four times as much as the plain model's
do. Saved bytes are counted by saved-tensor hooks, which see what compiled code saves too; recomputed FLOPs are those of
forward convolutions that run in backward. The peak is of activations and their gradients: on a CPU of the tensors that
operators return (not known for Inductor's code, whose buffers no operator returns: --compile_backend aot_eager runs the
same plans by operators), on CUDA with what cuDNN works in.
With --steps, as on CUDA by default, whole training steps of each arm are timed in turn with the plain one's, in the
true batch size, and the largest batch that fits is searched for.
"""

import contextlib
import functools
import gc
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "resnext")]

import torch
import torch.nn.functional as F
from common import interleaved, ratio_summary, results_path
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from experiment import model_name
from harness import arguments, endings
from harness.endings import UserError
from harness.files import write_record
from harness.machine import describe_machine
from harness.memory import LiveBytes, SavedBytes, reset_peak_memory
from harness.planning import convolution_flops, plan_recomputation
from harness.precision import choose_precision, half_precision_type
from models.resnext import ResNeXt, parse_name
from models.resnext_checkpoint import POLICIES, CheckpointResNeXt

CLAIMED = "resnext29_4x64d"
BUDGETS = {0.75: 0.0, 0.5: 0.08, 0.4: None, 0.35: None, 0.3: None, 0.25: 0.31}  # The most extra FLOPs claimed.
COMPILE_BUDGETS = (1.0, 0.5, 0.25)
GOAL = {"peak_share": 0.60, "step_times_plain": 1.15}  # On CUDA, for at least one arm.
BATCH_STEP = 128  # The largest batch is given as a multiple of it.
# Not searched beyond: from 4096 pictures on, the first stage's outputs have over 2**31 elements, and kernels that count
# them in 32 bits refuse.
LARGEST_BATCH = 4096 - BATCH_STEP
NO_CONTEXT = contextlib.nullcontext()


def get_args_parser():
    on_cuda = torch.cuda.is_available()
    parser = arguments.OneLineParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", type=model_name, default=CLAIMED)
    add(
        "--batch_size",
        type=arguments.positive_int,
        default=4,
        help="of the pass that bytes and FLOPs are counted in",
    )
    add("--policies", nargs="+", help="of these arms alone, and plain, as the table names them")
    add("--compile_backend", choices=("inductor", "aot_eager", "none"), default="inductor")
    add("--steps", type=arguments.non_negative_int, default=5 if on_cuda else 0, help="training steps in a round")
    add("--rounds", type=arguments.positive_int, default=5)
    add("--timed_batch_size", type=arguments.positive_int, default=128)
    add("--half_precision", type=half_precision_type, nargs="?", const="float16", help="of the timed steps")
    add("--output", type=Path, help="by default benchmarks/results/<hardware>/memory.json")
    return parser


def main():
    args = get_args_parser().parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    plain = ResNeXt(*parse_name(args.model)).to(device).train()
    arms = make_arms(plain, args.compile_backend, device)
    unknown = set(args.policies or ()) - arms.keys()
    if unknown:
        raise UserError(f"--policies: there is no {min(unknown)!r}; there are {', '.join(arms)}")
    arms = {name: arm for name, arm in arms.items() if name in ("plain", *(args.policies or arms))}
    settings = {name: getattr(args, name) for name in ("model", "batch_size", "compile_backend")}
    record = {"benchmark": "memory", "machine": describe_machine(device), **settings, "rows": [], "training": []}
    path = args.output or results_path("memory", device)
    # Written after each, since a lent GPU may be taken back.
    for row in count_all(arms, args, device):
        record["rows"].append(row)
        write_record(path, record)
    show(record["rows"], args.batch_size)
    for row in train_all(arms, args, device) if args.steps else ():
        record["training"].append(row)
        write_record(path, record)
    print(f"written: {path}")
    missed = [f"{row['policy']}: {row['missed']}" for row in (*record["rows"], *record["training"]) if "missed" in row]
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


def make_arms(plain, compile_backend, device):
    """name -> function of the batch size and the Precision of its training that gives a model with the weights of
    `plain`, ready to train."""

    def copy_of(model):
        model.load_state_dict(plain.state_dict())
        return model.to(device).train()

    size = plain.layer1[0].conv2
    shape = size.groups, size.out_channels // size.groups

    def checkpointed(policy, batch_size, precision):
        model = copy_of(CheckpointResNeXt(*shape))
        model.policy = policy
        if policy in BUDGETS:
            model.the_plan = plan_recomputation(model.rehearse(batch_size, timed=False), held=policy, cost="flops")
            model.policy = model.the_plan.redo
        return model

    def compiled(budget, batch_size, precision):
        torch.compiler.reset()
        model = copy_of(ResNeXt(*shape))
        # In place, so that what is called first, and so compiled, has the budget; the graph keeps it. Called as it will
        # be in training: under another autocast it would be compiled again, without the budget.
        model.compile(backend=compile_backend, dynamic=False)
        images = torch.zeros(batch_size, 3, 32, 32, device=device)
        with torch._functorch.config.patch(activation_memory_budget=budget), kept_state(model):
            with precision.autocast():
                output = model(images)
            output.sum().backward()
        return model

    arms = {"plain": lambda batch_size, precision: copy_of(ResNeXt(*shape))}
    arms |= {policy: functools.partial(checkpointed, policy) for policy in [*POLICIES, "nested"]}
    arms["torch.utils.checkpoint"] = lambda batch_size, precision: copy_of(BlockwiseResNeXt(*shape))
    arms |= {f"budget {budget:g}": functools.partial(checkpointed, budget) for budget in BUDGETS}
    if compile_backend != "none":
        arms |= {f"compile {budget:g}": functools.partial(compiled, budget) for budget in COMPILE_BUDGETS}
    return arms


@contextlib.contextmanager
def kept_state(model):
    """What happens to `model` within the block is undone."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield
    model.load_state_dict(before)
    model.zero_grad(set_to_none=True)


# ---------------------------------------------------------------------- bytes and FLOPs


def count_all(arms, args, device):
    """Yield a row for each arm; it has a text `missed` where the arm fails, its gradients are wrong, or a claim is."""
    # The gradients are compared between arms that run the same convolutions in different orders.
    torch.backends.cudnn.allow_tf32 = False
    single = choose_precision(None, device)
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (args.batch_size,), device=device)
    plain = arms["plain"](args.batch_size, single)
    with FlopCounterMode(display=False) as counter, kept_state(plain):
        plain(images)
    forward_flops = convolution_flops(counter)
    exact = count_bytes_and_flops(plain.double(), images.double(), labels)[0]
    allowed = plain_bytes = None
    for name, make in arms.items():
        is_compiled = name.startswith("compile")
        is_hidden = is_compiled and args.compile_backend == "inductor" and device.type == "cpu"
        try:
            model = make(args.batch_size, single)
            with kept_state(model):
                gradient, saved, recomputed = count_bytes_and_flops(model, images, labels)
            peak = None if is_hidden else peak_bytes(model, images, labels, is_compiled)
        except Exception as error:
            yield failed(name, error)
            continue
        error = (gradient - exact).norm() / exact.norm()
        allowed, plain_bytes = allowed or 4 * error, plain_bytes or saved
        missed = [] if error <= allowed else [f"gradients off by {error:.1e} of their norm, {allowed:.1e} allowed"]
        # Over the FLOPs of plain forward and backward, the latter counted as twice the former.
        extra = recomputed / (3 * forward_flops)
        row = {"policy": name, "bytes": saved, "share": saved / plain_bytes, "extra": extra, "peak_bytes": peak}
        if hasattr(model, "the_plan"):
            row |= {"predicted_bytes": model.the_plan.held_bytes, "predicted_peak_bytes": model.the_plan.peak_bytes}
            missed += broken_claims(row, float(name.removeprefix("budget ")), args.model)
        yield row | ({"missed": "; ".join(missed)} if missed else {})


def failed(name, error):
    """The row of an arm that raised `error`: it should not cost the others. That of the plain model ends all."""
    if name == "plain":
        raise error
    text = str(error).strip() or type(error).__name__
    print(f"{name}: {text}", file=sys.stderr, flush=True)
    return {"policy": name, "missed": text.splitlines()[0]}


def broken_claims(row, budget, model):
    """What is claimed of a plan for `budget` and does not hold of its row, in words: a list."""
    limit = BUDGETS[budget]
    prediction = row["predicted_bytes"] / row["bytes"]
    claims = {
        f"keeps {row['share']:.3f} of plain": row["share"] <= budget,
        f"its prediction is {prediction:.3f} times what it keeps": abs(prediction - 1) <= 0.03,
        f"recomputes {100 * row['extra']:.1f} % FLOPs": model != CLAIMED or limit is None or row["extra"] <= limit,
    }
    return [claim for claim, holds in claims.items() if not holds]


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


def show(rows, batch_size):
    print("| policy | MiB a picture after forward | share | extra FLOPs | peak, MiB a picture |")
    print("|---|---:|---:|---:|---:|")
    for row in rows:
        if "bytes" not in row:
            continue
        held, peak = (size and f"{size / batch_size / 2**20:.1f}" for size in (row["bytes"], row["peak_bytes"]))
        print(f"| {row['policy']} | {held} | {row['share']:.3f} | {100 * row['extra']:+.1f} % | {peak or '–'} |")


# ---------------------------------------------------------------------- training steps


def train_all(arms, args, device):
    """Yield a flat row for each arm: training steps timed in turn with the plain model's, saved bytes, the peak, and
    the largest batch."""
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    on_cuda = device.type == "cuda"
    plain_bytes = plain_peak = None
    for name, make in arms.items():
        try:
            arm = Trainer(make, args, device, args.timed_batch_size)
            plain = Trainer(arms["plain"], args, device, args.timed_batch_size)
            seconds = interleaved({"plain": plain.run, "arm": arm.run}, args.rounds)
            precision, saved, peak = arm.precision.label, arm.saved_bytes, arm.peak_bytes
            arm = plain = None  # Their memory is the search's.
            # Compiled code would be compiled for every size that is tried.
            largest = largest_batch(make, args, device) if on_cuda and "compile" not in name else None
        except Exception as error:
            arm = plain = None
            yield failed(name, error)
            continue
        plain_bytes, plain_peak = plain_bytes or saved, plain_peak or peak
        time = ratio_summary(seconds["arm"], seconds["plain"])
        row = {
            "policy": name,
            "batch_size": args.timed_batch_size,
            "precision": precision,
            "step_times_plain": time["median"],
            "step_low": time["low"],
            "step_high": time["high"],
            "saved_share": saved / plain_bytes,
            "peak_allocated_bytes": peak,
            "peak_share": peak and peak / plain_peak,
        }
        if on_cuda:
            row["reaches_goal"] = all(row[key] <= limit for key, limit in GOAL.items())
        row["largest_batch"] = largest
        share = row["peak_share"]
        print(
            f"{name}: step {time['median']:.2f} x plain ({time['low']:.2f} to {time['high']:.2f}), "
            f"peak {'not known' if share is None else f'{share:.3f} x'}, largest batch {largest or 'not known'}",
            flush=True,
        )
        yield row


class Trainer:
    """Training steps of a model with Adam, as resnext.py's, on one batch.

    saved_bytes: saved for backward. peak_bytes: allocated at the peak of a step, weights and Adam's moments among them;
    None without CUDA.
    """

    def __init__(self, make, args, device, batch_size):
        on_cuda = device.type == "cuda"
        before = torch.cuda.memory_allocated() if on_cuda else None
        self.precision = choose_precision(args.half_precision, device, say=lambda line: None)
        self.steps, self.device = args.steps, device
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
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, forward_context=NO_CONTEXT):
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast(), forward_context:
            loss = F.cross_entropy(self.model(self.images), self.labels)
        self.precision.scaler.scale(loss).backward()
        self.precision.scaler.step(self.optimizer)
        self.precision.scaler.update()


def largest_batch(make, args, device):
    """The largest batch, a multiple of BATCH_STEP, whose training step fits; 0 when none does.

    A step's memory is linear in the pictures: that of two small batches tells where to look.
    """

    def peak_bytes(batch_size):
        """At the peak of a step; None when it does not fit."""
        gc.collect()  # What an exception that was caught here held may be held by itself.
        torch.cuda.empty_cache()
        try:
            return Trainer(make, args, device, batch_size).peak_bytes
        except RuntimeError as error:
            if not endings.is_out_of_gpu_memory(error):
                raise
            return None

    # Else cuDNN searches for its fastest algorithms at each size.
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


if __name__ == "__main__":
    endings.run(main)
