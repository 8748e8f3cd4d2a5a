"""DeepSpeed on a CPU: its environment, and the helper that it compiles at first use.

DeepSpeed's communication layer compiles `deepspeed_shm_comm` with g++ and ninja (most of a minute)
in the first process that needs it. `python -m suite.impls.deepspeed_build` does that during set-up.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import torch

from suite.cache import cache_folder, making
from suite.errors import UsageError, first_line

HELPER = "deepspeed_shm_comm"


def import_deepspeed(device_type: str) -> ModuleType:
    """DeepSpeed for that kind of device, on the CPU with its helper loaded (compiled if need be).

    Safe to call again, and by any number of processes at once; nothing of it reaches stdout. Raises
    UsageError when there is no compiler, or DeepSpeed serves another kind of device already.
    """
    if "deepspeed" not in sys.modules:
        os.environ["DS_ACCELERATOR"] = device_type  # read when DeepSpeed is imported
    with contextlib.redirect_stdout(sys.stderr):
        if device_type == "cpu":
            _load_helper()
        deepspeed = importlib.import_module("deepspeed")
    used = deepspeed.accelerator.get_accelerator().device_name()
    if used != device_type:
        raise UsageError(
            f"DeepSpeed was already imported for {used}; start a new process to use it on {device_type}"
        )
    return deepspeed


def prepare(device_type: str | None) -> None:
    """Run in the parent of ranks that are then forked and find DeepSpeed and the helper in memory.

    On an accelerator (None: where there is one) each rank imports it for itself: that looks at the
    device, which must not be touched before the fork. Raises UsageError.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if (device_type or (accelerator.type if accelerator else "cpu")) == "cpu":
        import_deepspeed("cpu")


def extensions_folder() -> Path:
    """Where the helper is compiled: one folder per set of versions, because torch's own check for
    a changed build looks at the sources alone."""
    versions = [f"{name}-{importlib.metadata.version(name)}" for name in ("deepspeed", "torch")]
    python = f"python-{sys.version_info.major}.{sys.version_info.minor}"
    return cache_folder("torch_extensions") / "-".join([*versions, python])


def is_built() -> bool:
    """Whether the helper of these versions has been compiled."""
    return (extensions_folder() / HELPER / f"{HELPER}.so").exists()


def main() -> int:
    """Compiles the helper unless it is there; that it cannot be compiled only costs the DeepSpeed rows."""
    try:
        if importlib.util.find_spec("deepspeed") is None:
            print("deepspeed is not installed; nothing to compile")
        elif is_built():
            print(f"DeepSpeed's {HELPER} is already compiled")
        else:
            import_deepspeed("cpu")
            print(f"DeepSpeed's {HELPER} is compiled")
    except Exception as error:  # compilers and imports raise what they like
        print(f"{first_line(error)}; without it the DeepSpeed implementations cannot run on the CPU")
    return 0


def _load_helper() -> None:
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_folder())
    _add_tools_to_path()
    folder = extensions_folder() / HELPER
    with making(folder.parent / "suite.lock"):
        # torch locks its build with a file that outlives a killed build, and waits for it for ever.
        # Whoever holds our lock, which the system frees, knows that nobody is building.
        (folder / "lock").unlink(missing_ok=True)
        _require_compiler()  # torch asks for both even when there is nothing left to compile
        if not is_built():
            print(f"compiling DeepSpeed's {HELPER} into {folder}", file=sys.stderr)
        accelerator = importlib.import_module("deepspeed.accelerator").get_accelerator()
        builder = accelerator.create_op_builder("ShareMemCommBuilder")
        if builder is not None:
            builder.load()


def _require_compiler() -> None:
    missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
    if missing:
        raise UsageError(
            f"DeepSpeed compiles a helper on the CPU and {' and '.join(missing)} is not installed; "
            "install g++ and ninja"
        )


def _add_tools_to_path() -> None:
    """pip puts ninja beside the interpreter, which is not on PATH unless the environment is active."""
    folder = os.path.dirname(sys.executable)
    if folder not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), folder])


if __name__ == "__main__":
    sys.exit(main())
