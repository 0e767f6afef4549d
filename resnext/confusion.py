"""Which classes a model confuses: the confusion matrix, and its most confident mistakes, as text and figures."""

import os
from typing import NamedTuple

import numpy as np

from harness.endings import printable

os.environ["MPLBACKEND"] = "agg"  # Figures go to files; an unknown backend in it makes matplotlib raise an error.
WIDEST_TABLE = 20  # More classes do not fit a terminal, or a figure with numbers in it.
HEAD = 5  # Letters of a class's name above its column.
SHOWN = 12  # Most confident mistakes.


class Predictions(NamedTuple):
    """For n images: the predicted and the true classes, int64 [n], and the probabilities that the model gave to the
    predicted ones, float32 [n]."""

    predicted: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray

    def accuracy(self):
        """In percent."""
        return 100 * int((self.predicted == self.labels).sum()) / len(self.labels)

    def confusion(self, num_classes):
        """Number of images of each class (row) predicted as each class (column), int64 [num_classes, num_classes]."""
        pairs = self.labels * num_classes + self.predicted
        return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)

    def surest_mistakes(self, count=SHOWN):
        """The indices of at most `count` misclassified images, most confident first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.probabilities[wrong], kind="stable")][:count]


def class_lines(matrix, classes):
    """Lines of a table: each class with its images, the share recognised, and the class it was most often taken for."""
    width = max(5, *map(len, classes))
    yield f"{'class':{width}}    images   right  most often mistaken for"
    for label, name in enumerate(classes):
        others = matrix[label].copy()
        others[label] = 0
        most = f"{classes[others.argmax()]} ({others.max()})" if others.any() else "-"
        total = matrix[label].sum()
        yield f"{name:{width}}  {total:8}  {100 * matrix[label, label] / total:5.1f}%  {most}"


def matrix_lines(matrix, classes):
    """Lines of the matrix: rows are true classes, columns predicted ones."""
    heads = [name[:HEAD] for name in classes]
    if len(set(heads)) < len(heads):
        heads = [str(number) for number in range(1, len(classes) + 1)]
        classes = [f"{number}. {name}" for number, name in zip(heads, classes, strict=True)]
    width, cell = max(10, *map(len, classes)), max(len(str(matrix.max())), *map(len, heads))
    yield f"{'true class':{width}}" + "".join(f"  {head:>{cell}}" for head in heads)
    for name, row in zip(classes, matrix, strict=True):
        yield f"{name:{width}}" + "".join(f"  {count:>{cell}}" for count in row)


def draw_matrix(matrix, classes, title):
    """A matplotlib Figure of the matrix, each row as shares of its class."""
    from matplotlib.figure import Figure

    side = min(16, 3 + 0.45 * len(classes))
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(picture, label="share of the class's images (%)", shrink=0.8)
    axes.set_title(literal(title))
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    ticks = range(0, len(classes), -(-len(classes) // 60))
    names = [literal(classes[tick]) for tick in ticks]
    axes.set_xticks(ticks, names, rotation=90)
    axes.set_yticks(ticks, names)
    if len(classes) <= WIDEST_TABLE:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                colour = "white" if shares[row, column] > 60 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
    return figure


def draw_mistakes(mistakes, images, predictions, classes):
    """A matplotlib Figure of the images with the indices `mistakes` among `images` (uint8 [n, H, W, 3])."""
    from matplotlib.figure import Figure

    columns = min(4, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = Figure(figsize=(max(4.5, 2.2 * columns), 2.5 * rows), layout="constrained")
    figure.suptitle("most confident mistakes: predicted class, probability, true class", fontsize=10)
    for number, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if number < len(mistakes):
            index = mistakes[number]
            axes.imshow(images[index])
            both = (predictions.predicted, predictions.labels)
            guess, truth = (literal(classes[labels[index]][:16]) for labels in both)
            axes.set_title(f"{guess}, {100 * predictions.probabilities[index]:.1f} %\nis {truth}", fontsize=9)
    return figure


def literal(text):
    """`text` escaped so that matplotlib draws it literally. It would read text between two dollar signs as a
    formula, draw letters missing from its font as boxes, and reject invalid UTF-8; the last two, and control
    characters, become escapes such as \\u732b."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    letters = get_font(findfont(FontProperties())).get_charmap()
    drawn = (
        each if ord(each) in letters else each.encode("ascii", "backslashreplace").decode() for each in printable(text)
    )
    return "".join(drawn).replace("$", r"\$")
