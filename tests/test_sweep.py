"""Sweeps: grids become cohorts, finished cells are kept, failures do not stop the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import record_factory

from suite.config import CONFIGS, Config
from suite.errors import RankError, UsageError
from suite.harness import sweep as sweep_module
from suite.harness.measure import Failure
from suite.harness.sweep import Cohort, Progress, read_sweep, run_sweep
from suite.impls import registry
from suite.records import CheckRecord, read
from suite.reports.cohorts import checks_of

SWEEP = """
stages:
  - name: checks
    kind: check
    impls: [ddp]
    base: &base
      workload: {name: bert-tiny, data: synthetic, model: {layers: 1, hidden: 64, intermediate: 64}}
      testbed: {ranks: 2}
  - name: times
    kind: run
    impls: [floor, ddp]
    base:
      <<: *base
      train: {steps: 2, warmup: 1}
    grid:
      train.micro_steps: [1, 2]
"""


@pytest.fixture
def sweep_file(tmp_path: Path) -> Path:
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP)
    return file


def test_every_point_of_the_grid_is_one_cohort_of_all_implementations(sweep_file: Path) -> None:
    cohorts = read_sweep(sweep_file)
    assert [(c.kind, [cell.impl.name for cell in c.cells]) for c in cohorts] == [
        ("check", ["ddp"]),
        ("run", ["floor", "ddp"]),
        ("run", ["floor", "ddp"]),
    ]
    assert [c.cells[0].train.micro_steps for c in cohorts[1:]] == [1, 2]
    assert all(cell.workload.model.hidden == 64 for c in cohorts for cell in c.cells)


def test_words_on_the_command_line_win_over_the_file(sweep_file: Path) -> None:
    cohorts = read_sweep(sweep_file, {"train.steps": 9, "workload": "roberta-tiny"})
    cells = [cell for cohort in cohorts for cell in cohort.cells]
    assert {cell.train.steps for cell in cells} == {9}
    assert {cell.workload.name for cell in cells} == {"roberta-tiny"}


def test_a_grid_may_vary_a_key_of_a_preset_that_was_named_in_short(tmp_path: Path) -> None:
    file = tmp_path / "network.yaml"
    file.write_text(
        "stages:\n"
        "  - impls: [ddp]\n"
        "    base: {testbed: {name: emulated, nodes: 2}, cluster: p3dn, workload: bert-scale}\n"
        "    grid: {cluster.inter_node_gbit_s: [25, 400], workload.model.layers: [2]}\n"
    )
    slow, fast = (cohort.cells[0] for cohort in read_sweep(file))
    assert slow.cluster is not None and fast.cluster is not None
    assert (slow.cluster.name, slow.cluster.inter_node_gbit_s) == ("p3dn", 25)
    assert fast.cluster.inter_node_gbit_s == 400
    assert (slow.testbed.nodes, slow.workload.name, slow.workload.model.layers) == (2, "bert-scale", 2)


def test_an_implementation_may_come_with_options(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("stages: [{impls: [{name: hsdp, options: {partition_size: 2}}, ddp]}]")
    hsdp, ddp = read_sweep(file)[0].cells
    assert (hsdp.impl.name, hsdp.impl.options) == ("hsdp", {"partition_size": 2})
    assert (ddp.impl.name, ddp.impl.options) == ("ddp", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages: [{kind: rum, impls: [ddp]}]", "did you mean 'run'?"),
        ("stages: [{impl: [ddp]}]", "did you mean 'impls'?"),
        ("stages: [{name: x}]", "stage 'x' names no impls"),
        ("stages: [{impls: [ddp], base: {train: {step: 3}}}]", "did you mean 'train.steps'?"),
        ("stages: [{impls: [ddp], grid: {train.lr: [-1]}}]", "train.lr=-1"),
        ("stages: 3", "has no list of stages"),
        ("stages: []", "has nothing to run"),
        ("stages: [{impls: [ddp], grid: {train.seed: []}}]", "has nothing to run"),
        ("stages: [", "is not YAML"),
    ],
)
def test_a_wrong_sweep_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_sweep(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_sweep_of_the_project_can_be_read(path: Path) -> None:
    assert read_sweep(path)


def test_a_sweep_runs_once_and_is_then_finished(sweep_file: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "out", list[Progress]()
    cohorts = read_sweep(sweep_file)
    first = run_sweep(cohorts, out, seen.append)
    assert (len(first.finished), first.skipped, first.failures) == (5, 0, [])
    assert (seen[-1].done, seen[-1].total) == (5, 5) and seen[-1].left_s == 0
    again = run_sweep(cohorts, out)
    assert (len(again.finished), again.skipped) == (0, 5)
    assert len(read(out / "records.jsonl")) == 5


def test_what_an_implementation_refuses_is_refused_before_the_first_stage(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(SWEEP + "  - {name: last, impls: [{name: zero3, options: {prefech_bytes: 1}}]}\n")
    with pytest.raises(UsageError, match=r"stage 'last': .*did you mean 'prefetch_"):
        run_sweep(read_sweep(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_interrupted_sweep_loses_only_the_cohort_that_was_running(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohorts, measure = read_sweep(sweep_file), sweep_module.measure

    def interrupted(cells: list, *others: Any) -> list:
        if cells[0].train.micro_steps == 2:
            raise KeyboardInterrupt
        return measure(cells, *others)

    monkeypatch.setattr(sweep_module, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(cohorts, tmp_path)
    assert len(read(tmp_path / "records.jsonl")) == 3
    monkeypatch.setattr(sweep_module, "measure", measure)
    resumed = run_sweep(cohorts, tmp_path)
    assert (len(resumed.finished), resumed.skipped) == (2, 3)


def test_a_failed_cell_is_reported_and_tried_again_next_time(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohorts: list[Cohort] = read_sweep(sweep_file)
    check = sweep_module.check

    def fails(config: object, references: object, place: object) -> None:
        raise RankError("rank 1 failed")

    monkeypatch.setattr(sweep_module, "check", fails)
    outcome = run_sweep(cohorts[:1], tmp_path)
    assert [(type(f), str(f.error)) for f in outcome.failures] == [(Failure, "rank 1 failed")]
    monkeypatch.setattr(sweep_module, "check", check)
    assert len(run_sweep(cohorts[:1], tmp_path).finished) == 1


def test_a_check_that_is_not_ok_is_made_again_until_it_is(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohorts, ok = read_sweep(sweep_file)[:1], [False, False, True]

    def checked(config: Config, references: object, place: object) -> CheckRecord:
        return replace(record_factory.check(ok=ok.pop(0)), config=config.to_dict(), config_hash=config.hash())

    monkeypatch.setattr(sweep_module, "check", checked)
    seen = [[item.ok for item in run_sweep(cohorts, tmp_path).finished] for _ in range(4)]  # type: ignore[union-attr]
    assert seen == [[False], [False], [True], []]
    # The report shows what came out last.
    assert [check.ok for check in checks_of(read(tmp_path / "records.jsonl"))] == [True]


def test_a_testbed_that_is_not_there_is_refused_before_anything_runs(
    sweep_file: Path, tmp_path: Path
) -> None:
    for name, message in (("lcoal", "did you mean 'local'"), ("torchrun", "write torchrun")):
        with pytest.raises(UsageError, match=message):
            run_sweep(read_sweep(sweep_file, {"testbed.name": name}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_implementation_that_cannot_be_imported_costs_its_own_cell_only(
    sweep_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(device_type: str | None) -> None:
        raise RuntimeError("Error building extension\nninja: failed")

    entry = replace(registry.find("ddp"), prepare=broken)
    monkeypatch.setitem(registry.IMPLEMENTATIONS, "ddp", entry)
    outcome = run_sweep(read_sweep(sweep_file)[1:2], tmp_path)
    assert [record.impl for record in outcome.finished] == ["floor"]
    assert [str(failure.error) for failure in outcome.failures] == [
        "impl=ddp cannot be prepared: Error building extension"
    ]


def test_a_yardstick_is_measured_in_every_stage_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    base = "{workload: {data: synthetic, model: {layers: 1}}, testbed: {ranks: 2}}"
    stage = f"{{kind: check, impls: [ddp], base: {base}"
    file.write_text(f"stages: [{stage}, name: one}}, {stage}, name: two}}]")
    assert len(run_sweep(read_sweep(file), tmp_path).finished) == 2
    assert run_sweep(read_sweep(file), tmp_path).skipped == 2
