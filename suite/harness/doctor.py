"""What this host can run, and why not."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from suite.errors import UsageError
from suite.harness.environment import environment
from suite.harness.peaks import peak_tflops
from suite.impls import registry
from suite.testbeds import slurm
from suite.testbeds.network import why_not


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `remedy` says what to do when it is not ok."""

    what: str
    ok: bool
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Machine, tools and every implementation. Leaves nothing behind."""
    env = environment()
    machine = f"{env['cores']} cores ({env['cpu']}), {env['memory_bytes'] / 2**30:.0f} GiB, {env['system']}"
    accelerators = ", ".join(map(_accelerator, env["accelerators"]))
    accelerators = accelerators or "none: implementations run on the CPU over gloo"
    packages = ", ".join(f"{name} {version}" for name, version in env["packages"].items() if version)
    findings = [
        Finding("machine", True, machine),
        Finding("accelerators", True, accelerators),
        Finding("python", True, f"{env['python']} with {packages}"),
        _tool("g++", "compiles DeepSpeed's CPU helper", "install g++"),
        _tool("ninja", "compiles DeepSpeed's CPU helper", "pip install ninja"),
        _memory_peaks(),
        _emulated_clusters(),
        _slurm(),
    ]
    return findings + [_implementation(name) for name in registry.IMPLEMENTATIONS]


def _accelerator(name: str) -> str:
    peak = peak_tflops(name, "bf16", tf32=False) or peak_tflops(name, "fp16", tf32=False)
    return f"{name} (peak {peak:g} TFLOPS)" if peak else f"{name} (peak not known: no MFU)"


def _tool(name: str, purpose: str, remedy: str) -> Finding:
    # A virtual environment that is used without being activated is not on PATH.
    beside_python = os.path.join(os.path.dirname(os.sys.executable), name)  # type: ignore[attr-defined]
    found = shutil.which(name) or (beside_python if os.access(beside_python, os.X_OK) else None)
    return Finding(name, found is not None, purpose, "" if found else remedy)


def _memory_peaks() -> Finding:
    ok = os.access("/proc/self/clear_refs", os.W_OK)
    return Finding("peak memory", ok, "needs a writable /proc/self/clear_refs", "" if ok else "use Linux")


def _emulated_clusters() -> Finding:
    reason = why_not()
    remedy = f"{reason}. Needs Linux, iproute2, and either root with CAP_SYS_ADMIN or user namespaces"
    purpose = "network namespaces, veth, bridge and tbf for testbed=emulated"
    return Finding("emulated clusters", reason is None, purpose, remedy if reason else "")


def _slurm() -> Finding:
    reason = slurm.why_not()
    return Finding("Slurm", reason is None, "submits jobs for testbed=slurm", reason or "")


def _implementation(name: str) -> Finding:
    try:
        registry.require(name)
    except UsageError as error:
        return Finding(name, False, registry.IMPLEMENTATIONS[name].summary, str(error))
    return Finding(name, True, registry.IMPLEMENTATIONS[name].summary)
