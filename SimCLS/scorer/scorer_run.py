"""The files of a scorer's training, and its messages."""

import datetime
import re
import shutil

import numpy as np
import torch
from data_utils import ROUGE
from model import save_scorer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness import runs
from harness.endings import UserError
from harness.epoch_times import typical_milliseconds
from harness.files import atomic_write, write_json
from harness.machine import hardware_name
from harness.memory import in_mib
from harness.precision import HALF, explain_half_precision
from harness.run_log import timing_figures
from scorer.metrics import MOST_UPDATES_A_REPORT, CollapseWatch, mean_rouge
from scorer.scorer_arguments import CACHE, run_name

NOT_RESULTS = (*runs.NOT_RESULTS, "max_steps", "port", "evaluate", "run_name", "cuda", "gpuid", "num_workers")
WEIGHTS = ("scorer.bin", "model.bin")  # The best, and the last.
FIXED_LENGTH = "the learning rate falls to zero over all updates"
POINTS_PER_EPOCH = 200  # The most points of the loss curve in the record.
REPORTS = 100  # Loss reports in a whole run, unless MOST_UPDATES_A_REPORT requires more.


class ScorerRun(runs.Run):
    """A Run in ./cache/<name>/: the best weights (scorer.bin), the last ones (model.bin), their description
    (scorer.json), config.json, the record, and with `-l` log.txt and TensorBoard events.

    `validations` (dicts) and `losses` ([update, loss] points) are the history within the epoch. A saved state has the
    parts "scorer", "optimizer", "scaler", "metrics" and "run".
    """

    title = "training simcls"
    unit = "documents"
    elsewhere = "--run_name"

    def __init__(self, args, world, **facts):
        name = run_name(args)
        super().__init__("simcls", CACHE / name, name, args, world, NOT_RESULTS, FIXED_LENGTH, **facts)
        self.results = () if args.max_steps else tuple(self.folder / name for name in WEIGHTS)
        # A run that was killed in its first validation has weights, but no state yet.
        self.weights = () if args.resume else [self.folder / name for name in WEIGHTS]
        self.validations, self.losses, self.best = [], [], None
        self._watch = CollapseWatch(args.margin)
        self.kept_share = 1.0  # Bytes kept for backward, relative to no recomputation and no half precision.

    def temporary_files(self):
        return self.folder.glob(".*.tmp")  # Only this run uses the folder.

    def other_states(self):
        """The states of runs that are also named by their settings and differ only in the workers."""
        if self.args.run_name:
            return []
        alike = re.compile(re.escape(self.name).replace(f"_{self.args.num_workers}_worker", r"_\d+_worker", 1))
        return [path for path in sorted(CACHE.glob("*/*.state")) if alike.fullmatch(path.stem)]

    def take_over(self, state):
        for name in ("scorer.json", *WEIGHTS):  # No later weights may be better.
            if (state.parent / name).is_file():
                with open(state.parent / name, "rb") as theirs, atomic_write(self.folder / name) as ours:
                    shutil.copyfileobj(theirs, ours)

    def state_dict(self):
        history = {"validations": self.validations, "losses": self.losses, "best": self.best}
        return history | {"watch": self._watch.state_dict(), "collapsed": self.facts.get("collapsed", [])}

    def load_state_dict(self, state):
        self.validations, self.losses, self.best = state["validations"], state["losses"], state["best"]
        self._watch.load_state_dict(state["watch"])
        if state["collapsed"]:
            self.facts["collapsed"] = state["collapsed"]

    def resume(self):
        place = super().resume()
        if not self.world.is_main:
            self.state["metrics"].totals.zero_()  # The main process has the sums of all.
        return place

    def describe(self, scorer, description, schedule, validated):
        """Record what is trained and how, in config.json and in messages. Must be called before `epochs`.

        description: as from `load_scorer`. validated: the number of documents of a validation.
        """
        self._validated = validated
        self._description, self._schedule = description, schedule
        self._updates_an_epoch = schedule.updates // self.args.num_epoch
        self._report_freq = min(max(1, schedule.updates // REPORTS), MOST_UPDATES_A_REPORT)
        self._watch.warmup = schedule.warmup
        self.facts["parameters"] = sum(weight.numel() for weight in scorer.parameters())
        learning = sum(weight.numel() for weight in scorer.parameters() if weight.requires_grad)
        self.facts["learning_parameters"] = learning
        self.facts["peak_rate"], self.facts["warmup_updates"] = schedule.peak, schedule.warmup
        if self.world.is_main and not self.is_dry:
            write_json(self.folder / "config.json", vars(self.args) | {"encoder": scorer.encoder.config.to_dict()})
        device, precision = self.world.device, self.facts["precision"]
        processes = f", {self.world.size} processes" if self.world.size > 1 else ""
        frozen = f" ({learning:,} learn: --frozen_layers {self.args.frozen_layers})" if self.args.frozen_layers else ""
        self._opening = (
            f"{description['architecture']}, {self.facts['parameters']:,} parameters{frozen}, {precision}, on {device} "
            f"({hardware_name(device)}{processes}); {explain_half_precision(precision, device)}; recomputation "
            f"{self._recomputation() or 'off (--use_checkpoint, --memory_budget)'}; {self.args.num_workers} workers",
            f"{self.folder}: {schedule.updates} updates, peak rate {schedule.peak:.2e} after {schedule.warmup} of them",
        )

    def opening(self):
        return self._opening

    def _recomputation(self):
        """What backward recomputes, in words; None if nothing."""
        if self.args.use_checkpoint:
            return "of each encoder layer"
        return f"for a peak of at most {self.args.memory_budget:g}" if self.args.memory_budget else None

    def log_folder(self):
        return self.folder

    def logged_step(self, epoch, step):
        return self._update(epoch, step)

    def _update(self, epoch, step):
        """The number of updates before step `step` of `epoch`, both counted from 0."""
        return epoch * self._updates_an_epoch + -(-step // self.args.accumulate_step)

    def validation_is_due(self, epoch):
        """Whether to validate before the current step, where an update begins. A resumed run may have just done so."""
        if epoch.step == 0 or self.is_dry or not self.batches.starts_update(epoch.step):
            return False
        update = self._update(epoch.number, epoch.step)
        just_done = self.validations and self.validations[-1]["update"] == update
        return update % self.args.eval_freq == 0 and not just_done

    def report(self, epoch):
        """If a report is due, report the loss since the last one, and check whether the scores have collapsed."""
        update, metrics, schedule = self._update(epoch.number, epoch.step + 1), self.state["metrics"], self._schedule
        if not self.batches.ends_update(epoch.step) or update % self._report_freq:
            return
        loss, spread = metrics.report(self.world)
        self._check_loss(epoch.number, "loss", loss)
        rate = float(schedule.rate)
        self.losses.append([update, loss])
        if len(self.losses) > POINTS_PER_EPOCH:
            self.losses = self.losses[1::2]
        self.log.plot({"loss": loss, "spread": spread, "rate": rate}, update)
        line = f"update {update}: loss {loss:.4f}, spread {spread:.4f}, rate {rate:.2e}"
        if self._bar.disable:
            self.say(line)
        else:
            self._bar.set_postfix_str(line)
        if self._watch.sees_collapse(update, spread):
            self.facts.setdefault("collapsed", []).append(update)
            self.say(
                f"update {update}: the scores have collapsed: all candidates of a document get the same score (spread "
                f"{spread:.1e}), and the loss stays near {metrics.flat_loss(self.args):.2f} for any text; stop, and "
                f"train again with a smaller --lr (the peak is {schedule.peak:.1e}) or a larger --warmup (now "
                f"{self.args.warmup})"
            )

    def _check_loss(self, epoch, what, value):
        """UserError if the `value` of a loss in `epoch` (counted from 0) is not finite."""
        if np.isfinite(value):
            return
        every = [each for past in self.history for each in past["validations"]] + self.validations
        kept = f"keeps the weights as of update {every[-1]['update']}" if every else "has no weights of this run"
        single = ", or with bfloat16 or single precision" if self.facts["precision"] == "fp16" else ""
        raise UserError(
            f"the {what} became {value} in epoch {epoch + 1}: {self.folder} {kept}; train again with another "
            f"--run_name and a smaller --lr (the peak is {self.facts['peak_rate']:.1e}){single}"
        )

    def keep_within_epoch(self, epoch, result):
        """Record a validation before the current step, and save the state; UserError, with nothing written, if a loss
        is not finite, since the epoch's mean would stay so. After a signal, the script ends here.

        result: as from `validate`.
        """
        if result is None:
            self.leave(epoch)
        metrics = self.state["metrics"]
        # Not finite if any sum of any process is not.
        self._check_loss(epoch.number, "loss", float(self.world.sum(metrics.totals.clone()).sum()))
        with self.phase.paused():
            self.add_validation(self._update(epoch.number, epoch.step), result, self.state["scorer"])
            metrics.gather(self.world)
            self.save(epoch.number, epoch.step)

    def add_validation(self, update, result, scorer):
        """Record the `result` of `validate` at `update`, and save the weights as the last and, if so, as the best.
        UserError, with nothing written, if the validation loss is not finite."""
        self._check_loss(len(self.history), "validation loss", result["val_loss"])
        self.validations.append({"update": update, **result})
        figures = [mean_rouge(result), -result["val_loss"]]  # If ROUGE is equal, the lower loss is better.
        best = self.best is None or figures > self.best
        shown = ", ".join(f"{name} {100 * result[f'val_{name}']:.2f}" for name in ROUGE)
        shown += "; first candidates " + ", ".join(f"{100 * result[f'first_{name}']:.2f}" for name in ROUGE)
        mark = " (best)" if best else ""
        self.say(f"update {update}: validation loss {result['val_loss']:.4f}, {shown}{mark}")
        self.log.plot(result, update)
        if best:
            self.best = figures
        if self.world.is_main and not self.is_dry:
            # An earlier run's record must go with its weights: by it, --resume would take this run for finished.
            self.path(".json").unlink(missing_ok=True)
            for name in WEIGHTS if best else WEIGHTS[1:]:
                save_scorer(self.folder / name, scorer, self._description)

    def add_epoch(self, epoch, result, evaluation_seconds):
        """Append an Epoch with the `result` of its last validation to the history; UserError, with nothing written, if
        a loss is not finite."""
        loss = self.state["metrics"].epoch_loss(self.world)
        self._check_loss(epoch.number, "loss", loss)
        self.state["metrics"].gather(self.world)  # The main process saves its state next.
        self.add_validation(self._update(epoch.number, epoch.done), result, self.state["scorer"])
        figures = {"loss": loss, **result, "losses": self.losses, "validations": self.validations}
        self.record_epoch(epoch, evaluation_seconds, **figures)
        self.validations, self.losses = [], []
        self.log.line(self.line())
        self.log.plot(timing_figures(epoch.timing), self._update(epoch.number, epoch.done))

    def line(self):
        """The latest epoch in one line of text."""
        epoch = self.history[-1]
        return (
            f"epoch {epoch['epoch']}/{self.args.num_epoch}: loss {epoch['loss']:.4f}, "
            f"{epoch['timing']['seconds']:.1f} s, {epoch['samples_per_second']:.1f} documents/s"
        )

    def finish(self):
        """Write the record, then delete the state; nothing if --max_steps ended the run."""
        if self.stop.enough:
            return
        self.write_record()
        self.drop_state()
        self.say(
            f"{self.folder / 'scorer.bin'}: best validation ROUGE {100 * self.best[0]:.2f} (mean of the three); next "
            f"to it: model.bin (last weights), {self.name}.json (record)"
        )
        self.say(self._effect())

    def _effect(self):
        """The bytes kept for backward in the first step, and those without memory-saving techniques, in words."""
        kept = self.facts["saved_activation_bytes"]
        text = f"kept from forward to backward: {in_mib(kept)} MiB"
        techniques = ["recomputation"] * bool(self._recomputation())
        techniques += ["half precision"] * (self.facts["precision"] != "fp32")
        if not techniques:
            return text
        text += f", without {' and '.join(techniques)} about {in_mib(kept / self.kept_share)} ({self.kept_share:.2f} x)"
        plan = self.facts.get("plan")
        if plan:
            text += f"; peak {plan['peak_share']:.2f} x (planned {plan['planned_peak_share']:.2f}), by recomputing "
            text += f"{len(plan['redo'])} parts of layers"
        return text

    def prospects(self, timing):
        """The expected cost of the run, in lines, after some steps of --dry_run. timing: of these, from PhaseTimer."""
        steps, per_validation = self.batches.number_of_batches, self._validated / self.args.batch_size
        step, forward = (typical_milliseconds(timing["phases"][name]) / 1e3 for name in ("step", "forward"))
        validations = 1 + (self._updates_an_epoch - 1) // self.args.eval_freq
        seconds = self.args.num_epoch * (steps * step + validations * per_validation * forward)
        seconds += self.seconds["start_up_seconds"]
        kept = in_mib(self.facts["saved_activation_bytes"])
        return (
            f"{self.facts['parameters']:,} parameters; about {self._flops() / 1e9:.4g} GFLOP per step, forward and "
            f"backward; {kept} MiB kept from forward to backward in the first step",
            f"{steps} steps and {self._updates_an_epoch} updates per epoch, {step:.4g} s per step (the median of "
            f"{timing['phases']['step']['count'] or 1}); {self.args.num_epoch} epochs with {validations} validations "
            f"each would take about {seconds:.0f} s ({datetime.timedelta(seconds=round(seconds))})",
        )

    def _flops(self):
        """The FLOPs of forward and backward for the last batch, with recomputation, without frozen layers' backward."""
        scorer, device = self.state["scorer"], self.world.device
        learning = [weight for weight in scorer.parameters() if weight.requires_grad]
        dtype = HALF.get(self.facts["precision"])
        # Of the kinds of attention, torch counts only this one on a CPU.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                scores, gold_scores = scorer(self.state["metrics"].last_batch)
            torch.autograd.grad(scores.sum() + gold_scores.sum(), learning, allow_unused=True)
        return counter.get_total_flops()

    def progress_bar(self, epoch):
        """The progress bar, which also shows the latest report."""
        self._bar = super().progress_bar(epoch)
        return self._bar
