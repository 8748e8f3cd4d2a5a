"""A cohort with everything that is shown of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from suite.reports.cohorts import Cohort
from suite.reports.figures import Plot, Style
from suite.reports.sections.losses import fidelity_table, is_long, loss_plot
from suite.reports.sections.resources import resources_plot, resources_table
from suite.reports.sections.throughput import (
    ratio_plot,
    references_of,
    samples_plot,
    step_time_plot,
    throughput_table,
)
from suite.reports.tables import Table


@dataclass(frozen=True)
class CohortSection:
    """A cohort with everything that is shown of it."""

    cohort: Cohort
    throughput: Table
    resources: Table
    fidelity: Table
    plots: tuple[Plot, ...]


def cohort_section(cohort: Cohort, styles: Mapping[str, Style]) -> CohortSection:
    return CohortSection(
        cohort,
        throughput_table(cohort),
        resources_table(cohort),
        fidelity_table(cohort),
        tuple(cohort_plots(cohort, styles)),
    )


def cohort_plots(cohort: Cohort, styles: Mapping[str, Style]) -> list[Plot]:
    """Every figure of a cohort for which something was measured."""
    if not cohort.runs:
        return []
    plots = [step_time_plot(cohort, styles), samples_plot(cohort, styles)]
    if references_of(cohort):
        plots.append(ratio_plot(cohort, styles))
    if any(run.peak_memory_bytes is not None or run.bytes_sent_per_rank is not None for run in cohort.runs):
        plots.append(resources_plot(cohort))
    if any(run.losses for run in cohort.runs) and not is_long(cohort):
        plots.append(loss_plot(cohort, styles))
    return plots
