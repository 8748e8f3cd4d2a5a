"""Nothing from a file is executed, no shell is asked, nothing secret is shown."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from record_factory import check

import suite
from suite.cli import ACTIONS, main
from suite.errors import RankError, UsageError
from suite.harness.sweep import read_sweep
from suite.records import from_json, to_json
from suite.secrets import mask, names_a_secret

SOURCES = sorted(Path(suite.__file__).parent.rglob("*.py"))
FORBIDDEN = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "eval", "exec", "os.system",
    "os.popen",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "subprocess.getoutput", "subprocess.getstatusoutput",
    "tempfile.mktemp", "dcp.FileSystemReader", "time.time", "time.time_ns", "datetime.utcnow",
}  # fmt: skip
"""`time.time`: durations come from clocks that do not jump, and moments from `datetime.now(UTC)`."""


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_code_from_files_no_shells_and_no_durations_from_the_wall_clock(path: Path) -> None:
    for name, call in calls(path):
        where = f"{path.name}:{call.lineno}: {ast.unparse(call)}"
        keywords = {item.arg: item.value for item in call.keywords}
        compares_clocks = name == "time.time" and path.name == "cluster_doctor.py"
        assert name not in FORBIDDEN or compares_clocks, where
        assert "shell" not in keywords, where
        if name == "torch.load":
            assert ast.unparse(keywords["weights_only"]) == "True", where
        if name == "np.load":
            assert ast.unparse(keywords["allow_pickle"]) == "False", where
        if name.startswith("subprocess."):
            first = call.args[0]
            assert not isinstance(first, (ast.JoinedStr, ast.Constant, ast.BinOp)), where


KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def secret(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    return KEY


def test_secrets_are_masked_and_other_settings_are_not(secret: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh")
    monkeypatch.setenv("MONKEY", "not a secret")
    monkeypatch.setenv("MY_TOKEN", "true")  # too short to be one: it would black out half of any text
    text = f"{secret} hf_abcdefgh not a secret true https://me:pass@host/x https://host/x"
    assert mask(text) == "*** *** not a secret true https://***@host/x https://host/x"


@pytest.mark.parametrize(
    ("variable", "secret"),
    [
        *((name, True) for name in ("PGPASSWORD", "SSHPASS", "MYSQL_PWD", "ACCESSTOKEN", "OPENAI_APIKEY")),
        *(
            (name, False)
            for name in ("PWD", "OLDPWD", "ORIG_PWD", "TOKENIZERS_PARALLELISM", "MONKEY", "NCCL_BYPASS")
        ),
    ],
)
def test_names_of_secrets_are_known_with_and_without_underscores(variable: str, secret: bool) -> None:
    assert names_a_secret(variable) == secret


def test_a_record_holds_no_secret(secret: str) -> None:
    record = replace(check(), notes=[f"key {secret}"], config={"wandb": {"project": secret}})
    assert secret not in to_json(record)
    assert from_json(to_json(record)).notes == ["key ***"]


def test_errors_and_what_ranks_printed_show_no_secret(
    secret: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(parsed: object) -> int:
        raise RankError(f"rank 1 failed: {secret}", 1, f"Traceback …\n{secret}")

    monkeypatch.setitem(ACTIONS, "doctor", fails)
    assert main(["doctor"]) == 3
    printed = capsys.readouterr()
    assert secret not in printed.out + printed.err and printed.err.count("***") == 2


def test_a_sweep_file_cannot_choose_where_results_go(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("stages: [{impls: [ddp], base: {out: /tmp/elsewhere}}]")
    with pytest.raises(UsageError, match="out=/tmp/elsewhere has no meaning in a sweep"):
        read_sweep(file)


@pytest.mark.parametrize("name", ["../../evil", "/etc/passwd", "a/b", "", ".hidden", "a\0b"])
def test_a_record_cannot_name_a_file_elsewhere(name: str) -> None:
    line = json.dumps(json.loads(to_json(check())) | {"impl": name})
    with pytest.raises(UsageError, match="not a result record"):
        from_json(line)
