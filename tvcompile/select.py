"""Which kernel serves a Spec on a processor, or why none does. Pure."""

from __future__ import annotations

import torch

from .kernels.attention import choose
from .kernels.problem import Need
from .spec import AttentionSpec


def select(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, scores: int) -> tuple[str, str]:
    """(name of the kernel, "") or ("", the reasons); scores: about B*H*S_q*S_kv, 0 if not known."""
    try:
        return choose(Need(spec, dtype, scores=scores), device.type).name, ""
    except NotImplementedError as reasons:
        return "", str(reasons)
