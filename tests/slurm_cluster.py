"""A real Slurm of two nodes on this machine, for tests: slurmctld and two slurmd in a folder of their own.

Needs Debian's slurm-wlm (built with several slurmd per host) and munge; no systemd, no cgroups. Everything
runs as the user that starts it and ends with `stop`, jobs included.
"""

from __future__ import annotations

import base64
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

NODES = ("node1", "node2")
TOOLS = ("slurmctld", "slurmd", "sbatch", "munged")
CPUS = 2

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

CONF = """\
ClusterName=suite
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={slurmd[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=50000,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmctldTimeout=30
SlurmdTimeout=10
KillWait=3
MinJobAge=3600
ReturnToService=2
MailProg=/bin/true
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={slurmd[0]} CPUs={cpus} RealMemory=1000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={slurmd[1]} CPUs={cpus} RealMemory=1000
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def why_not() -> str | None:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return (
        f"needs a Slurm to start: {', '.join(missing)} missing (Debian: slurm-wlm, munge)"
        if missing
        else None
    )


class Cluster:
    """To be stopped, whatever happens. `SLURM_CONF` in the environment of clients is `conf`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.conf = folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._environment = {**os.environ, "SLURM_CONF": str(self.conf)}

    def start(self) -> None:
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.folder / name).mkdir()
        ports = _free_ports(3)
        text = CONF.format(
            host=socket.gethostname().partition(".")[0],
            controller=ports[0],
            slurmd=ports[1:],
            user=_user(),
            folder=self.folder,
            cpus=CPUS,
        )
        self.conf.write_text(text)
        self._start_munge()
        self._start("slurmctld", "slurmctld", "-D", "-c", "-f", str(self.conf))
        for node in NODES:
            self.start_node(node)
        self.wait_for("idle", "idle")

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-c", "-N", node, "-f", str(self.conf))

    def lose_node(self, node: str) -> None:
        """As when its power fails: slurmd, its step daemons and all that they run are gone at once."""
        daemon = self._daemons.pop(node)
        _kill_tree(daemon.pid)
        daemon.wait()
        self.control("update", f"NodeName={node}", "State=DOWN", "Reason=lost")

    def control(self, *words: str) -> str:
        return self.client("scontrol", *words)

    def client(self, *command: str) -> str:
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def wait_for(self, *states: str, timeout_s: float = 60) -> None:
        """Until the nodes, in order, are in those states."""
        deadline = time.monotonic() + timeout_s
        seen: list[str] = []
        while time.monotonic() < deadline:
            with suppress(AssertionError):
                listed = self.client("sinfo", "-h", "-N", "-o", "%N %T").split("\n")
                seen = [line.split()[1] for line in sorted(listed) if line]
            if seen == list(states):
                return
            time.sleep(0.1)
        raise TimeoutError(f"the nodes are {seen}, not {states}: {self._logs()}")

    def stop(self) -> None:
        for daemon in reversed(self._daemons.values()):
            _kill_tree(daemon.pid)
            daemon.wait()
        self._daemons.clear()

    def _start(self, name: str, *command: str) -> None:
        log = (self.folder / f"{name}.out").open("ab")
        with log:
            self._daemons[name] = subprocess.Popen(
                command,
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                preexec_fn=_as_head_of_a_tree,
            )

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(base64.b64encode(os.urandom(96)))
        key.chmod(0o400)
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("log", "pid", "seed", "key")]
        options = ["--foreground", "--force", f"--socket={self.folder}/munge.socket", *files]
        self._start("munged", "munged", *options)
        _wait_for_file(self.folder / "munge.socket")

    def _logs(self) -> str:
        return "\n".join(file.read_text()[-2000:] for file in sorted(self.folder.glob("*.log")))


def _user() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in servers]
    for server in servers:
        server.close()
    return ports


def _wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} did not appear")
        time.sleep(0.02)


def _as_head_of_a_tree() -> None:
    """In a daemon, before it runs: what it starts and lets go (step daemons outlive slurmd) stays below it,
    where it can be found, and it ends when the tests are killed."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _kill_tree(pid: int) -> None:
    """The process and its descendants: all found first, then all killed."""
    tree, seen = [pid], {pid}
    parents = _parents()
    for parent in tree:
        children = [child for child, its_parent in parents.items() if its_parent == parent]
        tree += [child for child in children if child not in seen]
        seen.update(children)
    for number in tree:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(number, signal.SIGKILL)


def _parents() -> dict[int, int]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    return found
