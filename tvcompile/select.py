"""Which kernel serves a Spec on a processor, or why none does. Pure."""

from __future__ import annotations

import torch

from .arch import Device
from .kernels import moe
from .kernels.attention import choose
from .kernels.experts import ExpertNeed
from .kernels.problem import Need
from .spec import AttentionSpec, MoEMatch, Size

FEW, MANY = (1, 1), (1 << 40, 1 << 20)  # sizes of a small and of a large problem


def select(spec: AttentionSpec, device: torch.device, dtype: torch.dtype, size: Size) -> tuple[str, str]:
    """(name of the kernel, "") or ("", the reasons).

    A call chooses again by its own sizes; where they are not known, every kernel they may lead to is named.
    """
    sizes = ((size.scores, size.keys),) if size.scores else (FEW, MANY)
    here = Device.of(device)
    try:
        names = [choose(Need(spec, dtype, None, *n, size.features, here)).name for n in sizes]
        return " or ".join(dict.fromkeys(names)), ""
    except NotImplementedError as reasons:
        return "", str(reasons)


def select_moe(m: MoEMatch) -> tuple[str, str]:
    """The same for a mixture of experts; kernels serve every size."""
    weight = m.down[0].nodes[0].meta["val"]
    here, names = Device.of(weight.device), []
    tokens = int(m.tokens) if m.tokens.is_Integer else 0
    try:
        for backward in (False, True)[: 1 + m.saves]:
            need = ExpertNeed(m.spec, weight.dtype, backward, tokens, m.top, m.experts, stacked=m.stacked, device=here)
            names.append(moe.choose(need).name)
    except NotImplementedError as reasons:
        return "", str(reasons)
    return " or ".join(dict.fromkeys(names)), ""
