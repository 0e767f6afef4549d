"""The files of a scorer's training, and what it tells while it goes."""

import contextlib
import sys

import numpy as np
from data_utils import ROUGE
from model import save_scorer
from tqdm import tqdm

from harness.endings import UserError
from harness.files import write_json
from harness.runs import Run
from scorer.metrics import MOST_UPDATES_A_REPORT, CollapseWatch, mean_rouge
from scorer.scorer_arguments import CACHE, run_name

# They choose where and how long a process runs, not what it computes: a resumed run may change them.
NOT_RESULTS = ("resume", "restart", "max_steps", "log", "port", "evaluate", "run_name", "trace")
NOT_RESULTS += ("cuda", "gpuid", "device", "threads")
FIXED_LENGTH = "the learning rate falls to zero over all updates"
POINTS_PER_EPOCH = 200  # Of the loss curve in the record.
REPORTS = 100  # Lines about the loss in a whole run, unless MOST_UPDATES_A_REPORT asks for more.


class ScorerRun(Run):
    """A Run in ./cache/<name>/: the best weights (scorer.bin), the last (model.bin), scorer.json that says what they
    are for, config.json, the record, and on `-l` log.txt and TensorBoard events.

    `validations` and `losses` are the history within the epoch: dicts, and [update, loss] points. A state that is saved
    has the parts "scorer", "optimizer", "scaler", "metrics" and "run".
    """

    elsewhere = "--run_name"

    def __init__(self, args, world, **facts):
        name = run_name(args)
        super().__init__("simcls", CACHE / name, name, args, world, NOT_RESULTS, FIXED_LENGTH, **facts)
        self.validations, self.losses, self.best = [], [], None
        self._watch = CollapseWatch(args.margin)
        self._log = self._board = None

    def temporary_files(self):
        return self.folder.glob(".*.tmp")  # The folder is this run's alone.

    def state_dict(self):
        history = {"validations": self.validations, "losses": self.losses, "best": self.best}
        return history | {"watch": self._watch.state_dict(), "collapsed": self.facts.get("collapsed", [])}

    def load_state_dict(self, state):
        self.validations, self.losses, self.best = state["validations"], state["losses"], state["best"]
        self._watch.load_state_dict(state["watch"])
        if state["collapsed"]:
            self.facts["collapsed"] = state["collapsed"]

    def resume(self, **parts):
        place = super().resume(**parts)
        if not self.world.is_main:
            parts["metrics"].totals.zero_()  # The first process has resumed the sums of all.
        return place

    @contextlib.contextmanager
    def begin(self, scorer, schedule):
        """Write config.json. Within the block `say` and the figures go to the files of `-l` too."""
        self._updates_an_epoch = schedule.updates // self.args.num_epoch
        self._report_freq = min(max(1, schedule.updates // REPORTS), MOST_UPDATES_A_REPORT)
        self._watch.warmup = schedule.warmup
        self.facts["parameters"] = sum(weight.numel() for weight in scorer.parameters())
        self.facts["peak_rate"], self.facts["warmup_updates"] = schedule.peak, schedule.warmup
        if self.world.is_main:
            write_json(self.folder / "config.json", vars(self.args) | {"encoder": scorer.encoder.config.to_dict()})
        self.world.say(
            f"{self.folder}: {self.facts['parameters']:,} parameters, {schedule.updates} updates, "
            f"peak rate {schedule.peak:.2e} after {schedule.warmup}"
        )
        if not (self.args.log and self.world.is_main):
            yield
            return
        from torch.utils.tensorboard import SummaryWriter  # It takes a second to import.

        made = self._update(len(self.history), 0)
        with open(self.folder / "log.txt", "a", encoding="utf-8", buffering=1) as self._log:
            self._board = SummaryWriter(str(self.folder), purge_step=made or None)
            try:
                yield
            finally:
                self._board.close()
                self._log = self._board = None

    def _update(self, epoch, step):
        """How many updates there are before step `step` of `epoch`, both from 0."""
        return epoch * self._updates_an_epoch + -(-step // self.args.accumulate_step)

    def validation_is_due(self, epoch, step):
        """Whether to validate before step `step`, within an epoch; a resumed run has perhaps just done so."""
        update = self._update(epoch, step)
        just_done = self.validations and self.validations[-1]["update"] == update
        return step > 0 and update % self.args.eval_freq == 0 and not just_done

    def say(self, line):
        """Print a line, above the progress bar where there is one, and log it."""
        if self.world.is_main:
            tqdm.write(line)
            sys.stdout.flush()
            if self._log:
                print(line, file=self._log)

    def plot(self, values, update):
        """values: dict of name -> float."""
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, value, update)

    def report(self, epoch, step, metrics, schedule, bar):
        """When one is due: report the loss since the last report, and look whether the scores have collapsed."""
        update = self._update(epoch, step)
        if update % self._report_freq:
            return
        loss, spread = metrics.report(self.world)
        self._check_loss(epoch, "loss", loss)
        rate = float(schedule.rate)
        self.losses.append([update, loss])
        if len(self.losses) > POINTS_PER_EPOCH:
            self.losses = self.losses[1::2]
        self.plot({"loss": loss, "spread": spread, "rate": rate}, update)
        line = f"update {update}: loss {loss:.4f}, spread {spread:.4f}, rate {rate:.2e}"
        if bar.disable:
            self.say(line)
        else:
            bar.set_postfix_str(line)
        if self._watch.sees_collapse(update, spread):
            self.facts.setdefault("collapsed", []).append(update)
            self.say(
                f"update {update}: the scores have collapsed: all candidates of a document score the same (spread "
                f"{spread:.1e}), where the loss stays near {metrics.flat_loss(self.args):.2f} whatever the text; stop, "
                f"and train with a lower --lr (the peak is {schedule.peak:.1e}) or a larger --warmup (now "
                f"{self.args.warmup})"
            )

    def _check_loss(self, epoch, what, value):
        """UserError when the `value` of a loss in `epoch` (from 0) is not finite."""
        if np.isfinite(value):
            return
        every = [each for past in self.history for each in past["validations"]] + self.validations
        kept = f"keeps what there was at update {every[-1]['update']}" if every else "has no weights of this run"
        single = ", or with bfloat16 or single precision" if self.facts["precision"] == "fp16" else ""
        raise UserError(
            f"the {what} became {value} in epoch {epoch + 1}: {self.folder} {kept}; train anew, with another "
            f"--run_name and a smaller --lr (the peak is {self.facts['peak_rate']:.1e}){single}"
        )

    def keep_within_epoch(self, epoch, step, result, description, **state):
        """Take down a validation before step `step`, and save the state; UserError, with nothing written, when a loss
        is not finite: the epoch's mean could not become so again.

        result: as from `validate`. description: as from `load_scorer`.
        """
        metrics = state["metrics"]
        self._check_loss(epoch, "loss", 0.0 if metrics.finite(self.world) else float("nan"))
        self.add_validation(epoch, step, result, state["scorer"], description)
        metrics.gather(self.world)
        self.save(epoch, step, **state)

    def end_epoch(self, epoch, step, result, description, timing, samples, **state):
        """Take down a whole epoch (from 0) of `step` steps and the validation after it, and save the state; UserError,
        with nothing written, when a loss is not finite.

        timing: as from PhaseTimer. samples: as for `add_epoch`.
        """
        loss = state["metrics"].epoch_loss(self.world)
        self._check_loss(epoch, "loss", loss)
        self.add_validation(epoch, step, result, state["scorer"], description)
        self.add_epoch(epoch, loss, timing, samples)
        self.save(epoch + 1, 0, **state)

    def save_unless_diverged(self, epoch, step, **state):
        """Save the state, on a stop request, unless no run could go on from it."""
        weights = state["scorer"].parameters()
        if state["metrics"].finite(self.world) and all(bool(weight.isfinite().all()) for weight in weights):
            self.save(epoch, step, **state)

    def add_validation(self, epoch, step, result, scorer, description):
        """Take down what `validate` found, and keep the weights: as the last, and as the best when they are. UserError,
        with nothing written, when the validation loss is not finite."""
        self._check_loss(epoch, "validation loss", result["val_loss"])
        update = self._update(epoch, step)
        self.validations.append({"update": update, **result})
        figures = [mean_rouge(result), -result["val_loss"]]  # Of equal ROUGE the lower loss is the better.
        best = self.best is None or figures > self.best
        shown = ", ".join(f"{name} {100 * result[f'val_{name}']:.2f}" for name in ROUGE)
        mark = " (best)" if best else ""
        self.say(f"update {update}: validation loss {result['val_loss']:.4f}, {shown}{mark}")
        self.plot(result, update)
        if best:
            self.best = figures
        if self.world.is_main:
            # That of an earlier run, whose weights go now; with it, --resume would take this run for finished.
            self.path(".json").unlink(missing_ok=True)
            for name in ("scorer.bin", "model.bin") if best else ("model.bin",):
                save_scorer(self.folder / name, scorer, description)

    def add_epoch(self, epoch, loss, timing, samples):
        """Append an epoch (from 0), validated, to the history.

        samples: how many the epoch trained on in this process's time; fewer than an epoch has after a resume.
        """
        validation = timing["phases"].get("validation")
        seconds = timing["seconds"] - (validation["host_ms"]["total"] / 1e3 if validation else 0)
        self.history.append(
            {
                "epoch": epoch + 1,
                "loss": loss,
                **{name: value for name, value in self.validations[-1].items() if name != "update"},
                "samples_per_second": samples / seconds,
                "peak_memory": timing["peak_memory"],
                "timing": timing,
                "losses": self.losses,
                "validations": self.validations,
            }
        )
        self.say(
            f"epoch {epoch + 1}/{self.args.num_epoch}: loss {loss:.4f}, {timing['seconds']:.1f} s, "
            f"{samples / seconds:.1f} documents/s"
        )
        self.validations, self.losses = [], []

    def finish(self):
        """Write the record, then drop the state."""
        self.write_record()
        self.drop_state()
        self.world.say(
            f"{self.folder / 'scorer.bin'}: best validation ROUGE {100 * self.best[0]:.2f} (mean of the three)"
        )

    def finish_profiling(self, timing):
        """Write the record of a run that --max_steps ended: the timings of its last epoch, no weights."""
        self.history.append({"epoch": len(self.history) + 1, "peak_memory": timing["peak_memory"], "timing": timing})
        self.write_record()
        self.world.say(f"stopped after {self.args.max_steps} steps: {self.path('.json')}")

    def progress_bar(self, epoch, samples):
        """A bar over the epoch's documents, on a terminal alone."""
        quiet = not (self.world.is_main and sys.stderr.isatty())
        title = f"epoch {epoch + 1}/{self.args.num_epoch}"
        return tqdm(total=samples, desc=title, unit=" documents", leave=False, disable=quiet)
