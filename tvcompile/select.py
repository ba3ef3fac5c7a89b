"""Which kernel serves a Spec on a processor, or why none does. Pure."""

from __future__ import annotations

import torch

from .kernels.attention import choose
from .kernels.problem import Need
from .spec import AttentionSpec

FEW, MANY = (1, 1), (1 << 40, 1 << 20)  # sizes of a small and of a large problem


def select(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, scores: int, keys: int) -> tuple[str, str]:
    """(name of the kernel, "") or ("", the reasons); scores: about B*H*S_q*S_kv, keys: S_kv, 0 if not known.

    A call chooses again by its own sizes; where they are not known, every kernel they may lead to is named.
    """
    sizes = ((scores, keys),) if scores else (FEW, MANY)
    try:
        names = [choose(Need(spec, dtype, None, *size), device.type).name for size in sizes]
        return " or ".join(dict.fromkeys(names)), ""
    except NotImplementedError as reasons:
        return "", str(reasons)
