"""Which kernel serves a Spec on a processor, or why none does. Pure."""

from __future__ import annotations

import torch

from .kernels.attention import choose
from .spec import AttentionSpec


def select(spec: AttentionSpec, device: torch.device, dtype: torch.dtype) -> tuple[str | None, str | None]:
    """(name of the kernel, None) or (None, the reasons)."""
    try:
        return choose(spec, device.type, dtype, ()).name, None
    except NotImplementedError as reasons:
        return None, str(reasons)
