"""Tables as files: Markdown, CSV and LaTeX for people, ``sessions.csv`` and ``metrics.json`` for DVC.

Accuracies are in percent throughout. Nothing here knows the time, so that equal runs give equal bytes.
"""

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence

from flows.published import COLUMNS_OF_THE_PAPER, published_label, published_row
from flows.results import Run
from flows.tables import COLUMNS, Column, Mark, Row, Section, Statistic, marks, sections
from tasks.text import no_formula, one_line, readable

Marks = Mapping[tuple[str, str, str], Mark]

NOTE = (
    "Accuracies in percent, mean ± standard deviation over seeds; the best of a dataset is bold and the second best "
    "underlined, equal ones alike; vlm_zero_shot learned elsewhere and is not ranked. "
    "A_base, A_last: after the first and last session, over all classes seen; A_avg: "
    "mean over sessions; PD = A_base - A_last; base, novel, harmonic: after the last session. Images, VLM calls, "
    "tokens (read and written), cost (in the currency of the prices that were set), unparsed answers (no verdict, or "
    "no class, which counts as wrong), epochs, seconds of computing and MiB (memory held at most) are means per run."
)
METRICS = ("A_base", "A_last", "A_avg", "novel", "harmonic")


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns to print: all, but ``cost`` only where a price was known."""
    return [column for column in COLUMNS if column.name != "cost" or any(row.cell("cost") for row in rows)]


def marked(row: Row, column: Column, found: Marks, best: str, second: str) -> str:
    """A cell as printed, within ``best`` or ``second`` (patterns with one ``{}``) where it is that."""
    text = column.text(row.cell(column.name))
    mark = found.get((row.dataset, row.method, column.name))
    return text if mark is None else (best if mark == "best" else second).replace("{}", text)


def beside(row: Row, column: Column) -> str:
    """The published value, as `` (paper 86.1)``; nothing where there is none."""
    printed = published_row(row.dataset, row.method)
    value = printed.value(column.name) if printed else None
    return "" if value is None else f" (paper {value[0]:.1f})"


# ------------------------------------------------------------------------------------------ Markdown


def markdown(rows: Sequence[Row], sentences: Sequence[str]) -> str:
    """One table for each dataset and section, and the sentences below them."""
    found, columns = marks(rows), columns_of(rows)
    parts = [_markdown_section(section, columns, found) for section in sections(rows)]
    text = "\n\n".join([*parts, NOTE])
    return text + "\n" + "".join(f"\n- {markdown_text(sentence)}" for sentence in sentences) + "\n"


def _markdown_section(section: Section, columns: Sequence[Column], found: Marks) -> str:
    heads = ["method", "seeds", *(column.name for column in columns), "in the paper"]
    lines = [heads, ["---", *["---:"] * (1 + len(columns)), "---"]]
    for row in section.rows:
        cells = [
            marked(row, column, found, "**{}**", "<u>{}</u>") + beside(row, column) for column in columns
        ]
        lines.append([markdown_text(row.method), row.seeds_text, *cells, published_label(row.method) or "–"])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"## {markdown_text(section.dataset)}: {section.title}\n\n{table}"


def markdown_text(text: str) -> str:
    """Text from records that Markdown shall not read as a cell's border or as HTML."""
    return one_line(text).replace("|", "\\|").replace("<", "&lt;")


# ------------------------------------------------------------------------------------------ LaTeX

_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "ψ": r"$\psi$", "–": "--",
}  # fmt: skip
LATEX_COLUMNS = ("A_base", "A_last", "A_avg", "novel", "harmonic", "images", "VLM calls", "VLM tokens", "cost",
                 "seconds", "MiB")  # fmt: skip


def latex_escaped(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(_LATEX.get(character, character) for character in " ".join(readable(text).splitlines()))


def latex(rows: Sequence[Row]) -> str:
    r"""A ``table*`` for each dataset and section; needs ``\usepackage{booktabs,graphicx}``."""
    found = marks(rows)
    columns = [column for column in columns_of(rows) if column.name in LATEX_COLUMNS]
    parts = [_latex_section(section, columns, found) for section in sections(rows)]
    return "% needs \\usepackage{booktabs,graphicx}\n" + "\n".join(parts)


def _latex_section(section: Section, columns: Sequence[Column], found: Marks) -> str:
    lines = [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{latex_escaped(f'{section.dataset}: {section.title}')}}}",
        r"\resizebox{\linewidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (1 + len(columns))}}}",
        r"\toprule",
        _latex_line(["method", "seeds", *(_latex_head(column.name) for column in columns)]),
        r"\midrule",
    ]
    for row in section.rows:
        cells = [_latex_cell(row, column, found) for column in columns]
        lines.append(_latex_line([latex_escaped(row.method), latex_escaped(row.seeds_text), *cells]))
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}}", r"\end{table*}", ""])


def _latex_cell(row: Row, column: Column, found: Marks) -> str:
    text = latex_escaped(column.text(row.cell(column.name)))
    mark = found.get((row.dataset, row.method, column.name))
    command = {"best": r"\textbf", "second": r"\underline", None: ""}[mark]
    return (f"{command}{{{text}}}" if command else text) + latex_escaped(beside(row, column))


def _latex_head(name: str) -> str:
    first, _, index = name.partition("_")
    return rf"${first}_\mathrm{{{index}}}$" if index else latex_escaped(name)


def _latex_line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


# ------------------------------------------------------------------------------------------ CSV and JSON


def comma_separated(rows: Sequence[Row]) -> str:
    """A line for each dataset and method: mean and standard deviation apart, then what the paper prints."""
    heads = [name for column in COLUMNS for name in (column.name, f"{column.name} std")]
    heads += [name for column in COLUMNS_OF_THE_PAPER for name in (f"{column} paper", f"{column} paper std")]
    return _csv(["dataset", "method", "seeds", "unfinished", *heads, "source"], rows, _csv_row)


def _csv_row(row: Row) -> list[object]:
    cells: list[object] = [no_formula(row.dataset), no_formula(row.method), row.seeds, row.unfinished]
    for column, cell in zip(COLUMNS, row.cells, strict=True):
        scale = 100 if column.percent else 1
        cells += ["", ""] if cell is None else [_number(cell.mean, scale), _number(cell.std, scale)]
    printed = published_row(row.dataset, row.method)
    for name in COLUMNS_OF_THE_PAPER:
        cells += (printed.value(name) if printed else None) or ("", "")
    return [*cells, printed.table if printed else ""]


def sessions_csv(runs: Sequence[Run]) -> str:
    """A line for each sealed session of every run, unfinished ones too; ``novel`` is empty before there is any."""
    heads = ["dataset", "method", "seed", "session", "accuracy", "base", "novel"]
    lines: list[list[object]] = []
    for run in runs:
        for session in run.sessions:
            found = session.test.output.accuracy
            values = [_number(value, 100) for value in (found.overall, found.base, found.novel)]
            names = no_formula(run.dataset), no_formula(run.method)
            lines.append([*names, run.seed, session.session, *values])
    return _csv(heads, lines, list)


def metrics_json(rows: Sequence[Row]) -> str:
    """Dataset -> method -> mean of each of ``METRICS``, in percent; a method without a finished run is left out."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        cells: list[tuple[str, Statistic]] = [(n, cell) for n in METRICS if (cell := row.cell(n)) is not None]
        if cells:
            means = {name: round(100 * cell.mean, 4) for name, cell in cells}
            found.setdefault(row.dataset, {})[row.method] = means
    return json.dumps(found, indent=1) + "\n"


def _csv(heads: Sequence[str], items: Sequence, line: Callable) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(line(item) for item in items)
    return text.getvalue()


def _number(value: float | None, scale: int) -> str:
    return "" if value is None else f"{scale * value:.4f}".rstrip("0").rstrip(".")
