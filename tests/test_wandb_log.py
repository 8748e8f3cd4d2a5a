from __future__ import annotations

import json
import math
import os
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import record_factory as factory

from suite.records import append
from suite.reports import wandb_log
from suite.reports.wandb_log import log_records

pytest.importorskip("wandb")

SECRET = "0123456789abcdef" * 3


def results(folder: Path, *records: Any) -> Path:
    for record in records:
        append(folder / "records.jsonl", record)
    return folder


def messages(file: Path) -> Iterator[bytes]:
    """The messages of a W&B file: a LevelDB log (blocks of 32 KiB) after a 7-byte header."""
    data, position, message = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # too short for a chunk's header: padding
            position += left
            continue
        length, kind = struct.unpack_from("<HB", data, position + 4)
        message += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole message, or its last chunk
            yield message
            message = b""


def read_run(file: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], Any]:
    """config, summary, history rows and the run message of an offline run file."""
    from wandb.proto import wandb_internal_pb2

    def name(item: Any) -> str:
        return item.key or "/".join(item.nested_key)

    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history, run = [], None
    for data in messages(file):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(data)
        if message.HasField("run"):
            run = message.run
            config.update({item.key: json.loads(item.value_json) for item in run.config.update})
        summary.update({name(item): json.loads(item.value_json) for item in message.summary.update})
        if message.HasField("history"):
            history.append({name(item): json.loads(item.value_json) for item in message.history.item})
    return config, summary, history, run


def run_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> Path:
    """A folder with two logged runs and a check."""
    folder = tmp_path_factory.mktemp("sweep-7")
    results(folder, factory.run("ddp"), factory.run("mics"), factory.check("mics"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        assert log_records(folder) is None
    return folder


def test_an_offline_run_holds_config_summary_and_every_step(logged: Path):
    found = {read_run(file)[3].job_type: read_run(file) for file in run_files(logged)}
    config, summary, history, run = found["mics"]
    record = factory.run("mics")
    assert set(found) == {"ddp", "mics"}
    assert {key: config[key] for key in record.config} == record.config
    assert summary["step_time_s.median"] == record.step_time_s.median
    assert summary["evidence"] == "measured"
    assert [row["train/loss"] for row in history] == record.losses
    assert [row["train/step"] for row in history] == list(range(1, len(record.losses) + 1))
    times = [row["perf/step_time_s"] for row in history if "perf/step_time_s" in row]
    assert times == record.step_times_s
    assert (run.run_group, run.project) == (logged.name, "sharded-data-parallel")
    assert set(run.tags) == {"local", "measured"}


def test_no_key_is_written_and_offline_runs_are_small(logged: Path):
    files = [path for path in logged.rglob("*") if path.is_file()]
    assert all(SECRET.encode() not in path.read_bytes() for path in files)
    assert sum(path.stat().st_size for path in files) < 100_000


def test_logged_records_are_not_logged_again_but_new_ones_are(logged: Path):
    before = run_files(logged)
    assert log_records(logged) is None
    assert run_files(logged) == before
    results(logged, replace(factory.run("ddp"), started_at="2026-03-05T00:00:00+00:00"))
    assert log_records(logged) is None
    assert len(run_files(logged)) == len(before) + 1


def test_disabled_writes_nothing(tmp_path: Path):
    results(tmp_path, factory.run("ddp"))
    assert log_records(tmp_path, mode="disabled") is None
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_folder_without_records_is_nothing_to_log(tmp_path: Path):
    assert log_records(tmp_path) is None


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    results(tmp_path, factory.run("ddp"))
    monkeypatch.setattr(wandb_log.importlib.util, "find_spec", lambda name: None)
    message = log_records(tmp_path)
    assert message and "not installed" in message and "\n" not in message


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
        message = log_records(folder)
    assert message and "server said no" in message and "\n" not in message
    assert capfd.readouterr() == ("", "")
    assert log_records(folder) is None
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
    message = log_records(folder, timeout_s=3)
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
    rows = wandb_log._per_step(replace(record, losses=[None, *record.losses[1:]]))  # type: ignore[list-item]
    assert "train/loss" not in rows[0] and "train/grad_norm" in rows[0]
    assert all(math.isfinite(value) for row in rows for value in row.values())
