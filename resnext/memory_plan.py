"""--policy and --memory_budget in a training script: what backward recomputes, so that forward need not keep it."""

from harness import arguments
from harness.endings import UserError
from harness.loading import largest_batch
from harness.planning import Plan, plan_recomputation
from models.resnext_checkpoint import POLICIES

HELP = """recompute in backward what is cheapest to recompute, so that the peak (the most bytes of activations and
their gradients in use at once, which must fit into memory) is at most this share, from 0 to 1, of the peak without
recomputation"""
HELP_OF = """what --memory_budget limits: the peak, or what is held, that is, the activations kept when forward ends
(backward may then use more)"""


def add_budget_arguments(parser, policy):
    """Add --policy, by default `policy`, --memory_budget and --budget_of to `parser`."""
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--policy", choices=[*POLICIES, "nested"], default=policy, help="what backward recomputes")
    how.add_argument("--memory_budget", type=arguments.positive_share, metavar="SHARE", help=HELP)
    parser.add_argument("--budget_of", choices=("peak", "held"), default="peak", help=HELP_OF)


def policy_label(args):
    """The part of a run's file names that stands for these arguments: "budget0.4", "held0.4", or the policy. UserError
    if --budget_of has no effect."""
    if args.budget_of == "held" and not args.memory_budget:
        raise UserError("--budget_of held says what --memory_budget limits; add that, or leave it out")
    if not args.memory_budget:
        return args.policy
    return f"{'held' if args.budget_of == 'held' else 'budget'}{args.memory_budget:g}"


def plan_memory(model, data, args, world, precision, run, **layout):
    """Apply the plan for --memory_budget to `model`, print it, and return it; None without a budget. A resumed run
    keeps its plan, since new timings could give another one.

    data: the ImageData. layout: memory_format and dtype of the images.
    """
    if not args.memory_budget:
        return None
    kept = run.saved_facts().get("plan")
    if kept:
        plan = Plan(**kept | {"redo": frozenset(kept["redo"])})
    else:
        with precision.autocast():
            pictures = largest_batch(len(data.train_labels), args.batch_size, world.size)
            timeline = model.rehearse(pictures, data.size, **layout)
        # Several processes would each measure their own times and arrive at different plans.
        cost = "seconds" if world.size == 1 else "flops"
        plan = plan_recomputation(timeline, **{args.budget_of: args.memory_budget}, cost=cost)
    model.policy = plan.redo
    run.facts["plan"] = plan._asdict() | {"redo": sorted(plan.redo)}
    world.say(f"plan: {plan}")
    return plan


def compare_with_plan(plan, saved, cost, run):
    """Once a step's cost is measured, put it into the record and print it next to the plan, if there is one."""
    if plan and saved.bytes is not None and cost.is_known and "measured" not in run.facts:
        run.facts["measured"] = {
            "held_bytes": saved.bytes,
            "peak_bytes": cost.peak_bytes,
            "extra_flops": cost.redone_flops,
        }
        run.world.say(f"measured: {plan.compared_with(**run.facts['measured'])}")
