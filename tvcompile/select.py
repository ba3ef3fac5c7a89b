"""Which kernel serves a Spec on a processor, or why none does. Pure."""

from __future__ import annotations

import torch

from .kernels.attention import choose
from .kernels.problem import Need
from .spec import AttentionSpec

MANY = 1 << 40


def select(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, scores: int) -> tuple[str, str]:
    """(name of the kernel, "") or ("", the reasons); scores: about B*H*S_q*S_kv, 0 if not known.

    A call chooses again by its own sizes; where they are not known, every kernel they may lead to is named.
    """
    try:
        names = [choose(Need(spec, dtype, scores=n), device.type).name for n in ([scores] if scores else [1, MANY])]
        return " or ".join(dict.fromkeys(names)), ""
    except NotImplementedError as reasons:
        return "", str(reasons)
