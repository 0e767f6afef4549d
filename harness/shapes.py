"""What a JSON value must look like, and what is wrong with one that does not."""

import sys

# A shape is a pair (words, test); a dict name -> shape, whose names are required; or the result of a function below.


def is_number(value):
    """Whether `value` is a finite number that a float can hold, and not a bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


ANY = ("anything", lambda value: True)
TEXT = ("text", lambda value: isinstance(value, str))
NUMBER = ("a number", is_number)
PERCENT = ("a percentage", lambda value: is_number(value) and 0 <= value <= 100)
POSITIVE = ("a number above 0", lambda value: is_number(value) and value > 0)
COUNT = ("a whole number", lambda value: is_number(value) and isinstance(value, int) and 0 <= value < 2**53)
WHOLE = ("a whole number above 0", lambda value: COUNT[1](value) and value > 0)
PAIR = ("two numbers", lambda value: isinstance(value, list) and len(value) == 2 and all(map(is_number, value)))


def maybe(shape):
    """null, or of `shape`; in a dict it may also be absent."""
    return ("maybe", shape)


def or_null(shape):
    """Of `shape`, or null; in a dict it must be present."""
    return ("null", shape)


def each(kind, shape):
    """A list or dict (`kind`) whose values are all of `shape`."""
    return ("each", kind, shape)


def fault(value, shape, where=""):
    """What is wrong with `value`, as text that begins with the place: "epochs.0.loss is not a number"; None if
    nothing."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where or 'it'} is not an object"
        parts = [(name, value.get(name), part) for name, part in shape.items()]
        needed = (name for name, part in shape.items() if isinstance(part, dict) or part[0] != "maybe")
        missing = next((name for name in needed if name not in value), None)
        if missing is not None:
            return f"{where + ' has' if where else 'it has'} no {missing}"
    elif shape[0] in ("maybe", "null"):
        return None if value is None else fault(value, shape[1], where)
    elif shape[0] == "each":
        if not isinstance(value, shape[1]):
            return f"{where or 'it'} is not {'a list' if shape[1] is list else 'an object'}"
        names = value if isinstance(value, dict) else range(len(value))
        parts = [(name, value[name], shape[2]) for name in names]
    else:
        words, test = shape
        return None if test(value) else f"{where or 'it'} is not {words}"
    found = (fault(part, inner, f"{where}.{name}" if where else str(name)) for name, part, inner in parts)
    return next(filter(None, found), None)
