"""Whatever stands in a configuration, a sweep file, a record or a checkpoint: a clear line, no traceback."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from record_factory import check, run
from test_checkpoint import make

from suite.cli import main
from suite.config import ClusterConfig, Config
from suite.config_load import key_names, load
from suite.errors import SuiteError, UsageError
from suite.harness.sweep import read_sweep
from suite.impls.registry import parse_options
from suite.impls.sharded import checkpoint, manifest
from suite.records import from_json, read, to_json

OPTIONS = ["impl.options.partition_size", "impl.options.prefetch_mb"]
KEYS = [*key_names(Config(cluster=ClusterConfig())), *OPTIONS]
NASTY = [
    "",
    "???",
    "${oc.env:HOME}",
    "${impl.name}",
    "null",
    "nan",
    "-inf",
    "1e999",
    "[",
    "{a: b",
    "a\nb",
    "!!python/name:os.system",
    "../../etc/passwd",
    "\x1b[2J",
    "0x10",
    "2001-01-01",
    "-1",
    "0",
    "1" * 400,
    "hf:",
    "mics",
    "bert-tiny",
]

texts = st.text(max_size=12) | st.sampled_from(NASTY)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(KEYS) | texts
FEW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@contextmanager
def one_clear_line_at_most() -> Iterator[None]:
    """Anything but a SuiteError of one printable line goes through and fails the test."""
    try:
        yield
    except SuiteError as error:
        assert str(error) and str(error).isprintable()


def tried(config: Config) -> None:
    """What the command does with a configuration before it starts anything."""
    assert config.to_dict() and config.hash()
    parse_options(config.impl.name, config.impl.options, config.world_size, config.ranks_per_node)


@FEW
@given(st.lists(st.builds("{}={}".format, keys, texts) | texts, max_size=4))
@example(["impl.options=3"])
@example(["impl=[a,b]", "impl.options.x=1"])
@example(["workload.model.layers=${oc.env:HOME}"])
@example(["cluster.nodes=2", "cluster=null"])
def test_words_of_a_command_line(words: list[str]) -> None:
    with one_clear_line_at_most():
        tried(load(words))


@FEW
@given(st.dictionaries(keys, values, max_size=3))
def test_nested_configurations(content: dict[str, Any]) -> None:
    with one_clear_line_at_most():
        tried(load(content))


stages = st.fixed_dictionaries(
    {},
    optional={
        "name": values,
        "kind": st.sampled_from(["run", "check", "project"]) | values,
        "impls": st.just(["ddp"]) | values,
        "base": st.dictionaries(keys, values, max_size=2) | values,
        "grid": st.dictionaries(keys, values, max_size=2) | values,
    },
)


sweeps = st.dictionaries(st.just("stages"), st.lists(stages | values, max_size=2) | values, max_size=1)


@FEW
@given(sweeps.map(yaml.safe_dump) | st.text(max_size=60))
@example("stages: [{impls: [ddp], base: {? [a, b] : 1}}]")
@example("stages: &a [*a]")
@example("stages: [{impls: [!!python/object/apply:os.system ['touch executed']]}]")
@example("stages: [{impls: [ddp], base: {out: /tmp/elsewhere}}]")
def test_sweep_files(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder, one_clear_line_at_most():
        file = Path(folder) / "sweep.yaml"
        file.write_bytes(text.encode(errors="surrogatepass"))
        for cohort in read_sweep(file):
            for cell in cohort.cells:
                tried(cell)


RECORDS = [json.loads(to_json(check())), json.loads(to_json(run()))]


@st.composite
def damaged_records(draw: st.DrawFn) -> dict[str, Any]:
    """A good record with a few places changed, anywhere in it."""
    record = copy.deepcopy(draw(st.sampled_from(RECORDS)))
    for _ in range(draw(st.integers(1, 3))):
        place = record
        while True:
            key = draw(st.sampled_from(sorted(place)))
            if not isinstance(place[key], dict) or not place[key] or draw(st.booleans()):
                break
            place = place[key]
        if draw(st.booleans()):
            place[key] = draw(values)
        else:
            del place[key]
        if not record:
            break
    return record


@FEW
@given(st.lists(damaged_records().map(lambda r: json.dumps(r).encode()) | st.binary(max_size=40), max_size=3))
@example([b"[" * 100_000])
@example([b"\xff\xfe"])
@example([json.dumps({**RECORDS[1], "impl": "../../evil"}).encode()])
def test_record_files(lines: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        file.write_bytes(b"\n".join(lines) + b"\n")
        with one_clear_line_at_most():
            for record in read(file):
                assert from_json(to_json(record)) is not None


@settings(FEW, max_examples=25)
@given(damaged_records())
def test_reports_of_records_that_were_let_in(record: dict[str, Any]) -> None:
    """What passes the door must not break the rooms behind it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        file.write_text(json.dumps(record) + "\n" + "".join(json.dumps(good) + "\n" for good in RECORDS))
        assert main(["report", folder, "--terminal"]) in (0, 2)
        assert main(["compare", folder, folder]) in (0, 2)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "a"
    model, optimizer, scheduler = make()
    checkpoint.save_plain(folder, model, optimizer, 1, scheduler)
    return folder


@settings(FEW, max_examples=80)
@given(st.data())
def test_metadata_of_checkpoints(saved: Path, data: st.DataObject) -> None:
    file = saved / manifest.TRAINING
    before = file.read_text()
    content = json.loads(before)
    place = content
    key = data.draw(st.sampled_from(sorted(place)))
    if key == "groups" and data.draw(st.booleans()):
        place = content["groups"][0]
        key = data.draw(st.sampled_from(sorted(place)) | texts)
    place[key] = data.draw(values)
    try:
        file.write_text(json.dumps(content))
        model, optimizer, scheduler = make()
        with one_clear_line_at_most():
            checkpoint.load_plain(saved, model, optimizer, scheduler)
            optimizer.zero_grad()
            model(torch.ones(4, 5)).sum().backward()
            optimizer.step()  # whatever was let in can be worked with
    finally:
        file.write_text(before)


def test_a_reference_to_the_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    with pytest.raises(UsageError, match="write the value itself"):
        load(["wandb.project=${oc.env:WANDB_API_KEY}"])


def test_the_factory_makes_what_is_fuzzed() -> None:
    assert all(asdict(from_json(json.dumps(record))) for record in RECORDS)
