"""Says, claim by claim, what our records show: one row per published claim.

The verdict follows from the records by a rule that is part of the row. Evidence is never mixed:
`measured`, `emulated` and `projected` records are judged apart and shown apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from suite.records import AnyRecord, ProjectionRecord, Record
from suite.reports import repeat
from suite.reports.cohorts import is_noisy, projections_of, runs_of
from suite.reports.judges.convergence import CONVERGENCE_JUDGES
from suite.reports.judges.headline import HEADLINE_JUDGES
from suite.reports.judges.network import NETWORK_JUDGES
from suite.reports.judges.optimisations import OPTIMISATION_JUDGES
from suite.reports.judges.partition_groups import PARTITION_JUDGES
from suite.reports.judges.projections import PROJECTION_JUDGES
from suite.reports.published import CLAIMS, Claim
from suite.reports.sections.runs import Key, key_of
from suite.reports.verdicts import NOT_TESTABLE, PARTLY, REPRODUCED, Finding, Judge

CLAIMS_SCHEMA = "claims/1"
SWEEPS = "sweeps"
OVERALL_RULE = (
    "Kinds of evidence are judged apart, each by the rule in the row. A verdict is what they agree on, and "
    "“partly” where they do not; a kind that cannot test the claim is shown and decides nothing. Runs that "
    "are marked noisy count only where no quiet ones can be judged; the row says so then, and reproduces "
    "nothing more than partly."
)


@dataclass(frozen=True)
class Verdict:
    """One row: a claim and what became of it. `missing` says what a test would need, `commands` and
    `sweep` (a sweep file's content) how to repeat it."""

    claim: Claim
    verdict: str
    rule: str
    findings: tuple[Finding, ...]
    missing: str | None
    commands: tuple[str, ...]
    sweep: str | None

    @property
    def runs(self) -> tuple[Record | ProjectionRecord, ...]:
        """What the verdict rests on, each once."""
        return tuple({key_of(run): run for finding in self.findings for run in finding.runs}.values())


def judge(records: Iterable[AnyRecord]) -> list[Verdict]:
    """A verdict for every published claim, in their order."""
    records = list(records)
    runs = runs_of(records)
    projections = projections_of(records)
    return [_verdict(claim, runs, projections) for claim in CLAIMS]


def write_claims(path: Path, verdicts: Iterable[Verdict], names: Mapping[Key, str]) -> None:
    """`claims.json`: the same rows as the report shows, for programs. `names` are the runs' in the report."""
    content = {
        "schema": CLAIMS_SCHEMA,
        "combined": OVERALL_RULE,
        "claims": [_row(verdict, names) for verdict in verdicts],
    }
    path.write_text(
        json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )


JUDGES = {
    **NETWORK_JUDGES,
    **OPTIMISATION_JUDGES,
    **PARTITION_JUDGES,
    **HEADLINE_JUDGES,
    **PROJECTION_JUDGES,
    **CONVERGENCE_JUDGES,
}


def write_sweeps(folder: Path, verdicts: Iterable[Verdict]) -> None:
    """A sweep file per row that rests on runs, named after the claim."""
    folder.mkdir(parents=True, exist_ok=True)
    for verdict in verdicts:
        if verdict.sweep is not None:
            (folder / f"{verdict.claim.id}.yaml").write_text(verdict.sweep, encoding="utf-8")


def _verdict(claim: Claim, runs: Sequence[Record], projections: Sequence[ProjectionRecord]) -> Verdict:
    entry = JUDGES[claim.id]
    found = [
        _found(entry, [run for run in runs if run.evidence == evidence])
        for evidence in sorted({run.evidence for run in runs})
    ]
    found.append(entry.projected(projections))
    findings = tuple(finding for finding in found if finding is not None)
    if not findings:
        missing = f"needs {claim.needs}: no such records among these results"
        return Verdict(claim, NOT_TESTABLE, entry.rule, (), missing, (), None)
    behind = [run for finding in findings for run in finding.runs]
    lines = repeat.commands(behind, f"{SWEEPS}/{claim.id}.yaml")
    return Verdict(claim, _overall(findings), entry.rule, findings, None, lines, repeat.sweep_of(behind))


def _found(entry: Judge, runs: Sequence[Record]) -> Finding | None:
    """By the quiet runs if they will do, else by all; see OVERALL_RULE."""
    quiet = entry.evaluate([run for run in runs if not is_noisy(run)])
    finding = quiet or entry.evaluate(runs)
    if quiet or finding is None:
        return finding
    noisy = sum(isinstance(run, Record) and is_noisy(run) for run in finding.runs)
    outcome = PARTLY if finding.outcome == REPRODUCED else finding.outcome
    ours = f"{finding.ours}; {noisy} of these {len(finding.runs)} runs are marked noisy"
    return replace(finding, outcome=outcome, ours=ours)


def _overall(findings: Iterable[Finding]) -> str:
    """See OVERALL_RULE."""
    outcomes = {finding.outcome for finding in findings}
    deciding = outcomes - {NOT_TESTABLE} or outcomes
    return deciding.pop() if len(deciding) == 1 else PARTLY


def _row(verdict: Verdict, names: Mapping[Key, str]) -> dict[str, Any]:
    claim = verdict.claim
    return {
        "id": claim.id,
        "claim": claim.sentence,
        "sources": list(claim.sources),
        "published": claim.published,
        "verdict": verdict.verdict,
        "rule": verdict.rule,
        "ours": [
            {key: value for key, value in asdict(replace(finding, runs=())).items() if key != "runs"}
            for finding in verdict.findings
        ],
        "missing": verdict.missing,
        "commands": list(verdict.commands),
        "runs": [
            {
                "name": names[key_of(run)],
                "link": f"index.html#{names[key_of(run)]}",
                "evidence": run.evidence,
                "config_hash": run.config_hash,
                "started_at": run.started_at,
            }
            for run in verdict.runs
        ],
    }
