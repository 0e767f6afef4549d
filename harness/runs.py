"""One training run: its files (a lock, its state while it trains, its record once it is done) and its epochs."""

import contextlib
import itertools
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from harness import resume
from harness.arguments import DRY_STEPS
from harness.endings import UserError, is_out_of_gpu_memory
from harness.epoch_times import training_seconds
from harness.epochs import Epoch
from harness.files import RECORD_FORMAT, places, write_record
from harness.machine import UNKNOWN, describe_machine, same_pace, timestamp
from harness.run_files import RunFiles
from harness.run_log import RunLog
from harness.timing import nvtx_range
from harness.tracing import trace

# Arguments that choose where and how a process runs, not what it computes: a resumed run may change them. Each script
# adds its own.
NOT_RESULTS = ("resume", "restart", "trace", "device", "threads", "dry_run", "log")


class Run(RunFiles):
    """The files `folder`/`name`.* of a run of the script `experiment`; only the main process writes them.

    args: the parsed arguments. not_results: names of arguments, as NOT_RESULTS. facts: further entries of the record;
    more may be added during the run. history: one dict per finished epoch, as in the record.

    A subclass defines how an epoch is recorded and shown (`add_epoch` and `line`), and what --dry_run prints
    (`prospects`).
    """

    title = "training"  # The NVTX range around all epochs.
    unit = "samples"  # What the progress bar counts.
    _is_training = False  # Whether a stop request is heeded.
    saves_within_epochs = False  # Whether the state is saved within epochs too, or only after them.

    def __init__(self, experiment, folder, name, args, world, not_results=(), fixed_length=None, **facts):
        """fixed_length: why a finished run cannot continue to a larger --num_epoch; None if it can."""
        self.experiment, self.folder, self.name = experiment, Path(folder), name
        self.args, self.world, self.facts, self.fixed_length = args, world, facts, fixed_length
        self.machine = describe_machine(world.device)  # Now, since the code may change while the run trains.
        self.history, self.state = [], {}
        self.part = None  # Of an epoch that was stopped and resumed: samples and timing of its longest part.
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self.seconds = {"start_up_seconds": 0.0, "saving_seconds": 0.0}  # Over all processes of a resumed run.
        self.is_dry = vars(args).get("dry_run", False)
        if self.is_dry:  # Nothing is resumed or written.
            args.resume = False
        logs = vars(args).get("log") and world.is_main and not self.is_dry
        self.log = RunLog(self.log_folder() if logs else None)
        if fixed_length is None:
            not_results = (*not_results, "num_epoch")
        self.arguments = {key: value for key, value in vars(args).items() if key not in not_results}
        # --half_precision means different types on a CPU and on CUDA, so the actual type counts.
        self.arguments |= {"processes": world.size, "precision": facts.get("precision")}

    def log_folder(self):
        """Where `-l` writes."""
        return self.folder / self.name

    def say(self, line):
        """Print a line, and log it."""
        self.print(line)
        self.log.line(line)

    def print(self, line):
        """Print a line. If that fails between steps, as with a full disk or a reader that has gone, training stops
        after its next step and keeps its state, where one process alone can do so; otherwise, OSError."""
        try:
            self.world.say(line)
        except OSError as error:
            if not self._is_training or self.world.size > 1:
                raise
            self.stop.error = error

    def elapsed_seconds(self):
        """Wall-clock time of the run so far, over all processes that resumed it: loading, training, evaluation and
        saving. What a killed process did after its last saved state is repeated, and does not count twice."""
        return self._seconds_before + time.perf_counter() - self._started

    # ------------------------------------------------------------------------------------------------- its epochs

    def epochs(self, phase, batches, **state):
        """Yield an Epoch for each of --num_epoch that is left. Meanwhile, a first SIGINT, SIGTERM or SIGHUP only sets
        `stop`, so that an epoch can finish its step and save.

        phase: the PhaseTimer of the steps. batches: the EpochBatches of the loader. state: name -> object with
        state_dict and load_state_dict; together, all that a resumed run needs.
        """
        self.phase, self.batches, self.state = phase, batches, state
        first, done = self.resume() if self.args.resume else (0, 0)
        self.step_limit = self.args.max_steps
        if self.is_dry:
            self.step_limit, phase.warmup_steps = min(DRY_STEPS, self.args.num_epoch * len(batches)), 1
        for line in self.opening():
            self.say(line)
        self._saved_at = time.perf_counter()
        self.seconds["start_up_seconds"] += self._saved_at - self._started
        traces = self.world.is_main and not self.is_dry
        traced = trace(self.args.trace if traces else None, self.world.device, self.world.say)
        with (
            nvtx_range(self.title),
            traced,
            contextlib.closing(self.log),
            resume.stop_requests(enabled=self.world.size == 1) as self.stop,
        ):
            self._is_training = True
            for number in range(first, self.args.num_epoch):
                yield Epoch(self, number, done)
                if self.stop.enough:
                    return
                done = 0
            self._is_training = False

    def opening(self):
        """Lines that describe the run, printed before its first epoch."""
        return ()

    def progress_bar(self, epoch):
        """A progress bar over the samples of an Epoch; shown only on a terminal."""
        total = self.batches.samples_from(0)
        return tqdm(
            desc=f"epoch {epoch.number + 1}/{self.args.num_epoch}",
            total=total,
            initial=total - self.batches.samples_from(epoch.done),
            unit=f" {self.unit}",
            leave=False,
            disable=not (self.world.is_main and sys.stderr.isatty()),
        )

    def show_progress(self, bar):
        """Show the epoch's figures on the progress bar; called after each step."""

    def logged_step(self, epoch, step):
        """The last step that has figures in the log before step `step` of `epoch`."""
        return len(self.history)

    def save_when_due(self, epoch, step):
        """Save the state before step `step` of `epoch` if --save_every minutes have passed since the last save. The
        time this takes does not count as training time."""
        minutes = getattr(self.args, "save_every", 0.0)
        if time.perf_counter() - self._saved_at >= 60 * minutes:
            with self.phase.paused():
                if self.may_go_on():
                    self.save(epoch, step)

    def leave(self, epoch):
        """Save the state in the middle of `epoch`, unless it could not be resumed, and end the script."""
        if self.may_go_on():
            self.save(epoch.number, epoch.done)
        self.stop.leave(*self.how_to_continue())

    def finish_profiling(self, timing):
        """Write the record of a run that --max_steps ended; its last epoch contains only timings. For --dry_run, print
        the prediction instead. timing: as returned by PhaseTimer.end_epoch."""
        if self.is_dry:
            for line in (*self.prospects(timing), "--dry_run: nothing was written"):
                self.world.say(line)
            return
        self.history.append({"epoch": len(self.history) + 1, "peak_memory": timing["peak_memory"], "timing": timing})
        self.write_record()
        self.drop_state()
        self.world.say(f"stopped after {self.args.max_steps} steps: {self.path('.json')}")

    def may_go_on(self):
        """Whether training can continue from here: no weight and no sum of losses is NaN or infinite in this
        process."""
        parts = [part for part in self.state.values() if isinstance(part, torch.nn.Module)]
        tensors = itertools.chain(*((*part.parameters(), *part.buffers()) for part in parts))
        return all(bool(tensor.isfinite().all()) for tensor in tensors)

    def check_finite(self, epoch, loss, advice, **figures):
        """UserError with `advice` if the mean `loss` of an Epoch, a weight after it, or one of its other `figures`
        (what it is of: float) is not finite."""
        broken = [] if self.may_go_on() else ["weights"]
        broken += [name for name, value in figures.items() if not math.isfinite(value)]
        if math.isfinite(loss) and not broken:
            return
        what = f"{broken[0]} became NaN or infinite" if math.isfinite(loss) else f"the loss became {loss}"
        kept = f"; {self.path('.state')} was saved before that" if self.has_own_state() else ""
        raise UserError(f"{what} in epoch {epoch.number + 1}{kept}. {advice}")

    def record_epoch(self, epoch, evaluation_seconds, **figures):
        """Append an Epoch to the history: its `figures`, and the measurements that every epoch has."""
        self.history.append(
            {
                "epoch": epoch.number + 1,
                **figures,
                "samples_per_second": epoch.samples / training_seconds(epoch.timing),
                "peak_memory": epoch.timing["peak_memory"],
                # When the epoch's figures were known, so that the time to reach an accuracy can be read off.
                "elapsed_seconds": self.elapsed_seconds(),
                "evaluation_seconds": evaluation_seconds,
                "timing": epoch.timing,
            }
        )

    # -------------------------------------------------------------------------------------- its state and its record

    def resume(self):
        """Load the saved state into the parts passed to `epochs`.

        Returns (epoch, step) to continue from, both from 0; (0, 0) without a saved state. UserError as for load_state.
        """
        path = self._state_to_resume()
        state = resume.load_state(path, self.arguments)
        self.world.check_equal(state is not None, f"whether {path} exists; put it where all processes see it")
        if state is None:
            if resume.recorded_arguments(self.path(".json")):
                raise UserError(f"{path}, which a longer run continues from, is gone; --restart starts over")
            self.world.say(f"no saved state {path}; starting from the beginning")
            return 0, 0
        try:
            self.check_digest(state["facts"], path)
            for name, part in self.state.items():
                part.load_state_dict(state[name])
            self.history, self.part = state["history"], state["part"]
            self._seconds_before, self.seconds = state["elapsed_seconds"], state["seconds"]
            self.facts = state["facts"] | self.facts
            epoch, step = state["epoch"], state["step"]
            self._note_origin(state.get("machine", self.machine), path)
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            if is_out_of_gpu_memory(error):  # The state itself is good; other processes may be using the GPU, too.
                raise
            raise resume.no_state(path) from None
        if (epoch, step) > (self.args.num_epoch, 0):
            done = f"{epoch} epoch{'s' * (epoch != 1)}" + f" and {step} step{'s' * (step != 1)}" * (step > 0)
            raise UserError(f"{path} is after {done}, more than --num_epoch {self.args.num_epoch}; choose a larger one")
        self.log.resume(state.get("log", {}), self.logged_step(epoch, step))
        if path != self.path(".state"):
            self.facts["continues"] = path.stem
            if self.world.is_main:
                self.take_over(path)
        self.world.say(f"resuming from {path}: epoch {epoch + 1}, step {step + 1}")
        return epoch, step

    def _note_origin(self, machine, path):
        """Record if the state `path`, made on `machine`, is of other code, or has times that are not this run's own."""
        commits = [*self.facts.get("earlier_commits", ()), machine["commit"] or UNKNOWN]
        if set(commits) != {self.machine["commit"] or UNKNOWN}:
            self.facts["earlier_commits"] = list(dict.fromkeys(commits))
        if path != self.path(".state") or not same_pace(machine, self.machine):
            self.facts["epochs_elsewhere"] = len(self.history)

    def save(self, epoch, step):
        """Save the state before step `step` of `epoch`."""
        if self.world.is_main and not self.is_dry:
            states = {name: part.state_dict() for name, part in self.state.items()}
            with self.writing():
                resume.save_state(
                    self.path(".state"),
                    self.arguments,
                    epoch=epoch,
                    step=step,
                    history=self.history,
                    part=self.part,
                    facts=self.facts,
                    machine=self.machine,
                    elapsed_seconds=self.elapsed_seconds(),
                    seconds=self.seconds,
                    log=self.log.state_dict(),
                    **states,
                )
            self._saved_at, self.has_saved = time.perf_counter(), True

    @contextlib.contextmanager
    def writing(self):
        """Time the block, which writes files."""
        started = time.perf_counter()
        yield
        self.seconds["saving_seconds"] += time.perf_counter() - started

    def note_saved(self, size):
        """Record the bytes that forward saved for backward in the run's first step; ignored until they are known."""
        if size is not None:
            self.facts.setdefault("saved_activation_bytes", size)

    def write_record(self):
        """Write the record, `name`.json, which is self-contained: arguments, machine, versions, commit, epochs."""
        if self.world.is_main:
            record = {
                "format": RECORD_FORMAT,
                "experiment": self.experiment,
                "name": self.name,
                "arguments": vars(self.args) | {"processes": self.world.size},
                "places": places(vars(self.args)),
                "machine": self.machine | {"date": timestamp()},
                **self.facts,
                **self.seconds,
                "epochs": self.history,
            }
            write_record(self.path(".json"), record)

    def drop_state(self):
        if self.world.is_main:
            self.path(".state").unlink(missing_ok=True)
