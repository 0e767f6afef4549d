"""Which classes a model takes for which: the matrix, and the pictures it was surest and wrong about, told and drawn."""

import os
from typing import NamedTuple

import numpy as np

os.environ["MPLBACKEND"] = "agg"  # Figures go to files; of a name that it does not know matplotlib makes an error.
WIDEST_TABLE = 20  # Classes of a matrix that a terminal, and a figure with numbers in it, have room for.
HEAD = 5  # Letters of a class's name above its column.
SHOWN = 12  # Pictures that it was surest and wrong about.


class Predictions(NamedTuple):
    """Of n pictures: the classes taken for theirs and the true ones, int64 [n], and the probabilities that the model
    gave to the first, float32 [n]."""

    predicted: np.ndarray
    labels: np.ndarray
    probabilities: np.ndarray

    def accuracy(self):
        """In percent."""
        return 100 * int((self.predicted == self.labels).sum()) / len(self.labels)

    def confusion(self, num_classes):
        """How many pictures of each class (row) were taken for each (column), int64 [num_classes, num_classes]."""
        pairs = self.labels * num_classes + self.predicted
        return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)

    def surest_mistakes(self, count=SHOWN):
        """The numbers of at most `count` pictures that were taken for another class, the surest first."""
        wrong = np.flatnonzero(self.predicted != self.labels)
        return wrong[np.argsort(-self.probabilities[wrong], kind="stable")][:count]


def class_lines(matrix, classes):
    """Lines of a table: each class with its pictures, the share that was recognised, and what it was taken for most."""
    width = max(5, *map(len, classes))
    yield f"{'class':{width}}  pictures   right  most often taken for"
    for label, name in enumerate(classes):
        others = matrix[label].copy()
        others[label] = 0
        most = f"{classes[others.argmax()]} ({others.max()})" if others.any() else "-"
        total = matrix[label].sum()
        yield f"{name:{width}}  {total:8}  {100 * matrix[label, label] / total:5.1f}%  {most}"


def matrix_lines(matrix, classes):
    """Lines of the matrix: a row a true class, a column a predicted one."""
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
    figure.colorbar(picture, label="share of the class's pictures (%)", shrink=0.8)
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
    """A matplotlib Figure of the pictures number `mistakes` of `images` (uint8 [n, H, W, 3])."""
    from matplotlib.figure import Figure

    columns = min(4, len(mistakes))
    rows = -(-len(mistakes) // columns)
    figure = Figure(figsize=(max(4.5, 2.2 * columns), 2.5 * rows), layout="constrained")
    figure.suptitle("surest and wrong: predicted class, probability, true class", fontsize=10)
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
    """`text` as matplotlib shows it letter by letter: what stands between two dollars it would take for a formula, what
    its font lacks it would draw as a box, and what is no UTF-8 it refuses; the last two become escapes, as \\u732b."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    letters = get_font(findfont(FontProperties())).get_charmap()
    drawn = (each if ord(each) in letters else each.encode("ascii", "backslashreplace").decode() for each in text)
    return "".join(drawn).replace("$", r"\$")
