"""Building blocks of the scripts' command lines: argument types, and a parser whose errors are one line."""

import argparse
import math

from harness.endings import printable
from harness.machine import usable_cores

# Adam divides the learning rate by 1 - 0.9, so a larger one overflows float32 in a single update.
LARGEST_LEARNING_RATE = 1e37
# At a smaller one, rounding to float32 leaves all but the tiniest weights as they are: nothing is learnt.
LEAST_LEARNING_RATE = 1e-12
# For image channels; dividing by a smaller deviation overflows float32 within a few layers.
LEAST_DEVIATION = 1e-6


def _number(kind, accept, wanted):
    """An argparse type: a `kind`, int or float, that satisfies `accept`; `wanted` describes such values."""

    def read(text):
        try:
            # Python also reads the digits of other scripts, and 1_6 as 16, which may be a typo of 1.6.
            value = kind(text) if text.isascii() and "_" not in text else None
        except ValueError:
            value = None
        if value is None or not accept(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return read


positive_int = _number(int, lambda value: 1 <= value < 2**31, "a whole number of at least 1 and below 2**31")
non_negative_int = _number(int, lambda value: 0 <= value < 2**31, "a whole number of at least 0 and below 2**31")
seed = _number(int, lambda value: 0 <= value < 2**63, "a whole number from 0 to 2**63 - 1")  # All generators accept it.
numpy_seed = _number(int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1")  # NumPy accepts it.
positive_float = _number(float, lambda value: 0 < value < math.inf, "a number above 0")
non_negative_float = _number(float, lambda value: 0 <= value < math.inf, "a number of at least 0")
# Of a length; with larger exponents float32 cannot hold a score.
exponent = _number(float, lambda value: -10 <= value <= 10, "a number from -10 to 10")
positive_share = _number(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
deviation = _number(float, lambda value: LEAST_DEVIATION <= value <= 1,
                    f"a number from {LEAST_DEVIATION:g} to 1")  # fmt: skip
share = _number(float, lambda value: 0 <= value <= 1, "a number from 0 to 1")
share_below_one = _number(float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")
learning_rate = _number(float, lambda value: LEAST_LEARNING_RATE <= value <= LARGEST_LEARNING_RATE,
                        f"a number from {LEAST_LEARNING_RATE:g} to {LARGEST_LEARNING_RATE:g}")  # fmt: skip

# A far larger number of processes or threads is a typo, and would bring the machine down.
_MOST = max(64, 8 * usable_cores())
workers = _number(int, lambda value: 0 <= value <= _MOST, f"a whole number from 0 to {_MOST}")
threads = _number(int, lambda value: 1 <= value <= _MOST, f"a whole number from 1 to {_MOST}")


def default_workers(wanted):
    """The default number of worker processes: `wanted`, but at most the number of usable cores. It is the number that
    runs, so the run's name and record contain it."""
    return min(wanted, usable_cores())


def boolean(text):
    """An argparse type for flags that older notebooks pass a value to, as in `--use_checkpoint False`: see FLAG."""
    value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}.get(text.lower())
    if value is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return value


DRY_STEPS = 4  # Of --dry_run: one to warm up, and three that are timed.
FLAG = {"type": boolean, "nargs": "?", "const": True, "default": False}


def add_dry_run(parser):
    parser.add_argument("--dry_run", action="store_true",
        help=f"train {DRY_STEPS} steps, print the time and memory the run would need, and write nothing")  # fmt: skip


def given(parser, args):
    """The names of the arguments in `args` whose values are not the parser's defaults: an argument that was given its
    default cannot be told from one that was not given."""
    return [name for name, value in vars(args).items() if value != parser.get_default(name)]


class HelpWithDefaults(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the description as written, and only informative defaults: None and False mean "left out", which need not
    be shown."""

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage before it, and whose help is HelpWithDefaults."""

    def __init__(self, **more):
        super().__init__(formatter_class=HelpWithDefaults, **more)

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")
