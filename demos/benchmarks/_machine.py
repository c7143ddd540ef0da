"""What a benchmark ran on: figures without it mean nothing."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import numpy as np

__all__ = ["describe_machine", "format_machine"]


def describe_machine() -> dict[str, str | int | None]:
    """Return processor, cores, versions and what decides the speed of NumPy's matrix products."""
    return {
        "processor": _find_processor(),
        "cores": _count_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "numpy": np.__version__,
        "blas": _find_blas(),
        "openblas_coretype": os.environ.get("OPENBLAS_CORETYPE"),
        "load_1min": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def format_machine(machine: dict[str, str | int | None]) -> str:
    """Return the description as two lines of text."""
    core_type = machine["openblas_coretype"] or "not set"
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}, "
        f"load {machine['load_1min']}\n"
        f"{machine['python']}, numpy {machine['numpy']}, {machine['blas']}, "
        f"OPENBLAS_CORETYPE {core_type}"
    )


def _find_processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _find_blas() -> str:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas.get('name', 'unknown BLAS')} {blas.get('version', '')}".strip()
