"""Where the numbers come from: the machine, the software and the commit."""

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from id3_kernels.backend import native


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def commit(tree: Path = Path(__file__).parent) -> str:
    """`git describe` of the checkout that holds `tree`, "unknown" without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def software() -> dict[str, str]:
    """The end of every machine's description; the variable COMMIT names the commit where git cannot."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": os.environ.get("COMMIT") or commit(),
        "date": datetime.date.today().isoformat(),
    }


def describe(threads: int) -> dict[str, object]:
    """The CPU, its memory and the build of the kernels."""
    import psutil  # of the extra `bench`; a GPU's machine, which takes `commit` and `software`, may lack it

    extension = native()
    return {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "build": dict(extension.build_info()) if extension else {"compiler": "none: pure Python"},
        **software(),
    }


def multiplies_bfloat16() -> bool:
    """Whether the CPU has a fast product of bfloat16 matrices. Without AVX-512 it takes ten times as long as
    that of float32, which says nothing about a method."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def results_path(folder: Path, machine: dict[str, object], ending: str = "") -> Path:
    """Where the results of a CPU belong, whose `describe` is given. Makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = slug("cpu", machine["cpu"], f"{machine['cores']} cores", machine["simd"])
    return folder / f"{name}{ending}.json"


def slug(*words: object) -> str:
    """`slug("cpu", "AMD EPYC", "2 cores")` is `cpu-amd-epyc-2-cores`: the name of a machine's results."""
    plain = [re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|@.*", " ", str(word)) for word in words]
    return "-".join(re.findall(r"[a-z0-9]+", " ".join(plain).lower()))
