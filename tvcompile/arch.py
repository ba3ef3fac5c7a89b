"""Which processor a graph runs on: `cpu`, `sm90`, `gfx942`, and what a config has to know of it."""

from __future__ import annotations

import dataclasses

import torch

SHARED = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm120": 99, "gfx942": 64, "gfx950": 160}
"""KiB of shared memory that a block may have, for each architecture that kernels are made for."""
YOUNGER = {"sm87": "sm86", "sm88": "sm86"}  # not the newest before it: its shared memory or its units differ


@dataclasses.dataclass(frozen=True)
class Device:
    """arch: cpu, sm90, gfx942, ...; shared: bytes of shared memory a block may have; units: multiprocessors, or the
    threads of a CPU."""

    arch: str
    shared: int = 0
    units: int = 1

    @staticmethod
    def of(device: torch.device) -> Device:
        if device.type != "cuda":
            return Device(device.type, 0, torch.get_num_threads())
        arch, about = arch_of(device), torch.cuda.get_device_properties(device)
        given = getattr(about, "shared_memory_per_block_optin", 0)
        return Device(arch, given or Device.typical(arch).shared, about.multi_processor_count)

    @staticmethod
    def typical(arch: str, units: int = 1) -> Device:
        """A device of an architecture as its specification has it."""
        return Device(arch, 1024 * SHARED.get(family(arch) or "", 0), units)


def arch_of(device: torch.device) -> str:
    """The arch string of a device. CUDA: sm and the compute capability; ROCm: the gfx name."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def family(arch: str) -> str | None:
    """The architecture whose configs serve: itself, or the newest one before it; None for one older than all.

    A GPU newer than all that is known gets the newest; of AMD only the same generation counts.
    """
    if arch in SHARED:
        return arch
    if arch in YOUNGER:
        return YOUNGER[arch]
    older = [a for a in SHARED if a[:2] == arch[:2] and _number(a) < _number(arch)]
    if arch.startswith("gfx"):
        older = [a for a in older if a[:4] == arch[:4]]
    return max(older, key=_number, default=None)


def _number(arch: str) -> int:
    digits = arch.removeprefix("sm").removeprefix("gfx")
    return int(digits, 16) if digits.isalnum() else 0
