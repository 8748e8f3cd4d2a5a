"""The script for accelerators on a host that has none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from suite.records import CheckRecord, Record, read

ROOT = Path(__file__).resolve().parents[1]


def smoke(*arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [str(ROOT / "scripts/gpu_smoke.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)


def test_without_an_accelerator_it_says_so_in_one_line_and_writes_nothing(tmp_path: Path) -> None:
    done = smoke("--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("gpu_smoke: no accelerator was found") and "--cpu" in line
    assert not (tmp_path / "out").exists()


def test_a_wrong_argument_is_bad_usage() -> None:
    done = smoke("--gpu")
    assert done.returncode == 2 and "unknown argument '--gpu'" in done.stderr
    assert smoke("--out").returncode == 2


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_reduced_form_goes_through_all_steps_on_the_cpu(tmp_path: Path) -> None:
    done = smoke("--cpu", "--out", str(tmp_path), timeout_s=1100)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = read(tmp_path / "records.jsonl")
    assert all(record.ok for record in records if isinstance(record, CheckRecord))
    assert {"zero3", "mics", "deepspeed-mics", "hsdp"} <= {r.impl for r in records if isinstance(r, Record)}
