"""What W&B gets, read back from the files of offline runs; and what happens when it misbehaves."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import record_factory as factory
from wandb_files import read_runs, run_files
from wandb_server import wandb_server

from suite.config import WandbConfig
from suite.records import append, read
from suite.reports import wandb_log
from suite.reports.cohorts import flat
from suite.reports.metrics import per_step
from suite.reports.wandb_log import log_records

pytest.importorskip("wandb")

SECRET = "0123456789abcdef" * 2 + "01234567"
"""As long as a real key."""


def results(folder: Path, *records: Any) -> Path:
    for record in records:
        append(folder / "records.jsonl", record)
    return folder


def log(folder: Path, compare: bool = False, **options: Any) -> str | None:
    return log_records(folder, WandbConfig(**options), compare)


def files_with(secret: str, folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """A folder with two logged runs, a check, and their comparison."""
    folder = tmp_path_factory.mktemp("sweep-7")
    results(folder, factory.run("ddp"), factory.run("mics", stage="throughput"), factory.check("mics"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        assert log(folder, compare=True) is None
    return folder


def test_an_offline_run_holds_the_whole_configuration_the_record_and_every_step(logged: Path):
    found = read_runs(logged)["mics"]
    record = factory.run("mics", stage="throughput")
    assert {key: found.config[key] for key in record.config} == record.config
    assert found.summary["step_time_s"]["median"] == record.step_time_s.median
    kept = json.loads((logged / "records.jsonl").read_text().splitlines()[1])
    curves = ("config", "losses", "grad_norms", "step_times_s")
    for key in kept.keys() - set(curves):
        assert found.summary.get(key) == kept[key], key
    assert [row["train/loss"] for row in found.history] == record.losses
    assert [row["train/grad_norm"] for row in found.history] == record.grad_norms
    times = [row["perf/step_time_s"] for row in found.history if "perf/step_time_s" in row]
    assert times == record.step_times_s
    assert found.exit_code == 0


def test_runs_are_grouped_by_sweep_typed_by_implementation_and_tagged_with_testbed_and_evidence(logged: Path):
    found = read_runs(logged)
    assert set(found) == {"ddp", "mics", "comparison"}
    run = found["mics"].run
    assert (run.run_group, run.project) == (logged.name, "sharded-data-parallel")
    assert set(run.tags) == {"local", "measured"}


def test_every_metric_has_the_training_step_as_its_axis(logged: Path):
    found = read_runs(logged)["mics"]
    axes = {metric.name or metric.glob_name: metric.step_metric for metric in found.metrics}
    assert axes["*"] == "train/step" or set(axes.values()) == {"train/step"}
    assert [row["train/step"] for row in found.history] == list(range(1, len(found.history) + 1))
    names = {key for row in found.history for key in row if not key.startswith("_")}
    assert all(key.startswith(("train/", "perf/")) for key in names)


def test_four_ranks_are_one_run_without_system_metrics_of_any_process(logged: Path):
    assert factory.run("mics").world_size == 4
    assert len(run_files(logged)) == 3
    assert all("stats" not in run.kinds for run in read_runs(logged).values())


def test_the_comparison_holds_the_tables_and_every_file_of_the_report(logged: Path):
    found = read_runs(logged)["comparison"]
    assert {"local", "measured"} == set(found.run.tags)
    logged_tables = {key for row in found.history for key in row if key.startswith("table/")}
    assert {key.split("/")[1] for key in logged_tables} >= {"claims", "runs", "overview"}
    (report,) = [artifact for artifact in found.artifacts if artifact.type == "report"]
    entries = {entry.path: Path(entry.local_path) for entry in report.manifest.contents}
    assert {"index.html", "claims.json", "figures/c1-step-time.svg", "figures/c1-step-time.csv"} <= set(
        entries
    )
    # A later `wandb sync` reads them from where they lie: inside the result folder.
    assert all(path.is_file() and logged in path.parents for path in entries.values())


def test_a_table_of_the_comparison_has_a_row_per_run(logged: Path):
    (file,) = logged.glob("wandb/offline-run-*/files/media/table/table/runs_*.table.json")
    table = json.loads(file.read_text())
    assert len(table["data"]) == 2
    row = dict(zip(table["columns"], table["data"][0], strict=True))
    assert row["implementation"] in ("ddp", "mics") and row["evidence"] == "measured"


def test_no_key_is_written_and_offline_runs_are_small(logged: Path):
    assert files_with(SECRET, logged) == []
    single = [path for path in logged.glob("wandb/offline-run-*/*.wandb")]
    assert sum(path.stat().st_size for path in single) < 300_000


def test_logged_records_are_not_logged_again_but_new_ones_are(tmp_path: Path):
    folder = results(tmp_path, factory.run("ddp"))
    assert log(folder) is None
    before = run_files(folder)
    assert log(folder) is None
    assert run_files(folder) == before
    # Of another cohort, though it was started in the same second.
    results(folder, replace(factory.run("ddp"), cohort="2026-03-01T10:00:00+00:00/bert-tiny/2"))
    assert log(folder) is None
    assert len(run_files(folder)) == len(before) + 1


def test_disabled_writes_nothing(tmp_path: Path):
    results(tmp_path, factory.run("ddp"))
    assert log(tmp_path, mode="disabled") is None
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_folder_without_records_is_nothing_to_log(tmp_path: Path):
    assert log(tmp_path) is None


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results(tmp_path, factory.run("ddp"))
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: None)
    message = log(tmp_path)
    assert message and "not installed" in message and "\n" not in message


def test_what_is_sent_is_everything_and_is_sent_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    record = factory.run("mics")
    folder = results(tmp_path / "results", record)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with wandb_server() as (address, received):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        assert log(folder, mode="online", compare=True) is None
        assert log(folder, mode="online", compare=True) is None
    assert os.listdir() == [] and files_with(SECRET, folder) == []
    mics, comparison = (
        next(key for key, run in received.runs.items() if run.get("jobType") == kind)
        for kind in ("mics", "comparison")
    )
    assert set(received.runs) == {mics, comparison}
    run = received.runs[mics]
    assert (run["groupName"], set(run["tags"])) == (folder.name, {"local", "measured"})
    config = {key: item["value"] for key, item in json.loads(run["config"]).items() if key != "_wandb"}
    assert _leaves(config) == _leaves(record.config)
    assert [row["train/loss"] for row in received.history[mics]] == record.losses
    assert received.summary[mics]["step_time_s"]["median"] == record.step_time_s.median
    # The comparison's artifacts are whole on the other side: every file of the report, byte by byte.
    (key,) = [key for key, item in received.artifacts.items() if item["artifactTypeName"] == "report"]
    assert key in received.committed
    (page,) = folder.glob("wandb/reports/*/index.html")
    for file in (path for path in page.parent.rglob("*") if path.is_file()):
        assert received.files[f"{key}/{file.relative_to(page.parent)}"] == file.read_bytes()


def _leaves(tree: dict[str, Any]) -> dict[str, Any]:
    """W&B's sync leaves out a mapping that is empty."""
    return {key: value for key, value in flat(tree).items() if value != {}}


@pytest.fixture
def dead_server():
    """An address at which connections are accepted and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_an_outage_loses_nothing_and_ends_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead_server: str
):
    monkeypatch.setenv("WANDB_BASE_URL", dead_server)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    folder = results(tmp_path / "results", factory.run("ddp"))
    started = time.monotonic()
    message = log_records(folder, WandbConfig(mode="online"), sync_timeout_s=4)
    assert time.monotonic() - started < 60
    assert message and "not sent" in message and f"wandb sync {folder}/wandb" in message
    assert "\n" not in message and SECRET not in message
    assert len(read_runs(folder)["ddp"].history) == len(factory.run("ddp").losses)
    assert files_with(SECRET, folder) == []


def test_a_refused_connection_or_a_missing_login_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    folder = results(tmp_path / "results", factory.run("ddp"))
    message = log_records(folder, WandbConfig(mode="online"), sync_timeout_s=20)
    assert message and "not sent" in message


def test_a_server_that_refuses_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = results(tmp_path / "results", factory.run("ddp"))
    with wandb_server(status=403) as (address, _):
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", SECRET)
        message = log_records(folder, WandbConfig(mode="online"), sync_timeout_s=20)
    assert message and "not sent" in message and SECRET not in message


@pytest.mark.slow
def test_a_measurement_with_a_key_and_no_server_is_measured_kept_and_silent_about_the_key(
    tmp_path: Path, dead_server: str
):
    command = [sys.executable, "-m", "suite.cli", "run", "impl=floor", "testbed.ranks=2", "train.steps=2"]
    command += ["workload.model.layers=1", "workload.data=synthetic", f"out={tmp_path}/kept"]
    environment = {**os.environ, "WANDB_API_KEY": SECRET, "WANDB_BASE_URL": dead_server}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert done.returncode == 0, done.stderr
    (record,) = read(tmp_path / "kept" / "records.jsonl")
    report = [sys.executable, "-m", "suite.cli", "report", f"{tmp_path}/kept", "--out", f"{tmp_path}/report"]
    shown = subprocess.run(report, capture_output=True, text=True, timeout=100, env=environment)
    assert shown.returncode == 0, shown.stderr
    assert record.impl == "floor" and set(read_runs(tmp_path / "kept")) == {"floor"}
    assert files_with(SECRET, tmp_path) == []
    assert all(SECRET not in text for text in (done.stdout, done.stderr, shown.stdout, shown.stderr))


def test_the_message_of_a_failure_never_shows_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    raising = "raise RuntimeError('bad key ' + os.environ['WANDB_API_KEY'])"
    body = f"import os\ndef init(**_):\n    {raising}\nSettings = dict\n"
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    monkeypatch.setenv("PYTHONPATH", broken_wandb(tmp_path / "bad", body))
    message = log(results(tmp_path / "results", factory.run("ddp")))
    assert message and "bad key ***" in message and SECRET not in message


def broken_wandb(folder: Path, body: str) -> str:
    """A package of that name that behaves badly; returns what to put on PYTHONPATH."""
    folder.mkdir()
    (folder / "wandb.py").write_text(body)
    return str(folder)


def test_a_failure_is_one_line_and_the_next_call_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    body = "def init(**_):\n    print('noise')\n    raise RuntimeError('server said no')\nSettings = dict\n"
    folder = results(tmp_path / "results", factory.run("ddp"))
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", broken_wandb(tmp_path / "bad", body))
        message = log(folder)
    assert message and "server said no" in message and "\n" not in message
    assert capfd.readouterr() == ("", "")
    assert log(folder) is None
    assert len(run_files(folder)) == 1


def test_a_hanging_service_is_ended_with_everything_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pid_file = tmp_path / "pid"
    body = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([{sys.executable!r}, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", broken_wandb(tmp_path / "bad", body))
    folder = results(tmp_path / "results", factory.run("ddp"))
    message = log_records(folder, WandbConfig(), timeout_s=3)
    assert message and "no answer within 3 s" in message
    assert _is_gone(int(pid_file.read_text()))


def _is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_losses_that_are_no_numbers_are_left_out_of_the_curves():
    record = factory.run("ddp")
    rows = per_step(replace(record, losses=[None, *record.losses[1:]]))  # type: ignore[list-item]
    assert "train/loss" not in rows[0] and "train/grad_norm" in rows[0]
    assert all(math.isfinite(value) for row in rows for value in row.values())
