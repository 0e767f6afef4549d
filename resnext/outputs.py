"""Whether the outputs of a model mean anything: finite weights can still compute NaN or infinity, which argmax would
take for a class."""


def count_broken(output):
    """The number of images whose logits, [n, classes], are not all finite: an int64 scalar on their device, so that
    counting does not wait for it."""
    return output.isfinite().all(1).logical_not().sum()
