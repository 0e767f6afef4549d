"""`-l`: next to a run's files, its output as log.txt and its figures over time as TensorBoard events.

`tensorboard --logdir model_history` (or cache, for SimCLS) shows the curves of every run in that folder.
"""

from pathlib import Path

from harness.endings import UserError
from harness.epoch_times import phase_times
from harness.files import is_utf8, make_folder


def add_argument(parser):
    parser.add_argument("-l", "--log", action="store_true",
        help="write log.txt and TensorBoard events to a folder named after the run")  # fmt: skip


class RunLog:
    """log.txt and TensorBoard events in `folder`, or nothing if that is None.

    The files are opened at the first output; by then a resumed run has called `resume` to say where it continues.
    Otherwise those of an earlier run are deleted.
    """

    def __init__(self, folder):
        self._folder = folder and Path(folder)
        if folder and not is_utf8(folder):
            raise UserError(f"-l: TensorBoard cannot write to {folder}, whose name is not UTF-8; leave -l out")
        self._bytes, self._last_step = 0, None  # Where a resumed run continues.
        self._is_begun = False
        self._lines = self._events = None

    def resume(self, state, last_step):
        """Continue from `state`, a state_dict; later output is discarded. last_step: the last step of `plot` by
        then."""
        self._bytes, self._last_step = state.get("bytes", 0), last_step

    def state_dict(self):
        """What `resume` needs. Afterwards, everything logged so far is in the files."""
        if self._events:
            self._events.flush()
        return {"bytes": self._bytes}

    def line(self, text):
        if self._folder is None:
            return
        self._begin()
        if self._lines is None:
            self._lines = open(self._folder / "log.txt", "ab", buffering=0)  # noqa: SIM115 (`close` closes it)
        self._lines.write(f"{text}\n".encode(errors="backslashreplace"))
        self._bytes = self._lines.tell()

    def plot(self, values, step):
        """Add the `values`, {name: float}, to the events of `step`."""
        if self._folder is None:
            return
        self._begin()
        if self._events is None:
            self._events = self._open_events()
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def _begin(self):
        if self._is_begun:
            return
        self._is_begun = True
        make_folder(self._folder)
        with open(self._folder / "log.txt", "ab") as file:
            file.truncate(min(self._bytes, file.tell()))
        if self._last_step is None:
            for path in self._folder.glob("events.out.tfevents.*"):
                path.unlink()

    def _open_events(self):
        try:
            from torch.utils.tensorboard import SummaryWriter  # It takes a second to import.
        except ModuleNotFoundError:
            raise UserError(
                "-l needs the package tensorboard, which is in requirements.txt; install it, or leave -l out"
            ) from None

        # TensorBoard discards what earlier files contain from this step on.
        purged, self._last_step = self._last_step, None
        return SummaryWriter(str(self._folder), purge_step=None if purged is None else purged + 1)

    def close(self):
        """Close the files; later output opens them again."""
        for file in (self._lines, self._events):
            if file:
                file.close()
        self._lines = self._events = None


def timing_figures(timing):
    """{name: float} for `plot` from an epoch's `timing`, as returned by PhaseTimer.end_epoch: median milliseconds by
    phase (on the device if timed there), and the allocator's peak in MiB on CUDA."""
    figures = {}
    for name, phase in timing["phases"].items():
        median = phase_times(phase)["median"]
        if median is not None:  # None if there was only warm-up.
            figures[f"milliseconds/{name}"] = median
    if timing["peak_memory"]:
        figures["memory/peak_MiB"] = timing["peak_memory"]["allocated_bytes"] / 2**20
    return figures
