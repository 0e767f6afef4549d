"""The runs that a user names one by one on the command line, instead of folders to look through."""

from pathlib import Path

from harness.endings import UserError
from reporting.records import read_folders, skip

BESIDE_RECORD = (".pt", ".npz", ".lock", ".state")  # What a run leaves next to its record.


def read_runs(path):
    """The Records at `path`: of one run (its .json, or a file next to it such as its .pt), or of a folder. UserError if
    it is a file that is no record."""
    path = Path(path)
    record = path.with_suffix(".json")
    if path.suffix in BESIDE_RECORD and record.is_file():
        path = record
    return read_folders([path], tell=refuse if path.is_file() else skip)[0]


def refuse(path, fault):
    fault = fault.partition(";")[0]  # What follows is for a file among others.
    raise UserError(f"{path} is not the record of a run ({fault}); choose the .json that its script wrote")
