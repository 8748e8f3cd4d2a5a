"""All records and tables for other programs: CSV and Parquet, and LaTeX for a paper."""

from __future__ import annotations

import csv
import importlib.util
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from suite.records import AnyRecord
from suite.reports.cohorts import all_checks, flat, projections_of, runs_of, stand_ins_of
from suite.reports.tables import Table

_ESCAPED = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "×": r"$\times$",
    "÷": r"$\div$",
    "→": r"$\rightarrow$",
    "−": r"$-$",
    "≈": r"$\approx$",
    "–": "--",
}


def export_records(records: Iterable[AnyRecord], folder: Path) -> tuple[list[Path], str]:
    """`runs`, `checks` and `projections` as CSV, and as Parquet where pyarrow is installed; the
    paths, and what could not be written and why (empty when nothing)."""
    records = list(records)
    kinds: dict[str, Sequence[AnyRecord]] = {
        "runs": runs_of(records),
        "checks": all_checks(records),
        "projections": [*projections_of(records), *stand_ins_of(records)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    has_parquet = importlib.util.find_spec("pyarrow") is not None
    written: list[Path] = []
    for name, items in kinds.items():
        if not items:
            continue
        rows = [flat(asdict(item)) for item in items]
        written.append(_write_csv(rows, folder / f"{name}.csv"))
        if has_parquet:
            written.append(_write_parquet(rows, folder / f"{name}.parquet"))
    return written, "" if has_parquet else "no Parquet: pyarrow is not installed (pip install pyarrow)"


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, _columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _write_parquet(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    columns = {key: [_plain(row.get(key)) for row in rows] for key in _columns(rows)}
    pyarrow.parquet.write_table(
        pyarrow.table({key: _one_type(values) for key, values in columns.items()}), path
    )
    return path


def _plain(value: Any) -> Any:
    """Lists of numbers stay lists; anything else that has an inside becomes text."""
    numbers = isinstance(value, list) and all(isinstance(item, (int, float)) for item in value)
    return value if numbers or not isinstance(value, (list, dict)) else str(value)


def _one_type(values: Sequence[Any]) -> list[Any]:
    """A column holds one type: options differ between implementations, and then all become text."""
    kinds = {type(value) for value in values if value is not None}
    return (
        list(values)
        if len(kinds) < 2 or kinds == {int, float}
        else [None if v is None else str(v) for v in values]
    )


def export_latex(tables: Iterable[tuple[str, Table]], folder: Path) -> list[Path]:
    """A file per named table, for `\\input` between a table's caption and end; needs booktabs."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, table in tables:
        path = folder / f"{name}.tex"
        path.write_text(to_latex(table), encoding="utf-8")
        written.append(path)
    return written


def to_latex(table: Table) -> str:
    columns = "".join("r" if numeric else "l" for numeric in table.numeric)
    lines = [
        f"% {table.title}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        _line(table.head),
        r"\midrule",
    ]
    lines += [_line([cell.text for cell in row]) for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _line(cells: Iterable[str]) -> str:
    return " & ".join(map(_escape, cells)) + r" \\"


def _escape(text: str) -> str:
    return re.sub("|".join(map(re.escape, _ESCAPED)), lambda found: _ESCAPED[found[0]], text)
