"""Figures, each with the table that it shows. Drawn deterministically; readable without colour.

Rows are labelled, curves differ in marker and line style as well as in colour. `floor` is drawn as
the lower bound, a line, never as a competitor.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from suite.reports.cohorts import FLOOR, Cohort
from suite.reports.tables import Table

# Okabe and Ito's colours without black and yellow, which vanish on a dark or a light page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "h", ">")
LINES = ("-", "--", "-.", ":")
INK = "#24292f"
MUTED = "#7d8590"
PAPER = "#ffffff"

SPREAD = " Marker: median, line: min to max{}."

PAGE = "../index.html"
"""As seen from the folder of figures."""

WIDTH = 5.6
"""Inches; narrow enough for a phone to show it with legible text."""

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "suite",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "figure.facecolor": PAPER,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Style:
    """How an implementation looks in every figure of a report."""

    colour: str
    marker: str
    line: str


@dataclass(frozen=True)
class Plot:
    """A finished figure. `caption` holds evidence and conditions, `alt` what there is to see."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    pdf: bytes
    table: Table

    def save(self, folder: Path) -> None:
        """Writes NAME.svg, NAME.pdf and NAME.csv."""
        (folder / f"{self.name}.svg").write_text(self.svg, encoding="utf-8")
        (folder / f"{self.name}.pdf").write_bytes(self.pdf)
        (folder / f"{self.name}.csv").write_text(self.table.to_csv(), encoding="utf-8")

    def inline(self) -> str:
        """The SVG as a part of an HTML page: its ink follows the page's, its ids are its own."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        svg = svg.replace(f'xlink:href="{PAGE}#', 'href="#')
        svg = svg.replace(INK, "currentColor").replace(PAPER, "none")
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        label = f'<title id="{self.name}-alt">{_escape(self.alt)}</title>'
        head, rest = svg.split(">", 1)
        return f'{head} role="img" aria-labelledby="{self.name}-alt">{label}{rest}'


def styles_for(impls: Sequence[str]) -> dict[str, Style]:
    """A look of its own for every implementation of a report: where there are more than colours, those that
    share one have different lines."""
    return {
        impl: Style(
            PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)], LINES[(i + i // len(PALETTE)) % len(LINES)]
        )
        for i, impl in enumerate(sorted(set(impls)))
    }


def cohort_plot(
    cohort: Cohort,
    kind: str,
    title: str,
    draw: Callable[[Figure], None],
    table: Table,
    height: float | None = None,
    marks: str = "",
) -> Plot:
    best = "; ".join(f"{row[0].text} {row[1].text}" for row in table.rows)
    return make_plot(
        name=f"{cohort.key.lower()}-{kind}",
        title=title,
        caption=f"{cohort.key}: {cohort.title}. {cohort.conditions}{marks}",
        alt=f"{title}, {table.head[1]}: {best}",
        table=table,
        draw=draw,
        height=height or 0.8 + 0.27 * len(cohort.runs),
    )


def make_plot(
    name: str, title: str, caption: str, alt: str, table: Table, draw: Callable[[Figure], None], height: float
) -> Plot:
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        svg, pdf = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return Plot(name, title, caption, alt, svg.getvalue(), pdf.getvalue(), table)


def row_axes(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def range_mark(axes: Axes, row: int, spread: tuple[float, float, float], style: Style) -> None:
    """`spread` is (low, middle, high)."""
    low, middle, high = spread
    look: dict[str, Any] = {"markersize": 6, "markeredgecolor": PAPER, "markeredgewidth": 0.6}
    axes.plot([low, high], [row, row], color=style.colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot([middle], [row], style.marker, color=style.colour, **look)


def floor_line(axes: Axes, value: float, side: str) -> None:
    """The bound, named at its top on the `left` or `right` of the line."""
    axes.axvline(value, color=INK, linestyle=":", linewidth=1)
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    offset, ha = ((2, 2), "left") if side == "right" else ((-2, 2), "right")
    axes.annotate(FLOOR, (value, 1), xytext=offset, ha=ha, fontsize=8, **place)


def repetitions(axes: Axes, row: int, times: Sequence[float]) -> None:
    """Every timed step, just below its row."""
    axes.plot(times, [row + 0.3] * len(times), ".", color=MUTED, markersize=2.5)


def draw_curve(
    axes: Axes, label: str, values: Sequence[float], style: Style, every: tuple[int, int] = (0, 1)
) -> None:
    # A loss that is no number is None in a record; drawn as a gap.
    points = [float("nan") if value is None else value for value in values]
    axes.plot(
        range(1, len(points) + 1),
        points,
        style.line,
        color=style.colour,
        marker=style.marker,
        markersize=4,
        markevery=every,
        label=label,
    )
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_band(
    axes: Axes,
    label: str,
    points: Sequence[tuple[float, tuple[float, float, float]]],
    style: Style,
) -> None:
    """A curve through the medians with a band from min to max; `points` are (x, (low, middle, high))."""
    if not points:
        return
    places = [place for place, _ in points]
    lows, middles, highs = zip(*(spread for _, spread in points), strict=True)
    axes.fill_between(places, lows, highs, color=style.colour, alpha=0.15, linewidth=0)
    look: dict[str, Any] = {"color": style.colour, "marker": style.marker, "markersize": 5, "label": label}
    axes.plot(places, middles, style.line, **look)


def doubling_axis(axes: Axes, places: Iterable[float], label: str) -> None:
    """A logarithmic x axis with a tick at each of these places."""
    ticks = sorted(set(places))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([f"{tick:g}" for tick in ticks])
    axes.set_xlabel(label)
    axes.grid()


def link_label(label: Text, anchor: str) -> None:
    """Makes a text of the figure lead to that place in the report; nowhere when it is empty."""
    if anchor:
        label.set_url(f"{PAGE}#{anchor}")


def shared_legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """One legend for all panels, below them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
