"""Event files, read back with TensorBoard's own reader."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import record_factory as factory

from suite import cli
from suite.errors import UsageError
from suite.records import append
from suite.reports.tensorboard_log import export_tensorboard

pytest.importorskip("tensorboard")


def read_back(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()


def test_every_run_has_its_curves_under_the_names_that_wandb_gets(tmp_path: Path):
    record = factory.run("mics")
    (folder,) = export_tensorboard([record, factory.check("mics"), factory.projection()], tmp_path)
    found = read_back(folder)
    assert [event.step for event in found.Scalars("train/loss")] == list(range(1, len(record.losses) + 1))
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(record.losses)
    times = [event.value for event in found.Scalars("perf/step_time_s")]
    assert times == pytest.approx(record.step_times_s)
    (median,) = found.Scalars("result/step_time_s.median")
    assert median.value == pytest.approx(record.step_time_s.median)


def test_configuration_and_results_are_hyperparameters_to_compare_runs_by(tmp_path: Path):
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    (folder,) = export_tensorboard([factory.run("mics", options={"partition_size": 2})], tmp_path)
    content = read_back(folder).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    parameters = HParamsPluginData.FromString(content).session_start_info.hparams
    assert parameters["impl.name"].string_value == "mics"
    assert parameters["impl.options.partition_size"].number_value == 2


def test_runs_of_one_configuration_do_not_share_a_folder_and_writing_again_adds_nothing(tmp_path: Path):
    runs = [factory.run("ddp"), replace(factory.run("ddp"), started_at="2026-03-05T00:00:00+00:00")]
    folders = export_tensorboard(runs, tmp_path)
    assert export_tensorboard(runs, tmp_path) == folders and len(set(folders)) == 2
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 1]


def test_results_without_runs_are_refused(tmp_path: Path):
    with pytest.raises(UsageError, match="no timed runs"):
        export_tensorboard([factory.check("ddp")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_to_look_at_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    append(tmp_path / "results" / "records.jsonl", factory.run("ddp"))
    assert cli.main(["report", str(tmp_path / "results"), "--tensorboard", str(tmp_path / "tb")]) == 0
    assert f"tensorboard --logdir {tmp_path}/tb" in capsys.readouterr().out
