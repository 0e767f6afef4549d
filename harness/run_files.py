"""The files of a run under its name: who may write them, and from which saved state --resume continues."""

import contextlib
import json
from pathlib import Path

from harness import resume
from harness.endings import UserError
from harness.files import as_recorded, is_locked, output_lock


class RunFiles:
    """The part of a Run that decides about its files; it uses the Run's args, arguments, world, folder and name."""

    elsewhere = "output folder"  # What the user should change if a name is taken.
    only_of_records = ()  # Names in `not_results` that still distinguish two finished runs.
    results = ()  # The Paths of the files, besides the record, that a finished run consists of.
    has_saved = False  # Whether this process has saved the state.
    weights = ()  # Files that, without a state or a record to explain them, are replaced only on request.

    def path(self, suffix):
        return self.folder / f"{self.name}{suffix}"

    @contextlib.contextmanager
    def lock(self):
        """Lock the run's name, so that no second run writes the same files.

        UserError if another run holds the lock, and if this run would replace an earlier run's files without being
        asked to.
        """
        self._check_trace()
        if self.is_dry:
            yield
            return
        with contextlib.ExitStack() as held:
            with self.world.main_first():  # If the main process is refused, every process ends.
                if self.world.is_main:
                    held.enter_context(output_lock(self.path(".lock")))
                    self._claim_name()
                    for abandoned in self.temporary_files():
                        abandoned.unlink()
            yield

    def _check_trace(self):
        """UserError if --trace names a file of the run itself, or if no trace would be written."""
        traced = vars(self.args).get("trace")
        if traced and self.is_dry:
            raise UserError("--dry_run writes nothing, and so no --trace; leave one of them out")
        own = (self.path(suffix).resolve() for suffix in (".json", ".evaluation.json"))
        if traced and Path(traced).resolve() in own:
            raise UserError(f"--trace {traced} is the name of a file of this run itself; choose another")

    def _claim_name(self):
        """UserError if an earlier run's files would be lost. With --restart, each is replaced once its successor is
        written."""
        asked = vars(self.args)
        for path in map(self.path, (".json", ".pt", ".npz")):
            if path.is_dir():  # Otherwise training would end with an error.
                raise UserError(f"{path} is a folder; move it away, or choose another {self.elsewhere}")
        if asked.get("restart"):
            return
        saved = resume.read_state(self.path(".state"), mmap=True)
        resume.refuse_unknown(self.path(".json"), () if saved else self.weights, self.elsewhere)
        self._refuse_another(self.path(".state"), saved and saved["arguments"], self.arguments)
        finished = self._recorded(saved)
        # Timings of a few steps may be replaced by a whole run, but not by a profile of another run.
        recorded = self._recorded(saved, whole=not asked.get("max_steps"))
        own = {} if asked.get("resume") else {name: asked.get(name) for name in self.only_of_records}
        self._refuse_another(self.path(".json"), recorded, as_recorded(self.arguments | own))
        if asked.get("resume"):
            return
        if resume.is_interrupted(saved, finished):
            done = f"{saved['parts'].get('epoch')} of {asked.get('num_epoch')} epochs done"
            ways = "--resume continues it, --restart starts over"
            raise UserError(f"{self.path('.state')} holds an interrupted run ({done}); {ways}")
        if finished:
            longer = "" if self.fixed_length else ", --resume with a larger --num_epoch continues it"
            raise UserError(f"{self.path('.json')} is a finished run; --restart runs it again{longer}")

    def _recorded(self, saved, whole=True):
        """resume.recorded_arguments of this run's record; None if this run, with the state `saved`, was begun by
        --restart and has not replaced the record of the run before it yet."""
        recorded = resume.recorded_arguments(self.path(".json"), whole)
        begun_anew = saved and recorded and _changes(recorded, as_recorded(self.arguments))
        return None if begun_anew else recorded

    def how_to_continue(self):
        """What to do to continue after a stop, as the only item of a list; empty if there is no state to continue."""
        if not self.has_own_state():
            return []
        flag = "--resume instead of --restart" if vars(self.args).get("restart") else "--resume"
        return [f"run the same command with {flag} to continue ({self.path('.state')})"]

    def has_own_state(self):
        """Whether the state that is there is this run's: until it first saves one, --restart leaves the earlier one."""
        return self.path(".state").exists() and (self.has_saved or not vars(self.args).get("restart"))

    def _refuse_another(self, path, theirs, ours):
        """UserError if the file `path` is of a run with other arguments than `ours`."""
        was = theirs and _changes(theirs, ours)
        if was:
            longer = self.fixed_length and "--num_epoch" in was
            why = f"{self.fixed_length}, so it cannot be continued to another length; " if longer else ""
            raise UserError(
                f"{path} is from a run with {was}; {why}choose another {self.elsewhere}, or --restart to replace it"
            )

    def temporary_files(self):
        """The Paths of temporary files that a killed run of this name left."""
        return self.folder.glob(f".{self.name}.*.tmp")

    def is_done(self):
        """Whether --resume has nothing left to do; if so, prints that. UserError if the finished run was on other
        inputs than those here, or if its results are gone and no saved state can give them again."""
        if not self.args.resume:
            return False
        saved = resume.read_state(self.path(".state"), mmap=True)
        finished = self._recorded(saved)
        if not finished or finished["num_epoch"] != self.args.num_epoch or resume.is_interrupted(saved, finished):
            return False
        self.check_inputs()
        gone = [path for path in self.results if not path.is_file()]
        if gone and not saved:
            raise UserError(
                f"{self.path('.json')} is finished, but {gone[0]} is gone, and no {self.path('.state').name} is there "
                "to write it again from; put it back, or --restart to train again"
            )
        what = f"{gone[0]} is gone; writing it again" if gone else "nothing to resume"
        self.world.say(f"{self.path('.json')} is finished; {what}")
        return not gone

    def check_inputs(self):
        """UserError if the run that the record describes was on other inputs, such as images, than those here."""
        path = self.path(".json")
        self.check_digest(json.loads(path.read_text(encoding="utf-8")), path)

    def check_digest(self, facts, path):
        """UserError if `facts`, kept in the file `path`, tell of training data with other contents than those here;
        earlier versions kept no digest."""
        ours = self.facts.get("data_digest")
        if ours and facts.get("data_digest", ours) != ours:
            raise UserError(
                f"{self.args.dataset} has other contents than when the run in {path} began to learn from it; restore "
                f"them, choose another {self.elsewhere}, or --restart"
            )

    def other_states(self):
        """The Paths of other runs' states from which this run can continue as from its own, if those runs were
        interrupted."""
        return ()

    def take_over(self, state):
        """Take over what a run has besides its state file. state: the Path of one of the `other_states`."""

    def _state_to_resume(self):
        """The Path of this run's own state, or of one of `other_states` that is further along."""
        own = self.path(".state")
        saved = resume.read_state(own, mmap=True)
        if self._recorded(saved) or (saved and resume.changes(saved["arguments"], self.arguments)):
            return own  # `load_state` reports what is wrong with it.
        found = {own: resume.place_of(saved)} if saved else {}
        # With a state of its own, the run does not need the others to be readable.
        ignored = [UserError] if saved else []
        for path in self.other_states():
            if is_locked(path.with_suffix(".lock")):  # That run is training.
                continue
            with contextlib.suppress(*ignored):
                saved = resume.read_state(path, mmap=True)
                finished = resume.recorded_arguments(path.with_suffix(".json"))
                if resume.is_interrupted(saved, finished) and not resume.changes(saved["arguments"], self.arguments):
                    found[path] = resume.place_of(saved)
        return max(found, key=found.get, default=own)  # On a tie the first, its own.

    def saved_facts(self):
        """The `facts` of the state from which --resume will continue; empty if there is none."""
        state = resume.read_state(self._state_to_resume(), mmap=True) if self.args.resume else None
        facts = state and state["parts"].get("facts")
        return facts if isinstance(facts, dict) else {}


def _changes(theirs, ours):
    """resume.changes from `theirs` in those arguments that `ours` has."""
    return resume.changes({name: theirs.get(name) for name in ours}, ours)
