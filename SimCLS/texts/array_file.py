"""Named arrays in one file, mapped into memory: a header that says what they belong to, then one .npy after another."""

import json

import numpy as np

from harness.files import atomic_write


def write_arrays(path, fingerprint, arrays):
    """Write a dict of name -> np.ndarray to `path`, atomically. fingerprint: str, of what they were made from."""
    header = json.dumps({"samples": fingerprint, "arrays": list(arrays)})
    with atomic_write(path) as file:
        for array in [np.frombuffer(header.encode(), dtype=np.uint8), *arrays.values()]:
            np.lib.format.write_array(file, array, allow_pickle=False)


def read_arrays(path, fingerprint):
    """The arrays of `path` as read-only np.memmap; None when it is no whole file, or has another fingerprint."""
    try:
        with open(path, "rb") as file:
            header = json.loads(np.lib.format.read_array(file, allow_pickle=False).tobytes())
            if header["samples"] != fingerprint:
                return None
            return {name: _map_array(file) for name in header["arrays"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _map_array(file):
    """The .npy at the position of the open file; the position moves past it."""
    np.lib.format.read_magic(file)
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
    order = "F" if fortran_order else "C"
    array = np.memmap(file, dtype=dtype, mode="r", offset=file.tell(), shape=shape, order=order)
    file.seek(array.offset + array.nbytes)
    return array
