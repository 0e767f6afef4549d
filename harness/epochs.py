"""What surrounds a training step: the batches of an epoch, from where it resumes to where it stops. The step itself
belongs to the script: this module yields to it and never calls it."""

import time

from harness.timing import nvtx_range


class Epoch:
    """One epoch of a Run, which `run.epochs` yields:

        for epoch in run.epochs(phase, batches, **state):
            for images, labels in epoch.steps(loader):
                ...                                             # the training step
            epoch.end(evaluate(model, ..., run.stop))

    number: of the epoch, from 0. step: index of the current batch, from 0 in each epoch. weight: factor for this
    process's mean loss over that batch, so that the mean over the processes is the mean over the batch. done: steps
    done in this epoch, including those before a resume. timing: of `steps`, as returned by PhaseTimer.end_epoch, once
    they have ended. samples: how many samples those steps trained on, over all processes. For a resumed epoch, both
    refer to its longest part.
    """

    def __init__(self, run, number, done):
        self.run, self.number, self.done = run, number, done
        self.step = self.weight = self.timing = None
        self.samples = 0

    def steps(self, loader):
        """Yield each batch of `loader`; waiting for it is the phase "data load". Ends early if the run has to stop."""
        run, first = self.run, self.done  # A resumed epoch starts with the first step that is not done.
        run.batches.start(self.number, first)
        label = f"epoch {self.number + 1}"
        with nvtx_range(label), run.progress_bar(self) as bar:
            run.phase.start_epoch()
            for self.step, batch in run.phase.steps(loader, label, first, run.step_limit):
                self.weight = run.batches.weight(self.step)
                yield batch
                run.phase.end_step()
                self.done = self.step + 1
                samples = run.batches.samples_from(self.step) - run.batches.samples_from(self.done)
                self.samples += samples
                bar.update(samples)
                run.show_progress(bar)
                if run.batches.ends_update(self.step):
                    if run.stop:
                        break
                    if run.saves_within_epochs:
                        run.save_when_due(self.number, self.done)
            self.timing = run.phase.end_epoch()
        run.stop.enough = run.phase.steps_done == run.step_limit
        self._steps_ended = time.perf_counter()

    def end(self, result):
        """Record the epoch with `result`, the outcome of its evaluation (None if a stop cut that short).

        Saves the state. After a signal, the script ends here. UserError if the epoch's loss is not finite, or if a
        line could not be printed.
        """
        run, evaluation_seconds = self.run, time.perf_counter() - self._steps_ended
        if run.part and run.part["samples"] > self.samples:
            self.timing, self.samples = run.part["timing"], run.part["samples"]
        if run.stop.is_early:
            run.part = {"timing": self.timing, "samples": self.samples}
            run.leave(self)
        if run.stop.enough:
            run.finish_profiling(self.timing)
            return
        run.part = None
        run.add_epoch(self, result, evaluation_seconds)
        if self.number + 1 < run.args.num_epoch:  # After the last epoch, `finish` decides what to keep.
            run.save_when_due(self.number + 1, 0)
        run.print(run.line())
