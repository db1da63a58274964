"""Where the numbers come from."""

import datetime
import platform
import re
import subprocess
from pathlib import Path

import psutil
import torch


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).parent
    try:
        command = ["git", "describe", "--always", "--dirty"]
        done = subprocess.run(command, cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _build_info() -> dict[str, object]:
    try:
        from id3_kernels import _C
    except ImportError:
        return {"compiler": "none: pure Python"}
    return dict(_C.build_info())


def describe(threads: int) -> dict[str, object]:
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "build": _build_info(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
    }


def slug(machine: dict[str, object]) -> str:
    """`cpu-amd-epyc-2-cores`: the name of the machine's results."""
    model = re.sub(r"\((R|TM|r|tm)\)|\bCPU\b|\bProcessor\b|@.*", " ", str(machine["cpu"]))
    words = re.findall(r"[a-z0-9]+", f"cpu {model} {machine['cores']} cores".lower())
    return "-".join(words)
