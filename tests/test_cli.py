"""The command as a user types it: JSON alone on stdout, one line and a status for what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from suite import cli
from suite.cli import _overrides, main
from suite.harness.doctor import Finding
from suite.impls.registry import IMPLEMENTATIONS

SMALL = ["workload.model.layers=1", "workload.model.hidden=64", "workload.data=synthetic", "testbed.ranks=2"]


def suite(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "suite.cli", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=110, cwd=folder)


def test_a_run_prints_one_json_object_and_nothing_else(tmp_path: Path) -> None:
    done = suite("run", "impl=ddp", "--json", "train.steps=2", "train.warmup=0", *SMALL, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert (record["impl"], record["world_size"], record["step_time_s"]["n"]) == ("ddp", 2, 2)
    assert list(tmp_path.iterdir()) == []  # no `out`, no files


def test_a_check_says_ok_with_status_0_and_not_ok_with_status_1(tmp_path: Path) -> None:
    good = suite("check", "impl=ddp", *SMALL, "--json", folder=tmp_path)
    assert good.returncode == 0 and json.loads(good.stdout)["ok"] is True, good.stderr
    # The floor does not synchronise gradients: a check that let it pass would check nothing.
    bad = suite("check", "impl=floor", *SMALL, "--json", folder=tmp_path)
    assert bad.returncode == 1 and json.loads(bad.stdout)["ok"] is False, bad.stderr


def test_results_are_kept_in_the_folder_that_out_names(tmp_path: Path) -> None:
    words = ["impl=ddp", *SMALL, f"out={tmp_path}/kept", "wandb.mode=disabled"]
    assert suite("check", *words, folder=tmp_path).returncode == 0
    assert len((tmp_path / "kept" / "records.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "impl=ddb"], "unknown implementation 'ddb'; did you mean 'ddp'?"),
        (["run", "impl=ddp", "workload=bert-huge"], "unknown workload 'bert-huge'"),
        (["run", "impl=ddp", "train.step=3"], "did you mean 'train.steps'?"),
        (["run", "impl=ddp", "testbed=lokal"], "unknown testbed 'lokal'; did you mean 'local'?"),
        (["run", "impl=ddp", "impl.options.x=1"], "ddp has no options"),
        (["run", "impl=hsdp", "impl.options.partition=2"], "did you mean 'partition_size'?"),
        (["run", "impl=hsdp", "impl.options.partition_size=3"], "does not divide the 4 ranks"),
        (["run", "impl=ddp", "train.global_batch=10"], "does not divide by 4 ranks"),
        (["run", "impl=ddp", "workload.data=no/such/file"], "no/such/file"),
        (["check", "impl=ddp", "workload.data=hf:x"], "datasets"),
        (["sweep", "missing.yaml", "train.clip={"], "cannot read '{' as a value"),
        (["sweep", "missing.yaml", "workload.data=${oc.env:HOME}"], "write the value itself"),
        (["sweep", "missing.yaml", "workload.data=???"], "write the value itself"),
        (["sweep", "missing.yaml"], "there is no sweep file 'missing.yaml'"),
        (["report", "nowhere"], "there are no results in 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_status_2_with_nothing_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert "Traceback" not in printed.err and len(printed.err.strip().splitlines()) == 1
    assert printed.out == "" and list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short_says_how_much_is_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "short.txt"
    text.write_text("a few words only")
    assert main(["run", "impl=ddp", f"workload.data={text}"]) == 2
    assert "too short" in capsys.readouterr().err


def test_a_rank_that_hangs_ends_the_run_with_its_stack_and_status_3(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # A whole step in a tenth of a millisecond: every rank is too late.
    assert main(["run", "impl=ddp", *SMALL, "testbed.timeout_s=0.0001"]) == 3
    assert "made no progress for 0.0001 s in step" in capsys.readouterr().err


def test_the_doctor_lists_every_implementation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    for name in ("machine", *IMPLEMENTATIONS):
        assert name in printed


def test_what_wins_over_a_sweep_file_has_the_type_that_it_would_have_there() -> None:
    given = _overrides(
        ["impl.options.partition_size=4", "train.clip=0.5", "train.global_batch=null", "impl=ddp"]
    )
    assert given == {
        "impl.options.partition_size": 4,
        "train.clip": 0.5,
        "train.global_batch": None,
        "impl": "ddp",
    }


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """`nohup suite sweep … &` outlives the terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli._ended_in_order():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_not_markup_is_shown_as_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with cli._status("[/starting]") as say:
        say("rank 1: [/pytorch/third_party/gloo/transport/tcp/pair.cc:534] Connection closed")
    found = [Finding("deepspeed", False, "", "pip install 'sharded-training-suite[baselines]'")]
    monkeypatch.setattr("suite.harness.doctor.examine", lambda: found)
    monkeypatch.setattr(cli.stdout, "width", 200)
    assert main(["doctor"]) == 0
    assert "sharded-training-suite[baselines]" in capsys.readouterr().out


def test_a_reader_who_goes_away_is_told_by_the_status() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "suite.cli", "doctor"], stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert done.returncode == 141 and b"Traceback" not in done.stderr
