"""Slurm: the script says what was configured, and a real cluster of two nodes runs it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import record_factory as factory
import slurm_cluster

from suite.cli import main
from suite.config import CONFIGS
from suite.config_load import load
from suite.errors import UsageError
from suite.harness import slurm_sweep
from suite.harness.commands import Commands
from suite.harness.slurm_jobs import Task, open_tasks, scripts, submit
from suite.harness.sweep import Clock, Cohort, Outcome, read_sweep
from suite.harness.task import read_task, write_task
from suite.records import AnyRecord, Record, append, read
from suite.testbeds import slurm
from suite.testbeds.slurm import JobArray, State

TINY = ["workload.model.layers=1", "workload.model.hidden=64", "workload.data=synthetic"]
ON_SLURM = ["testbed=slurm", "testbed.nodes=2", "testbed.ranks_per_node=1", *TINY]

needs_slurm = pytest.mark.skipif(
    slurm_cluster.why_not() is not None, reason=slurm_cluster.why_not() or "no reason"
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[slurm_cluster.Cluster]:
    cluster = slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def suite(*words: str, cluster: slurm_cluster.Cluster, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "suite.cli", *words],
        cwd=folder,
        env={
            **os.environ,
            "SLURM_CONF": str(cluster.conf),
            "PYTHONPATH": str(CONFIGS.parent),
            "WANDB_API_KEY": "do-not-tell",
            "NCCL_DEBUG": "WARN",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 100) -> tuple[int, str, str]:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


# ---- without a cluster


def script(*words: str) -> str:
    (text,) = scripts([Cohort("", "run", [load(words)])], Path("results"))
    return text


def directives(text: str) -> list[str]:
    lines = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    return [word for line in lines for word in shlex.split(line)]


def test_a_dry_run_prints_the_script_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run", *ON_SLURM, "testbed.partition=gpu", "testbed.time_limit=2h", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert {"--nodes=2", "--partition=gpu", "--time=120", "--array=1-1"} <= {*directives(printed)}
    assert "--nproc-per-node=1" in printed and "--rdzv-backend=c10d" in printed
    assert list(tmp_path.iterdir()) == []
    subprocess.run(["bash", "-n"], input=printed, text=True, check=True)


def test_a_cluster_says_how_many_ranks_a_node_has() -> None:
    config = load(["testbed=slurm", "testbed.nodes=3", "cluster=p4d"])
    assert (config.world_size, config.ranks_per_node) == (24, 8)


def test_a_script_survives_folders_that_a_shell_would_take_apart(tmp_path: Path) -> None:
    folder = tmp_path / "a b; $(touch x) 'q' 100%"
    text = JobArray(folder, 1, 2, nodes=1, ranks_per_node=1).script()
    assert f"--output={str(folder).replace('%', '%%')}/%a.log" in directives(text)
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    command = text[text.index("exec srun") :].replace("\\\n", " ")
    assert f"{folder}/$SLURM_ARRAY_TASK_ID.json" in shlex.split(command)


def test_tasks_that_ask_slurm_for_different_things_are_different_arrays() -> None:
    cohorts = [
        Cohort("", "run", [load([*ON_SLURM, *words])])
        for words in ([], ["testbed.time_limit=30m"], ["testbed.time_limit=4h"], ["testbed.time_limit=30m"])
    ]
    asked = [
        {word for word in directives(text) if "time" in word or "array" in word}
        for text in scripts(cohorts, Path("results"))
    ]
    assert sorted(map(sorted, asked)) == [
        ["--array=1-2", "--time=30"],
        ["--array=3-3", "--time=240"],
        ["--array=4-4"],
    ]


def test_what_a_lost_task_had_finished_is_kept_and_only_the_rest_has_failed(tmp_path: Path) -> None:
    ddp, zero3 = (load([f"impl={name}", *ON_SLURM]) for name in ("ddp", "zero3"))
    task = Task(tmp_path / "1.json", "7", Cohort("checks", "check", [ddp, zero3]))
    finished = replace(factory.check("ddp"), stage="checks", config=ddp.to_dict(), config_hash=ddp.hash())
    append(tmp_path / "1" / "records.jsonl", finished)
    kept: list[AnyRecord] = []
    outcome, clock = Outcome(), Clock(2, lambda _: None)
    cancelled = {("7", 1): State("CANCELLED", "")}
    assert slurm_sweep._settled(task, cancelled, outcome, kept.extend, clock)
    assert kept == [finished]
    assert [failure.config.impl.name for failure in outcome.failures] == ["zero3"]


def test_checks_of_a_task_that_ended_while_nobody_followed_are_collected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ddp, zero3, mics = (load([f"impl={name}", *ON_SLURM]) for name in ("ddp", "zero3", "mics"))
    cohort = Cohort("checks", "check", [ddp, zero3, mics])
    monkeypatch.setattr(slurm, "why_not", lambda: None)
    monkeypatch.setattr(slurm, "submit", lambda script, after: "7")
    (task,) = submit([cohort], tmp_path, resumable=True)
    # It made two checks, one of them not ok, and ran into its time limit.
    found = [
        replace(factory.check(c.impl.name, ok=ok), stage="checks", config=c.to_dict(), config_hash=c.hash())
        for c, ok in ((ddp, True), (zero3, False))
    ]
    append(task.file.with_suffix("") / "records.jsonl", *found)
    submitted: list[Cohort] = []

    def submits(cohorts: list[Cohort], *rest: object) -> list[Task]:
        submitted.extend(cohorts)
        return []

    monkeypatch.setattr(slurm, "states", lambda jobs: {("7", 1): State("TIMEOUT", "")})
    monkeypatch.setattr(slurm_sweep, "submit", submits)
    outcome = slurm_sweep.run_on_slurm([cohort], tmp_path)
    assert read(tmp_path / "records.jsonl") == found
    assert [cell.impl.name for cell in submitted[0].cells] == ["zero3", "mics"]
    assert (outcome.finished, outcome.skipped) == ([found[0]], 0)
    # What is collected again is not recorded again.
    (task.file.parent / "open.json").write_text('{"7": [1]}')
    slurm_sweep.run_on_slurm([cohort], tmp_path)
    assert read(tmp_path / "records.jsonl") == found


def test_a_damaged_file_of_jobs_is_one_clear_line(tmp_path: Path) -> None:
    folder = tmp_path / "jobs" / "one"
    folder.mkdir(parents=True)
    for content in ('{"7": [1', "[]", '{"7": 1}'):
        (folder / "open.json").write_text(content)
        with pytest.raises(UsageError, match=r"open\.json is damaged .* remove it to go on without its jobs"):
            list(open_tasks(tmp_path))


def test_without_slurm_nothing_of_a_mixed_sweep_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (load(["impl=ddp", *words]) for words in (["testbed.ranks=2", *TINY], ON_SLURM))
    monkeypatch.setattr(slurm, "why_not", lambda: "there is no sbatch")
    with pytest.raises(UsageError, match="cannot submit jobs here: there is no sbatch"):
        Commands(None).sweep(
            [Cohort("a", "check", [here]), Cohort("b", "check", [there])], tmp_path, lambda _: None, None
        )  # type: ignore[arg-type]
    assert not (tmp_path / "records.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["testbed.partition=a b"], "testbed.partition=a b is not possible"),
        (["testbed.time_limit=1:30:00"], "it must be minutes, hours or days, like 90m"),
        (["testbed.sbatch=[--x;y]"], "an option in testbed.sbatch=--x;y is not possible"),
        (["testbed.max_nodes=1", "testbed.nodes=2"], "testbed.max_nodes=1 is not possible"),
        (["testbed.partitoin=a"], "did you mean 'testbed.partition'?"),
        (["cluster=p4d", "cluster.inter_node_gbit_s=0"], "cluster.inter_node_gbit_s=0.0 is not possible"),
        (["cluster=p4d", "cluster.env.HF_TOKEN=x"], "cluster.env.HF_TOKEN looks like a secret"),
    ],
)
def test_what_would_break_the_script_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(["testbed=slurm", *words])
    assert message in str(caught.value)


def test_where_a_job_runs_does_not_change_what_it_measures() -> None:
    base = load(ON_SLURM)
    other = load([*ON_SLURM, "testbed.partition=a", "testbed.max_nodes=4", "testbed.sbatch=[--gres=gpu:8]"])
    assert base.hash() == other.hash()


def test_a_task_file_gives_back_the_same_cohort(tmp_path: Path) -> None:
    cells = [load(["impl=mics", "impl.options.partition_size=1", "cluster=p4d", *ON_SLURM])]
    write_task(tmp_path / "1.json", Cohort("a stage", "check", cells))
    again = read_task(tmp_path / "1.json")
    assert (again.stage, again.kind) == ("a stage", "check")
    assert [cell.hash() for cell in again.cells] == [cell.hash() for cell in cells]


def test_cohorts_of_different_sizes_share_the_limit_on_nodes(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "stages: [{impls: [ddp, zero3], grid: {testbed.nodes: [4, 2], train.seed: [1, 2, 3]}, "
        "base: {testbed: {name: slurm, ranks_per_node: 8, max_nodes: 8}}}]"
    )
    small, large = scripts(read_sweep(file), tmp_path)
    assert {"--nodes=2", "--array=1-3%4"} <= {*directives(small)}
    assert {"--nodes=4", "--array=4-6%2"} <= {*directives(large)}


def test_a_sweep_written_for_other_testbeds_can_go_to_slurm() -> None:
    for name in ("mics_peers", "reproduce_quick"):
        nothing = {"testbed.dilation": None, "testbed.ranks": None}
        where = {"testbed": "slurm", "testbed.nodes": 2, "testbed.ranks_per_node": 2, **nothing}
        path = CONFIGS / "sweeps" / f"{name}.yaml"
        cohorts = [cohort for cohort in read_sweep(path, where) if cohort.kind != "project"]
        assert {cell.world_size for cohort in cohorts for cell in cohort.cells} <= {4}


# ---- on a real cluster of two nodes


@needs_slurm
def test_a_job_is_submitted_run_and_collected(cluster: slurm_cluster.Cluster, tmp_path: Path) -> None:
    words = ["run", "impl=zero3", *ON_SLURM, "train.steps=2", "train.warmup=1", "--json"]
    status, out, err = finish(suite(*words, cluster=cluster, folder=tmp_path))
    assert status == 0, err
    record = json.loads(out)
    assert (record["testbed"], record["evidence"], record["nodes"]) == ("slurm", "measured", 2)
    assert record["inter_node_bytes_per_node"] > 0 and record["step_time_s"]["n"] == 2
    assert record["env"]["network"]["NCCL_DEBUG"] == "WARN"
    assert "do-not-tell" not in "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())


@needs_slurm
@pytest.mark.slow
def test_a_rank_that_fails_is_reported_from_the_job(cluster: slurm_cluster.Cluster, tmp_path: Path) -> None:
    words = ["run", "impl=ddp", *ON_SLURM, "testbed.timeout_s=0.0001"]
    status, _, err = finish(suite(*words, cluster=cluster, folder=tmp_path))
    assert status == 3 and "made no progress for 0.0001 s in step" in err


@needs_slurm
@pytest.mark.slow
def test_a_job_that_ends_without_a_result_is_reported_with_its_last_words(
    cluster: slurm_cluster.Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(slurm_sweep, "GRACE_S", 1.0)
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    script = JobArray.script

    def broken(self: JobArray) -> str:
        lines = script(self).splitlines()
        first = next(number for number, line in enumerate(lines) if not line.startswith("#"))
        lines[first:first] = ["echo 'suite: the scratch disk is gone'", "exit 7"]
        return "\n".join(lines) + "\n"

    monkeypatch.setattr(JobArray, "script", broken)
    assert main(["run", *ON_SLURM, f"out={tmp_path}"]) == 3
    printed = capsys.readouterr().err
    assert "ended without a result (FAILED): the scratch disk is gone" in " ".join(printed.split())


@needs_slurm
@pytest.mark.slow
def test_what_only_the_job_can_find_wrong_is_reported_from_it(
    cluster: slurm_cluster.Cluster,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster.conf))
    words = [word for word in ON_SLURM if not word.startswith("workload.data")]
    assert main(["run", *words, "workload.data=no/such/text", f"out={tmp_path}"]) == 3
    assert "workload.data=no/such/text does not exist" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "records.jsonl").exists()


@needs_slurm
@pytest.mark.slow
def test_the_doctor_looks_at_all_nodes(cluster: slurm_cluster.Cluster, tmp_path: Path) -> None:
    words = ["doctor", "--cluster", "testbed=slurm", "testbed.nodes=2", f"out={tmp_path}"]
    status, out, err = finish(suite(*words, cluster=cluster, folder=tmp_path))
    assert status == 0, err
    for what in ("equal nodes", "2 nodes", "clocks", "all-reduce of 64 MiB", "GB/s"):
        assert what in out


SWEEP = """
stages:
  - name: times
    impls: [floor, ddp]
    base:
      workload: {data: synthetic, model: {layers: 1, hidden: 64, intermediate: 64}}
      testbed: {name: slurm, nodes: 2, ranks_per_node: 1, max_nodes: 2}
      train: {warmup: 0}
    grid: {train.steps: [2, 20]}
"""


@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_sweep_that_lost_a_node_goes_on_with_what_is_missing(
    cluster: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    records = tmp_path / "out" / "records.jsonl"
    running = sweep_until_a_node_is_lost(cluster, tmp_path)
    try:
        running.send_signal(signal.SIGINT)  # its user gives up; a node has to be repaired
        status, _, err = finish(running)
    finally:
        running.kill()
        cluster.start_node("node2")
        cluster.wait_for("idle", "idle")
    assert status == 130 and "interrupted" in err
    assert cluster.client("squeue", "-h") == ""  # the job was cancelled with it
    kept = records.read_bytes()
    status, _, err = finish(suite(*SWEEPING, cluster=cluster, folder=tmp_path), timeout=180)
    assert status == 0 and "2 cells run, 2 were finished before, 0 failed" in err, err
    assert records.read_bytes().startswith(kept)
    found = [(item.impl, item.config["train"]["steps"]) for item in read(records) if isinstance(item, Record)]
    assert sorted(found) == [("ddp", 2), ("ddp", 20), ("floor", 2), ("floor", 20)]


@needs_slurm
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_task_whose_node_comes_back_is_started_again_and_collected(
    cluster: slurm_cluster.Cluster, tmp_path: Path
) -> None:
    running = sweep_until_a_node_is_lost(cluster, tmp_path)
    try:
        cluster.start_node("node2")
        status, _, err = finish(running, timeout=400)  # Slurm lets a requeued job wait for two minutes
    finally:
        running.kill()
        cluster.wait_for("idle", "idle")
    assert status == 0 and "4 cells run, 0 were finished before, 0 failed" in err, err
    assert log_of(tmp_path, 2).count("starting floor") == 2


SWEEPING = ("sweep", "sweep.yaml", "--out", "out")


def sweep_until_a_node_is_lost(cluster: slurm_cluster.Cluster, folder: Path) -> subprocess.Popen[str]:
    """A sweep whose first task is through, and whose second one Slurm has put back into the queue."""
    (folder / "sweep.yaml").write_text(SWEEP)
    running = suite(*SWEEPING, cluster=cluster, folder=folder)
    try:
        until(lambda: len(read(folder / "out" / "records.jsonl")) == 2, 100)
        until(lambda: "timing step" in log_of(folder, 2), 60)
        cluster.lose_node("node2")
        until(lambda: "PENDING" in cluster.client("squeue", "-h", "-r", "-o", "%T"), 30)
    except BaseException:
        running.kill()
        raise
    return running


def until(condition, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def log_of(folder: Path, task: int) -> str:
    return "".join(file.read_text() for file in folder.glob(f"out/jobs/*/{task}.log"))
