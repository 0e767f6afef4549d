"""`-l`: beside a run's files what it printed, as log.txt, and its figures over time, as TensorBoard events.

`tensorboard --logdir model_history` (or cache, of SimCLS) shows the curves of every run below that folder.
"""

from pathlib import Path

from harness.endings import UserError
from harness.files import is_utf8, make_folder
from harness.timing import phase_times


def add_argument(parser):
    parser.add_argument("-l", "--log", action="store_true",
        help="write log.txt and TensorBoard events to a folder of the run's name")  # fmt: skip


class RunLog:
    """log.txt and TensorBoard events in `folder`, or nothing where that is None.

    They are opened for what comes first: by then a resumed run has said, by `resume`, where it goes on. Else those of
    an earlier run go.
    """

    def __init__(self, folder):
        self._folder = folder and Path(folder)
        if folder and not is_utf8(folder):
            raise UserError(f"-l: TensorBoard cannot write to {folder}, whose name is not UTF-8; leave -l out")
        self._bytes, self._last_step = 0, None  # Of what a resumed run goes on from.
        self._is_begun = False
        self._lines = self._events = None

    def resume(self, state, last_step):
        """Go on where `state`, a state_dict, was saved: what was logged later goes. last_step: of `plot`, by then."""
        self._bytes, self._last_step = state.get("bytes", 0), last_step

    def state_dict(self):
        """What `resume` needs. What is logged by now is in the files afterwards."""
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
                "-l needs the package tensorboard, of requirements.txt; install it, or leave -l out"
            ) from None

        # TensorBoard drops what earlier files have of this step and later ones.
        purged, self._last_step = self._last_step, None
        return SummaryWriter(str(self._folder), purge_step=None if purged is None else purged + 1)

    def close(self):
        """Close the files; what comes later opens them again."""
        for file in (self._lines, self._events):
            if file:
                file.close()
        self._lines = self._events = None


def timing_figures(timing):
    """{name: float} for `plot` of an epoch's `timing`, as from PhaseTimer.end_epoch: milliseconds by phase (the median;
    of the device where it was timed), and the allocator's peak in MiB on CUDA."""
    figures = {}
    for name, phase in timing["phases"].items():
        median = phase_times(phase)["median"]
        if median is not None:  # Else all was warm-up.
            figures[f"milliseconds/{name}"] = median
    if timing["peak_memory"]:
        figures["memory/peak_MiB"] = timing["peak_memory"]["allocated_bytes"] / 2**20
    return figures
