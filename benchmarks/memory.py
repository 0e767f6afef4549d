#!/usr/bin/env python3
"""What each checkpointing policy and memory budget holds for backward, and what it redoes. Any device.

Claim: on ResNeXt29_4x64d, a budget of 0.75 redoes no convolution, 0.50 at most +8 % FLOPs, 0.25 at most +31 %, each at
or under its budget and predicted within 3 %. Every arm's gradients are first checked against the plain model's.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "resnext")]

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import results_path
from harness import command_line
from harness.profiling import SavedBytes
from harness.recording import describe_machine, write_json
from models.resnext import ResNeXt, parse_name
from models.resnext_checkpoint import POLICIES, CheckpointResNeXt

CLAIMED = "resnext29_4x64d"
BUDGETS = {0.75: 0.0, 0.5: 0.08, 0.25: 0.31}  # The most extra FLOPs claimed for each.


def main():
    parser = command_line.OneLineParser(description=__doc__)
    parser.add_argument("--model", default=CLAIMED)
    parser.add_argument("--batch_size", type=command_line.positive_int, default=4)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output = args.output or results_path("memory", device)

    # The gradients are compared between arms that run the same convolutions in different orders.
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (args.batch_size,), device=device)
    plain = ResNeXt(*parse_name(args.model)).to(device).train()
    model = CheckpointResNeXt(*parse_name(args.model)).to(device).train()
    model.load_state_dict(plain.state_dict())
    reference = measure(plain, images, labels)
    forward_flops = reference["forward_flops"]

    rows = [row("plain", reference, reference, forward_flops)]
    for policy in [*POLICIES, "nested", *BUDGETS]:
        plan = model.plan(policy, args.batch_size) if policy in BUDGETS else None
        model.policy = plan.redo if plan else policy
        measured = measure(model, images, labels)
        assert torch.allclose(measured["gradient"], reference["gradient"], rtol=1e-4, atol=1e-6), policy
        rows.append(row(f"budget {policy}" if plan else policy, measured, reference, forward_flops))
        if plan:
            rows[-1] |= {"predicted_bytes": plan.held_bytes, "predicted_peak_bytes": plan.peak_bytes}
            assert rows[-1]["share"] <= policy, rows[-1]
            assert abs(plan.held_bytes / measured["bytes"] - 1) <= 0.03, rows[-1]
            assert args.model != CLAIMED or rows[-1]["extra"] <= BUDGETS[policy], rows[-1]

    print("| policy | MiB a picture after forward | share | extra FLOPs |\n|---|---:|---:|---:|")
    for each in rows:
        mebibytes = each["bytes"] / args.batch_size / 2**20
        print(f"| {each['policy']} | {mebibytes:.1f} | {each['share']:.3f} | {100 * each['extra']:+.1f} % |")
    settings = {"model": args.model, "batch_size": args.batch_size}
    write_json(output, {"benchmark": "memory", "machine": describe_machine(device), **settings, "rows": rows})


def measure(model, images, labels):
    """Bytes saved for backward, convolution FLOPs of forward and of what backward redoes, and the gradient [n]."""
    model.zero_grad(set_to_none=True)
    with SavedBytes(model) as saved, FlopCounterMode(display=False) as forward:
        loss = F.cross_entropy(model(images), labels)
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    forward, again = (
        counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution, 0) for counter in (forward, backward)
    )
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    return {"bytes": saved.bytes, "forward_flops": forward, "redone_flops": again, "gradient": gradient}


def row(policy, measured, reference, forward_flops):
    """extra: FLOPs redone over those of plain forward and backward, the latter counted as twice the former."""
    return {
        "policy": policy,
        "bytes": measured["bytes"],
        "share": measured["bytes"] / reference["bytes"],
        "extra": measured["redone_flops"] / (3 * forward_flops),
    }


if __name__ == "__main__":
    command_line.run(main)
