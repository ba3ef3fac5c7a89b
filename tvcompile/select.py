"""Which kernel serves a Spec on a processor, or why none does. Pure."""

from __future__ import annotations

import torch

from .arch import arch_of
from .kernels.attention import choose
from .kernels.problem import Need
from .spec import AttentionSpec, Size

FEW, MANY = (1, 1), (1 << 40, 1 << 20)  # sizes of a small and of a large problem


def select(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, size: Size) -> tuple[str, str]:
    """(name of the kernel, "") or ("", the reasons).

    A call chooses again by its own sizes; where they are not known, every kernel they may lead to is named.
    """
    sizes = ((size.scores, size.keys),) if size.scores else (FEW, MANY)
    arch = arch_of(device)
    try:
        names = [choose(Need(spec, dtype, None, *n, size.features, arch)).name for n in sizes]
        return " or ".join(dict.fromkeys(names)), ""
    except NotImplementedError as reasons:
        return "", str(reasons)
