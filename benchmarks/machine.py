"""The machine's facts: what a reader needs to judge figures, as plain data."""

import os
import platform
from importlib import metadata
from pathlib import Path

FLAGS = (
    *("avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8", "avx512f", "avx512bw", "avx512dq"),
    *("avx512vl", "avx512vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16", "hypervisor"),
)
CPU = Path("/sys/devices/system/cpu/cpu0")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


def facts():
    info = _cpu_info()
    flags = set(info.get("flags", "").split())
    return {
        "cpu": info.get("model name", platform.processor() or "unknown"),
        "family": info.get("cpu family"),
        "model": info.get("model"),
        "architecture": platform.machine(),
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": os.cpu_count(),
        "cores_allowed": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "caches": caches(),
        "memory_bytes": _memory_bytes(),
        "transparent_huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "governor": _read(CPU / "cpufreq/scaling_governor"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in ("torch", "dynquant", "numpy")},
    }


def caches():
    """Bytes of each data cache that one core sees, by name: {"L1": ..., "L2": ..., "L3": ...}."""
    sizes = {}
    for folder in sorted((CPU / "cache").glob("index*")):
        size, kind = _read(folder / "size"), _read(folder / "type")
        if size and kind in ("Data", "Unified"):
            sizes[f"L{_read(folder / 'level')}"] = _bytes(size)
    return sizes


def last_cache_bytes():
    """Of the largest cache; 32 MiB where the system does not say."""
    return max(caches().values(), default=32 * 2**20)


def level_of(size):
    """The name of the smallest cache that holds so many bytes, or "memory"."""
    return next((name for name, room in sorted(caches().items()) if size <= room), "memory")


def summary(machine):
    """One line of facts()."""
    cached = ", ".join(f"{name} {size // 1024} KiB" for name, size in machine["caches"].items())
    return (
        f"{machine['cpu']}, {machine['cores_allowed']} of {machine['cores']} cores, {cached}, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, huge pages "
        f"{machine['transparent_huge_pages']}, torch {machine['versions']['torch']}"
    )


def _read(path):
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _chosen(path):
    """The word in brackets of a setting such as "always [madvise] never"."""
    text = _read(path) or ""
    return text.partition("[")[2].partition("]")[0] or None


def _bytes(text):
    return int(text[:-1]) * UNITS[text[-1]] if text[-1] in UNITS else int(text)


def _cpu_info():
    """The first processor's lines of /proc/cpuinfo."""
    first = (_read("/proc/cpuinfo") or "").split("\n\n")[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _memory_bytes():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
