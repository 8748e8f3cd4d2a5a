"""Sweeps for a long time while things go wrong at random: `make soak`, or `python tests/soak.py --minutes 2`.

A sweeper (a process of its own, long-lived, so that a leak in it would show) runs one small sweep after the
other. This process is the saboteur: it kills, stops and interrupts, cuts and scribbles on files, and
takes the disk away, then looks for what was left behind. At the end an undisturbed sweep must find every cell
finished exactly once or finish it. Prints one JSON object; exit status 1 when anything is not as it should.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path

from faults import Place, becomes_true, descendants, place, processes_with

from suite.records import RECORDS, read

CELLS = 4
RANKS = 2
HANG_S = 3
START_S = 15
"""A rank that is stopped before its first step is given up after this."""
STAGE = """
stages:
  - name: "{name}"
    kind: run
    impls: [zero3, ddp]
    base:
      workload:
        {{name: bert-tiny, data: synthetic, model: {{layers: 2, hidden: 32, heads: 2, intermediate: 32}}}}
      testbed: {{ranks: {ranks}, timeout_s: {hang_s}, startup_timeout_s: {start_s}}}
      train: {{warmup: 0, steps: 3}}
    grid:
      train.seed: [{seeds}]
"""
ROOM_BYTES = 1_000
"""How much further files may grow while the disk is full."""
RESUMED = 12
"""Unfinished sweeps that are finished at the end, undisturbed."""


def sweeper(folder: Path) -> None:
    """Sweep after sweep in this process, from the first unfinished one, until it is told to end; a line of
    JSON on stdout after each."""
    from suite.errors import SuiteError
    from suite.harness.sweep import read_sweep, run_sweep
    from suite.testbeds.forked import stay_forkable

    stay_forkable()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    recorded = Counter(record.stage for record in read(folder / RECORDS))
    for number in count():
        if recorded[stage_name(number)] == CELLS:
            continue
        file = sweep_file(folder, number)
        if not file.exists():
            file.write_text(sweep_text(number))
        try:
            outcome = run_sweep(read_sweep(file), folder)
            said: dict[str, object] = {
                "finished": len(outcome.finished),
                "skipped": outcome.skipped,
                "failed": [str(failure.error) for failure in outcome.failures],
            }
        except SuiteError as error:
            said = {"error": str(error)}
        usage = {"rss": resident_bytes(), "descriptors": len(os.listdir("/proc/self/fd"))}
        print(json.dumps({"sweep": number, **said, **usage}), flush=True)


def sweep_file(folder: Path, number: int) -> Path:
    return folder / f"sweep-{number}.yaml"


def stage_name(number: int) -> str:
    return f"soak {number}"


def sweep_text(number: int) -> str:
    seeds = ", ".join(str(CELLS // 2 * number + index) for index in range(CELLS // 2))
    return STAGE.format(name=stage_name(number), seeds=seeds, ranks=RANKS, hang_s=HANG_S, start_s=START_S)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@dataclass
class Finding:
    """What the saboteur saw: `faults` by kind, `problems` in sentences (none when all is well)."""

    minutes: float = 0.0
    sweeps: int = 0
    resumed: int = 0
    starts: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    records: int = 0
    failures_reported: int = 0
    slowest_end_s: float = 0.0
    rss_growth_mb_per_100_sweeps: float = 0.0
    descriptors: list[int] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Saboteur:
    def __init__(self, here: Place, chance: random.Random) -> None:
        self.here = here
        self.chance = chance
        self.found = Finding()
        self.results = here.folder / "results"
        self.results.mkdir()
        self.lives: list[list[dict]] = []
        """What each sweeper said, the present one last."""
        self.process = self.start()

    def start(self) -> subprocess.Popen[str]:
        self.found.starts += 1
        self.lives.append([])
        self.output = (self.here.folder / f"sweeper-{self.found.starts}.out").open("w+")
        return subprocess.Popen(
            [sys.executable, __file__, "--sweeper", str(self.results)],
            env=self.here.environment(),
            stdout=self.output,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )

    def listen(self) -> None:
        lines = Path(self.output.name).read_text().splitlines()
        said = self.lives[-1]
        said += [json.loads(line) for line in lines[len(said) :] if line.endswith("}")]

    def ranks(self) -> list[int]:
        return descendants(self.process.pid)

    # --- what goes wrong

    def kill_a_rank(self) -> None:
        self.signal_a_rank(signal.SIGKILL)

    def stop_a_rank(self) -> None:
        self.signal_a_rank(signal.SIGSTOP)

    def end_a_rank_politely(self) -> None:
        self.signal_a_rank(signal.SIGTERM)

    def signal_a_rank(self, number: int) -> None:
        with suppress(ProcessLookupError, IndexError):
            victim = self.chance.choice(self.ranks())
            os.kill(victim, number)
            begun = time.monotonic()
            if not becomes_true(lambda: victim not in self.ranks(), 30):
                self.found.problems.append(f"a rank that got signal {number} was still there after 30 s")
            self.found.slowest_end_s = max(self.found.slowest_end_s, time.monotonic() - begun)

    def interrupt(self) -> None:
        self.restart(signal.SIGINT)

    def kill_the_sweeper(self) -> None:
        self.restart(signal.SIGKILL)

    def end_sweeper(self, number: int) -> None:
        os.kill(self.process.pid, number)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.found.problems.append(f"the sweeper was still there 30 s after signal {number}")
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def restart(self, number: int) -> None:
        self.end_sweeper(number)
        self.look()
        self.listen()
        self.process = self.start()

    def cut_the_records(self) -> None:
        """As a crash in the middle of writing a line would: the line was never finished."""
        self.restart_around(lambda file: file.write_bytes(file.read_bytes() + b'{"evidence": "mea'))

    def restart_around(self, change: Callable[[Path], object]) -> None:
        self.end_sweeper(signal.SIGKILL)
        file = self.results / RECORDS
        if file.exists():
            change(file)
        self.listen()
        self.process = self.start()

    def fill_the_disk(self) -> None:
        """No file of the sweeper's may grow beyond what the records have now, for a while."""
        file = self.results / RECORDS
        if not file.exists():
            return
        _, hard = resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE)
        limit = file.stat().st_size + ROOM_BYTES
        with suppress(ProcessLookupError):
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (limit, hard))
            time.sleep(self.chance.uniform(2, 8))
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (hard, hard))

    FAULTS = (
        kill_a_rank, kill_a_rank, stop_a_rank, end_a_rank_politely, interrupt, kill_the_sweeper,
        cut_the_records, fill_the_disk,
    )  # fmt: skip

    # --- what is looked at

    def look(self) -> None:
        """After a sweeper has ended: nothing of it may be there."""
        left = self.here.left_behind()
        self.found.problems += [f"left behind: {item}" for item in left]

    def soak(self, seconds: float) -> Finding:
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            if not becomes_true(lambda: len(self.ranks()) >= RANKS or self.process.poll() is not None, 60):
                self.found.problems.append("the sweeper started no rank for a minute")
                break
            time.sleep(self.chance.expovariate(1 / 3.0))
            if self.process.poll() is not None:
                self.found.problems.append(f"the sweeper ended by itself: {self.process.returncode}")
                self.process = self.start()
                continue
            fault = self.chance.choice(self.FAULTS)
            self.found.faults[fault.__name__] = self.found.faults.get(fault.__name__, 0) + 1
            fault(self)
            self.listen()
        self.end_sweeper(signal.SIGINT)
        self.listen()
        self.look()
        self.found.minutes = (time.monotonic() - begun) / 60
        self.account()
        return self.found

    def account(self) -> None:
        """Every cell of every sweep that was begun: recorded once, or once when an undisturbed call has run
        it. What was called finished must have been in the file before that call."""
        file = self.results / RECORDS
        before = read(file)
        all_said = [said for life in self.lives for said in life]
        told = sum(said.get("finished", 0) for said in all_said)
        if told > len(before):
            self.found.problems.append(f"{told} results were called finished, {len(before)} are in the file")
        recorded = Counter(record.stage for record in before)
        numbers = sorted(int(path.stem.partition("-")[2]) for path in self.results.glob("sweep-*.yaml"))
        unfinished = [number for number in numbers if recorded[stage_name(number)] < CELLS]
        resumed = unfinished[-RESUMED:]  # all of them might take as long as the soak
        for number in resumed:
            words = ["sweep", str(sweep_file(self.results, number)), "--out", str(self.results)]
            command = [
                sys.executable,
                "-m",
                "suite.cli",
                *words,
                "wandb.mode=disabled",
                "testbed.timeout_s=60",
            ]
            done = subprocess.run(command, env=self.here.environment(), capture_output=True, text=True)
            if done.returncode != 0:
                self.found.problems.append(f"an undisturbed sweep failed: {done.stderr.strip()[-300:]}")
        after = read(file)
        cells = Counter((record.stage, record.config_hash) for record in after)
        twice = [stage for (stage, _), times in cells.items() if times > 1]
        self.found.problems += [f"recorded more than once: {stage}" for stage in twice]
        for number in [number for number in numbers if number not in unfinished[:-RESUMED]]:
            there = sum(stage == stage_name(number) for stage, _ in cells)
            if there != CELLS:
                self.found.problems.append(f"sweep {number} has {there} of its {CELLS} records")
        self.found.sweeps, self.found.resumed = len(numbers), len(resumed)
        failed = [text for said in all_said for text in said.get("failed", ())]
        self.found.failures_reported = len(failed)
        self.found.problems += [f"names no rank: {text}" for text in failed if "rank " not in text]
        self.found.records = len(after)
        self.look()
        self.leaks()

    def leaks(self) -> None:
        """Of the sweeper that lived longest: its memory and descriptors over its sweeps."""
        longest = max(self.lives, key=len)
        if len(longest) < 4:
            return
        later = longest[1:]  # the first sweep imports
        self.found.descriptors = [min(s["descriptors"] for s in later), max(s["descriptors"] for s in later)]
        growth = (later[-1]["rss"] - later[0]["rss"]) / 2**20
        self.found.rss_growth_mb_per_100_sweeps = round(100 * growth / len(later), 1)
        if self.found.descriptors[1] - self.found.descriptors[0] > 8:
            self.found.problems.append(f"descriptors of the sweeper: {self.found.descriptors}")
        if growth > 50 and growth / len(later) > 1:
            self.found.problems.append(f"the sweeper grew by {growth:.0f} MB in {len(later)} sweeps")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--sweeper", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.sweeper is not None:
        with suppress(KeyboardInterrupt):
            sweeper(given.sweeper)
        return 0
    seed = given.seed if given.seed is not None else time.monotonic_ns() % 2**31
    print(f"soaking for {given.minutes:g} minutes, seed {seed}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="suite-soak-") as folder, place(Path(folder)) as here:
        found = Saboteur(here, random.Random(seed)).soak(60 * given.minutes)
        assert processes_with(here.token) == [] or found.problems
    print(json.dumps({"seed": seed, **asdict(found)}, indent=1))
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
