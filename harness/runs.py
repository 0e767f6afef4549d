"""One training run's files: its lock, its state while it trains, its record when it has."""

import contextlib
import json
import time
from pathlib import Path

from harness.endings import UserError
from harness.files import output_lock, places, portable, write_record
from harness.machine import describe_machine
from harness.resume import changes, load_state, no_state, save_state, saved_arguments

FORMAT = 1


class Run:
    """The files `folder`/`name`.* of a run of the script `experiment`; only the main process writes them.

    args: the parsed arguments. not_results: the names of those that a resumed run may change, since they choose where
    and how long a process runs, and not what it computes. facts: what else the record says of the run; more may be
    put in while it goes. `epochs` is the history, one dict an epoch, as the record has it.
    """

    elsewhere = "output folder"  # What to choose another of where a name is taken.
    only_of_records = ("max_steps",)  # Of `not_results`, what tells finished runs apart all the same.

    def __init__(self, experiment, folder, name, args, world, not_results=(), **facts):
        self.experiment, self.folder, self.name = experiment, Path(folder), name
        self.args, self.world, self.facts = args, world, facts
        self.epochs = []
        self._started, self._seconds_before = time.perf_counter(), 0.0
        self.arguments = {key: value for key, value in vars(args).items() if key not in not_results}
        # --half_precision means one type on a CPU and another on CUDA, so what ran counts.
        self.arguments |= {"processes": world.size, "precision": facts.get("precision")}

    def path(self, suffix):
        return self.folder / f"{self.name}{suffix}"

    def elapsed_seconds(self):
        """Wall-clock of the run so far, all processes that it was resumed in together: loading, training, evaluation,
        saving. What a killed process did after its last saved state is done again, and does not count twice."""
        return self._seconds_before + time.perf_counter() - self._started

    @contextlib.contextmanager
    def lock(self):
        """Hold the run's name, so that no second run writes the same files.

        UserError when one does, and when files of that name are those of a run with other arguments.
        """
        with contextlib.ExitStack() as held:
            with self.world.main_first():  # Where it is refused, every process ends.
                if self.world.is_main:
                    held.enter_context(output_lock(self.path(".lock")))
                    self._refuse_to_replace()
                    for abandoned in self.temporary_files():
                        abandoned.unlink()
            yield

    def _refuse_to_replace(self):
        """UserError when this run would replace the state or the finished record of one with other arguments."""
        args = vars(self.args)
        own = {} if args.get("resume") else {name: args.get(name) for name in self.only_of_records}
        saved = {
            self.path(".state"): (saved_arguments(self.path(".state")), self.arguments),
            self.path(".json"): (self._finished_arguments(), _as_recorded(self.arguments | own)),
        }
        for path, (theirs, ours) in saved.items():
            was = theirs and changes({name: theirs.get(name) for name in ours}, ours)
            if was:
                raise UserError(f"{path} is of a run with {was}; choose another {self.elsewhere}, or delete it")

    def temporary_files(self):
        """The Paths of what a killed run of this name was writing."""
        return self.folder.glob(f".{self.name}.*.tmp")

    @property
    def finished(self):
        """Whether the record is there, and no state; `lock` has seen to it that it is of the same arguments."""
        return not self.path(".state").exists() and self._finished_arguments() is not None

    def is_done(self):
        """Whether --resume has nothing left to do, which is told."""
        done = self.args.resume and self.finished
        if done:
            self.world.say(f"{self.path('.json')} is finished; nothing to resume")
        return done

    def _finished_arguments(self):
        """The arguments in the record, a dict; None when there is none, and when --max_steps cut its run short."""
        try:
            record = json.loads(self.path(".json").read_text(encoding="utf-8"))
            arguments = record["arguments"] | {"precision": record.get("precision")}
            arguments = _as_recorded(arguments, record.get("places"))
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return None if arguments.get("max_steps") else arguments

    def resume(self, **parts):
        """Load the saved state into `parts`, name -> object with load_state_dict.

        Returns (epoch, step) to go on from, both from 0; (0, 0) without a saved state. UserError as for load_state.
        """
        state = load_state(self.path(".state"), self.arguments)
        self.world.check_equal(state is not None, f"whether {self.path('.state')} exists; the processes must share it")
        if state is None:
            self.world.say(f"no saved state {self.path('.state')}; starting from the beginning")
            return 0, 0
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            self.epochs = state["epochs"]
            self._seconds_before = state["elapsed_seconds"]
            self.facts = state["facts"] | self.facts
            return state["epoch"], state["step"]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError):
            raise no_state(self.path(".state")) from None

    def save(self, epoch, step, **parts):
        """Save the state of `parts` before step `step` of `epoch`."""
        if self.world.is_main:
            states = {name: part.state_dict() for name, part in parts.items()}
            save_state(
                self.path(".state"),
                self.arguments,
                epoch=epoch,
                step=step,
                epochs=self.epochs,
                facts=self.facts,
                elapsed_seconds=self.elapsed_seconds(),
                **states,
            )

    def write_record(self):
        """Write the record, `name`.json, which describes itself: arguments, machine, versions, commit, epochs."""
        if self.world.is_main:
            record = {
                "format": FORMAT,
                "experiment": self.experiment,
                "name": self.name,
                "arguments": vars(self.args) | {"processes": self.world.size},
                "places": places(vars(self.args)),
                "machine": describe_machine(self.world.device),
                **self.facts,
                "epochs": self.epochs,
            }
            write_record(self.path(".json"), record)

    def drop_state(self):
        """Forget the saved state, once everything that it is good for has been written."""
        if self.world.is_main:
            self.path(".state").unlink(missing_ok=True)


def _as_recorded(arguments, digests=None):
    """`arguments` as a record has them, a path with the digest of its place beside it."""
    digests = places(arguments) if digests is None else digests
    digests = {name: f"{portable(arguments[name])} ({digest})" for name, digest in digests.items()}
    return portable(arguments) | digests
