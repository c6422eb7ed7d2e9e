"""Energy that a run's hardware took, read from its own counters: NVML for an NVIDIA GPU (`pip install nvidia-ml-py`), RAPL for Intel and AMD CPUs
(Linux, where the user may read /sys/class/powercap).

A counter belongs to a whole device: whatever else ran there meanwhile is in it. Nothing is estimated from a data sheet; where no counter can be
read, the reason is kept instead of a number."""
from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

POWERCAP = Path("/sys/class/powercap")
EVERY = 10.0            # seconds between readings: a CPU's counter starts again at 0 after minutes of full load


@dataclass
class Counter:
    """now(): joules since some moment; at `wraps` joules it starts again at 0."""
    name: str
    now: Callable[[], float]
    wraps: float = math.inf
    last: float = math.nan          # the reading before, once there was one


def cpu_counters(root: Path = POWERCAP) -> list[Counter]:
    """Counters of CPU packages and of their memory. Empty where there are none or they may not be read (many systems keep them for root)."""
    found = []
    for zone in sorted(root.glob("intel-rapl:*")):          # AMD's driver uses the same names
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):     # core and uncore are parts of a package, psys is all of the machine
                continue
            now = lambda zone=zone: int((zone / "energy_uj").read_text()) / 1e6
            now()
            found.append(Counter(f"CPU {name}", now, int((zone / "max_energy_range_uj").read_text()) / 1e6))
        except (OSError, ValueError):
            continue
    return found


def gpu_counter(device) -> Counter | None:
    """Counter of a torch device's NVIDIA GPU; None without `nvidia-ml-py`, and for GPUs older than Volta, shared by MIG or not NVIDIA's."""
    try:
        import pynvml
        import torch
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        now = lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3
        now()
    except Exception:            # an optional library and a driver of any age: whatever they raise, there is no counter
        return None
    return Counter("GPU", now)


class Meter:
    """Joules of a device and, if `cpu`, of this machine's CPUs, from `start` on."""

    def __init__(self, device=None, cpu: bool = True):
        self.joules, self.why, self._read_at = 0.0, "", 0.0
        self.counters = cpu_counters(POWERCAP) if cpu else []
        if device is not None and device.type != "cpu":
            gpu = gpu_counter(device) if device.type == "cuda" else None
            self.counters = [*self.counters, gpu] if gpu else []           # the CPU's alone would pass for the whole
            self.why = "" if gpu else "no energy counter of the GPU can be read; NVIDIA's take nvidia-ml-py"
        elif cpu and not self.counters:
            self.why = "no energy counter of the CPU can be read"

    @property
    def of(self) -> list[str]:
        return [c.name for c in self.counters]

    def start(self, joules: float | None = 0.0) -> None:
        """Count from here, on top of `joules` of the run's earlier part; None: that part was not measured, and so the whole is not."""
        if joules is None:
            self.counters, self.why = [], self.why or "a part of the run was not measured"
        self.joules = joules or 0.0
        for counter in self.counters:
            counter.last = math.nan
        self.read(at_once=True)

    def read(self, at_once: bool = False) -> None:
        """Add what was taken since the last reading. Cheap enough for every step: counters are asked every EVERY seconds."""
        if not at_once and time.monotonic() - self._read_at < EVERY:
            return
        self._read_at = time.monotonic()
        try:
            for counter in self.counters:
                now = counter.now()
                taken = 0.0 if math.isnan(counter.last) else now - counter.last
                self.joules += taken if taken >= 0 else taken + counter.wraps if math.isfinite(counter.wraps) else now
                counter.last = now
        except Exception:          # a driver that went away must not end a run
            self.counters, self.why = [], "an energy counter could not be read any more"


def text(energy: dict | None) -> str:
    """{"joules", "of"} or {"why"} in words."""
    if not energy or energy.get("joules") is None:
        return f"not measured ({(energy or {}).get('why') or 'the run did not record it'})"
    joules = float(energy["joules"])
    return f"{joules / 1e3:.3g} kJ ({joules / 3.6e6:.2g} kWh), by the counters of {', '.join(energy['of'])}: whole devices, with sampling and measuring"
