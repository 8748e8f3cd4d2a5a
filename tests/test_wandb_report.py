"""The W&B report: its specification without a login, and what is said then."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import record_factory as factory

from suite import cli
from suite.records import append
from suite.reports.claims import judge

pytest.importorskip("wandb_workspaces")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """The folder, the specification and what was printed, with nobody logged in."""
    folder = tmp_path_factory.mktemp("report")
    for record in factory.full_report():
        append(folder / "results" / "records.jsonl", record)
    with pytest.MonkeyPatch.context() as patch, pytest.MonkeyPatch.context() as output:
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("NETRC", str(folder / "netrc"))
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        printed: list[str] = []
        output.setattr(cli.stdout, "print", lambda text, **_: printed.append(str(text)))
        words = ["report", str(folder / "results"), "--wandb", "team/sharding", "--out", str(folder / "out")]
        assert cli.main(words) == 0
    return folder, json.loads((folder / "out" / "wandb-report.json").read_text()), "\n".join(printed)


def blocks(specification: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [block for block in specification["spec"]["blocks"] if block["type"] == kind]


def test_the_specification_names_its_project_and_holds_every_claim(written) -> None:
    _, specification, _ = written
    assert specification["project"] == {"name": "sharding", "entityName": "team"}
    (claims,) = blocks(specification, "markdown-block")
    for verdict in judge(factory.full_report()):
        (row,) = [
            line for line in claims["content"].splitlines() if line.startswith(f"| {verdict.claim.id} ")
        ]
        assert row.endswith(f"| **{verdict.verdict}** |")


def test_every_grid_has_a_run_set_per_implementation_of_one_kind_of_evidence(written) -> None:
    _, specification, _ = written
    grids = blocks(specification, "panel-grid")
    assert len(grids) > 2
    for grid in grids:
        kinds = set()
        for run_set in grid["metadata"]["runSets"]:
            filters = {item["key"]["name"]: item for item in run_set["filters"]["filters"]}
            assert [filters[key]["op"] for key in ("jobType", "evidence", "cohort")] == ["=", "=", "IN"]
            assert filters["jobType"]["value"] == run_set["name"] and filters["cohort"]["value"]
            kinds.add(filters["evidence"]["value"])
        names = [run_set["name"] for run_set in grid["metadata"]["runSets"]]
        assert len(kinds) == 1 and len(set(names)) == len(names)


def test_weak_scaling_and_throughput_have_their_panels(written) -> None:
    _, specification, _ = written
    panels = [
        (panel["viewType"], json.dumps(panel["config"]))
        for grid in blocks(specification, "panel-grid")
        for panel in grid["metadata"]["panelBankSectionConfig"]["panels"]
    ]
    for kind, metric in (
        ("Scatter Plot", "world_size"),
        ("Bar Chart", "samples_per_s"),
        ("Run History Line Plot", "train/loss"),
    ):
        assert any(view == kind and metric in config for view, config in panels), metric


def test_without_a_login_it_says_what_to_run_later(written) -> None:
    folder, _, printed = written
    assert "not published: not logged in" in printed
    assert f"wandb sync {folder}/results/wandb" in printed
    assert f"suite report {folder}/results --wandb team/sharding" in printed


def test_the_page_beside_it_can_be_written_again(written) -> None:
    folder, _, _ = written
    assert {path.name for path in (folder / "out").iterdir()} == {
        "index.html",
        "claims.json",
        "figures",
        "sweeps",
        "wandb-report.json",
    }
    assert cli.main(["report", str(folder / "results"), "--out", str(folder / "out")]) == 0


@pytest.mark.parametrize("target", ["team", "team/", "/sharding", "a/b/c"])
def test_anything_but_entity_and_project_is_refused(
    target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    append(tmp_path / "results" / "records.jsonl", factory.run("ddp"))
    assert cli.main(["report", "results", "--wandb", target]) == 2
    assert "ENTITY/PROJECT" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["results"]
