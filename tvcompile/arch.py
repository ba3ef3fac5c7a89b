"""Which processor a graph runs on: `cpu`, `sm90`, `gfx942`."""

from __future__ import annotations

import torch


def arch_of(device: torch.device) -> str:
    """The arch string of a device. CUDA: sm and the compute capability; ROCm: the gfx name."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


def units_of(device: torch.device) -> int:
    """Multiprocessors of a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
