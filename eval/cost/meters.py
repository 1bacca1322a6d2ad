"""Meters of energy: RAPL (Intel, AMD) for a CPU, NVML for a GPU; where there is none, there is no number.

A meter counts all that it feeds, idle power and other processes included: it is read on a machine that does
nothing else, and compared with a variant measured in the same rounds. RAPL is that of Linux' powercap
(kernel documentation, power/powercap.rst): microjoules since some moment, wrapping at `max_energy_range_uj`,
and readable by root alone on many machines (CVE-2020-8694). NVML counts millijoules since the driver was
loaded (nvmlDeviceGetTotalEnergyConsumption, Volta and newer).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from eval.core.errors import UserError
from eval.core.records import Energy

POWERCAP = Path("/sys/class/powercap")
NONE = "no meter"
BELOW = "below the meter's step"


@dataclass
class Counter:
    """One counter that only grows, and begins again at 0 beyond `wraps`."""

    name: str
    read: Callable[[], int]
    joule: float  # counts per joule
    wraps: int | None = None
    last: int = field(init=False)
    counts: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.last = self.read()

    def update(self) -> None:
        """Adds what was counted since the last call, which must be less than one whole turn."""
        now = self.read()
        grown = now - self.last
        if grown < 0:
            if self.wraps is None:
                raise UserError(f"meter {self.name}", f"went back by {-grown}", "measure again")
            grown += self.wraps + 1
        self.counts, self.last = self.counts + grown, now


@dataclass
class Meter:
    """Counters that together feed a device. Read it often: after each request."""

    counters: list[Counter]
    name: str  # of the meter, or why there is none

    def update(self) -> None:
        for counter in self.counters:
            counter.update()

    def spent(self, before: float | None, tokens: int) -> Energy:
        """What was counted while `tokens` were made, since `total` was `before`."""
        total = self.total
        joules = None if total is None or before is None else total - before
        if joules == 0:  # it did not tick meanwhile: that is no energy of 0
            return Energy(joules=None, tokens=tokens, meter=f"{self.name}: {BELOW}")
        return Energy(joules=joules, tokens=tokens, meter=self.name)

    @property
    def total(self) -> float | None:
        """Joules since the meter was made; None without one."""
        if not self.counters:
            return None
        return sum(counter.counts / counter.joule for counter in self.counters)


def _zones(top: Path) -> list[Path]:
    """RAPL zones that do not contain each other: packages, and the memory beside them.

    Cores and the integrated GPU are part of their package; `psys` contains it. A zone that two interfaces
    (MSR and MMIO) show under one name is taken once.
    """
    zones: dict[str, Path] = {}
    for zone in sorted(top.glob("intel-rapl*:*"), key=lambda path: ("mmio" in path.name, path.name)):
        name = (zone / "name").read_text().strip()
        if name.startswith("package"):
            zones.setdefault(name, zone)
        elif name == "dram":
            package = (top / zone.name.rpartition(":")[0] / "name").read_text().strip()
            zones.setdefault(f"dram of {package}", zone)
    return list(zones.values())


def _count(path: Path) -> int:
    return int(path.read_text())


def rapl(top: Path = POWERCAP) -> Meter:
    """The meter of every package of this machine and its memory, or the reason why there is none."""
    counters = []
    try:
        zones = _zones(top)
        for zone in zones:
            path, wraps = zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())
            name = (zone / "name").read_text().strip()
            counters.append(Counter(f"{name} ({path})", partial(_count, path), 1e6, wraps))
    except OSError as error:
        return Meter([], f"{NONE}: {error.filename} cannot be read ({error.strerror})")
    if not zones:
        return Meter([], f"{NONE}: no RAPL package below {top}")
    return Meter(counters, "RAPL: " + ", ".join((zone / "name").read_text().strip() for zone in zones))


def _gpu(library: ModuleType) -> Any:
    """NVML's handle of the device that torch uses."""
    import torch

    library.nvmlInit()
    identity = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    return library.nvmlDeviceGetHandleByUUID(f"GPU-{identity.removeprefix('GPU-')}")


def nvml() -> Meter:
    """The meter of the GPU that torch uses, or the reason why there is none."""
    try:
        import pynvml
    except ModuleNotFoundError:
        return Meter([], f"{NONE}: nvidia-ml-py is not installed")
    try:
        handle = _gpu(pynvml)
        counter = Counter("NVML", lambda: int(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)), 1e3)
    except pynvml.NVMLError as error:
        return Meter([], f"{NONE}: NVML says {error}")
    return Meter([counter], "NVML: total energy of the GPU")


def device_memory(device: str) -> int | None:
    """Bytes that this process holds on the GPU by NVML's count, the CUDA context included.

    None on a CPU, without NVML, and where the driver does not list the process (in a container it may know it
    by another number). torch keeps what it has reserved, so at the end this is the peak.
    """
    if device != "cuda":
        return None
    try:
        import pynvml
    except ModuleNotFoundError:
        return None
    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(_gpu(pynvml))
    except pynvml.NVMLError:
        return None
    return next((p.usedGpuMemory for p in running if p.pid == os.getpid()), None)


def open_meter(device: str) -> Meter:
    """The meter of a device: cpu or cuda."""
    return nvml() if device == "cuda" else rapl()
