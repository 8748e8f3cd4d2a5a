"""The command under fire: interrupted, without disk, on a machine whose clock jumps. Real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Place, becomes_true, descendants, place

from suite.records import read
from suite.testbeds import network

SWEEP = """
stages:
  - name: times
    kind: run
    impls: [zero3]
    base:
      workload: {name: bert-tiny, data: synthetic, model: {layers: 1, hidden: 32, heads: 2, intermediate: 32}}
      testbed: {ranks: 2}
      train: {warmup: 0, steps: 2}
    grid:
      train.seed: [1, 2, 3]
"""
TINY = [
    "workload.data=synthetic",
    "workload.model.layers=1",
    "workload.model.hidden=32",
    "workload.model.heads=2",
    "workload.model.intermediate=32",
    "testbed.ranks=2",
    "train.warmup=0",
    "train.steps=2",
]


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as found:
        (tmp_path / "sweep.yaml").write_text(SWEEP)
        yield found


def start(here: Place, *words: str, **more: str) -> subprocess.Popen[str]:
    return start_command(here, sys.executable, "-m", "suite.cli", *words, **more)


def start_command(here: Place, *command: str, **more: str) -> subprocess.Popen[str]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup the command would ignore it, too
    try:
        return subprocess.Popen(
            command,
            cwd=here.folder,
            env=here.environment(**more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGHUP, before)


def finish(process: subprocess.Popen[str], timeout_s: float = 90) -> tuple[int, str]:
    _, errors = process.communicate(timeout=timeout_s)
    return process.returncode, errors


def run(here: Place, *words: str, **more: str) -> tuple[int, str]:
    return finish(start(here, *words, **more))


def records(here: Place) -> int:
    file = here.folder / "out" / "records.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


SWEEPING = ("sweep", "sweep.yaml", "--out", "out", "wandb.mode=disabled")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(number, id=number.name, marks=[] if number is signal.SIGINT else pytest.mark.slow)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL)
    ],
)
def test_an_interrupted_sweep_leaves_finished_results_and_nothing_else(
    here: Place, number: signal.Signals
) -> None:
    process = start(here, *SWEEPING)
    # In the middle of the second cell: the first is recorded, ranks are running.
    assert becomes_true(lambda: records(here) == 1 and len(descendants(process.pid)) >= 2, 60)
    interrupted = time.monotonic()
    os.kill(process.pid, number)
    status, errors = finish(process)
    assert time.monotonic() - interrupted < 15
    assert here.left_behind() == []
    if number is not signal.SIGKILL:
        assert status == 130 and "interrupted; finished results are kept" in errors
        assert "Traceback" not in errors
    kept = read(here.folder / "out" / "records.jsonl")
    assert 1 <= len(kept) < 3
    status, errors = run(here, *SWEEPING)
    assert status == 0 and f"{3 - len(kept)} cells run, {len(kept)} were finished before" in errors
    assert read(here.folder / "out" / "records.jsonl")[: len(kept)] == kept


@pytest.mark.slow
def test_an_impatient_second_interrupt_leaves_nothing_either(here: Place) -> None:
    process = start(here, *SWEEPING)
    assert becomes_true(lambda: len(descendants(process.pid)) >= 2, 60)
    for _ in range(3):
        os.kill(process.pid, signal.SIGINT)
        time.sleep(0.01)
    assert finish(process)[0] != 0
    assert here.left_behind() == []


@pytest.mark.skipif(network.why_not() is not None, reason=f"no emulated networks here: {network.why_not()}")
def test_a_killed_emulated_cluster_leaves_no_namespaces(here: Place) -> None:
    before = namespaces()
    words = ("testbed=emulated", "cluster=p3dn", "workload=bert-scale", "impl=floor", "testbed.nodes=3")
    process = start(here, "run", *words, "workload.model.layers=1", "train.steps=200")
    assert becomes_true(lambda: len(namespaces() - before) >= 3, 60)
    os.kill(process.pid, signal.SIGKILL)
    finish(process)
    assert here.left_behind() == []
    assert becomes_true(lambda: namespaces() <= before)


def namespaces() -> set[str]:
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(link))
        except OSError:
            continue  # ended meanwhile, or another user's
    return found


@pytest.mark.slow
def test_a_disk_that_fills_up_while_recording_keeps_what_is_there_and_shows_the_rest(here: Place) -> None:
    (here.folder / "first.yaml").write_text(SWEEP.replace("[1, 2, 3]", "[1]"))
    assert run(here, "sweep", "first.yaml", *SWEEPING[2:])[0] == 0
    file = here.folder / "out" / "records.jsonl"
    before = file.read_bytes()
    limited = (
        "import resource, sys; from suite.cli import main; "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 100}, -1)); sys.exit(main())"
    )
    status, errors = finish(start_command(here, sys.executable, "-c", limited, *SWEEPING))
    assert status == 3, errors
    assert "cannot write to out/records.jsonl: File too large" in errors and "Traceback" not in errors
    assert file.read_bytes() == before  # no half line
    shown = [line for line in errors.splitlines() if line.startswith("{")]
    assert shown and json.loads(shown[0])["config"]["train"]["seed"] == 2  # the result is not lost
    assert here.left_behind() == []
    assert run(here, *SWEEPING)[0] == 0  # with room again it goes on


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    try_it = ["unshare", "-Urm", "mount", "-t", "tmpfs", "-o", "size=16k", "none", "/mnt"]
    return subprocess.run(try_it, capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount(), reason="no user namespaces with mounts here")
def test_a_file_system_without_room_is_an_error_in_one_line(here: Place) -> None:
    (here.folder / "out").mkdir()
    script = (
        "mount -t tmpfs -o size=16k none out && head -c 14k /dev/zero > out/filler;"
        f" exec {sys.executable} -m suite.cli run impl=zero3 out=out wandb.mode=disabled {' '.join(TINY)}"
    )
    status, errors = finish(start_command(here, "unshare", "-Urm", "sh", "-c", script))
    assert status == 3, errors
    assert "cannot write to out/records.jsonl: No space left on device" in errors
    assert "Traceback" not in errors and here.left_behind() == []


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_is_an_error_in_one_line(here: Place) -> None:
    status, errors = run(here, "run", "impl=ddp", *TINY, "out=/proc/nowhere", "wandb.mode=disabled")
    assert status == 3 and "cannot write to /proc/nowhere/records.jsonl" in errors
    assert "Traceback" not in errors


def test_a_port_that_the_environment_names_may_be_in_use(here: Place) -> None:
    """Left over from a job script, say: the testbed brings its own."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": "7", "WORLD_SIZE": "9"}
        status, errors = run(here, "run", "impl=zero3", *TINY, **job)
    assert status == 0, errors


@pytest.mark.slow
def test_two_runs_at_the_same_time_do_not_meet(here: Place) -> None:
    both = [start(here, "run", "impl=zero3", *TINY) for _ in range(2)]
    for process in both:
        status, errors = finish(process)
        assert status == 0, errors


JUMPING_CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/time.h>
#include <time.h>

/* Another hour back or forth at every look. */
static long jump(void) { static long looks; return (++looks % 2 ? 1 : -1) * 3600 * (looks % 7); }

int clock_gettime(clockid_t id, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int status = real(id, at);
    if (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE) at->tv_sec += jump();
    return status;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs a C compiler")
def test_a_clock_that_jumps_changes_no_duration(here: Place) -> None:
    """For the whole process, torch and gloo included: the C library's clock is replaced."""
    source, library = here.folder / "clock.c", here.folder / "clock.so"
    source.write_text(JUMPING_CLOCK)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    code = "import time; at = time.time(); print(max(abs(time.time() - at) for _ in range(9)))"
    environment = here.environment(LD_PRELOAD=str(library))
    jumped = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert float(jumped.stdout) > 3000  # it does jump
    begun = time.monotonic()
    status, errors = run(here, *SWEEPING, LD_PRELOAD=str(library))
    took = time.monotonic() - begun
    assert status == 0, errors
    found = read(here.folder / "out" / "records.jsonl")
    assert len(found) == 3 and len({record.cohort for record in found}) == 3  # type: ignore[union-attr]
    for record in found:
        assert all(0 < seconds < took for seconds in record.step_times_s)  # type: ignore[union-attr]
    assert here.left_behind() == []
