"""Confusion matrices: how often each class was taken for which, as counts and as a picture."""

import io
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from tasks.records import Prediction
from tasks.text import one_line

NAME_CHARS, TITLE_CHARS = 40, 120
_NUMBERED = 30
"""Up to so many classes each cell holds its count; with more, numbers could not be read."""


def confusion_matrix(predictions: Iterable[Prediction], classes: int) -> Int[Tensor, "n m"]:
    """Counts by true class (row) and predicted class (column); the last column is of answers that named none.

    Args:
        predictions: labels in 0..classes-1.
        classes: how many classes there are.
    """
    counts = torch.zeros(classes, classes + 1, dtype=torch.int64)
    for prediction in predictions:
        counts[prediction.label, classes if prediction.predicted is None else prediction.predicted] += 1
    return counts


def confusion_table(counts: Int[Tensor, "n m"], names: Sequence[str]) -> dict[str, object]:
    """The counts in the layout that MLflow's table view reads; classes without images and columns of zeros left out."""
    rows, columns, heads = _shown(counts, names)
    data = [[names[row], *(int(counts[row, column]) for column in columns)] for row in rows]
    return {"columns": ["true class", *heads], "data": data}


def draw_confusion(counts: Int[Tensor, "n m"], names: Sequence[str], title: str) -> bytes:
    """A picture of the counts, PNG: each row shaded by its share, so that classes of any size compare.

    Args:
        counts: of :func:`confusion_matrix`.
        names: of all classes.
        title: said above it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns, heads = _shown(counts, names)
    shown = counts[rows][:, columns]
    shares = shown / shown.sum(1, keepdim=True).clamp(min=1)
    side = min(12.0, 2.5 + 0.42 * len(rows))
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    heads, title = [plain_text(head, NAME_CHARS) for head in heads], plain_text(title, TITLE_CHARS)
    axes = figure.subplots()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    size = 9 if len(rows) <= _NUMBERED else max(3, 260 // len(rows))
    axes.set_xticks(range(len(columns)), heads, rotation=90, fontsize=size)
    axes.set_yticks(range(len(rows)), [plain_text(names[row], NAME_CHARS) for row in rows], fontsize=size)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true class")
    axes.set_title(title, fontsize=11)
    if len(rows) <= _NUMBERED:
        for (row, column), count in {
            tuple(p): int(shown[tuple(p)]) for p in shown.nonzero().tolist()
        }.items():
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", fontsize=size, color=colour)
    FigureCanvasAgg(figure).print_png(picture := io.BytesIO())
    return picture.getvalue()


def plain_text(text: str, most: int) -> str:
    """Text that matplotlib draws as it stands, where two dollars would begin a formula; a long one cut."""
    return one_line(text, most).replace("$", r"\$")


def _shown(counts: Int[Tensor, "n m"], names: Sequence[str]) -> tuple[list[int], list[int], list[str]]:
    """The rows with images, the columns of those classes and of any other that was named, and the columns' heads."""
    rows = [row for row in range(len(names)) if counts[row].any()]
    columns = sorted({*rows, *(column for column in range(len(names) + 1) if counts[:, column].any())})
    return rows, columns, [names[column] if column < len(names) else "no class named" for column in columns]
