"""Near-misses: name -> a block that looks like a mixture of experts -> why it must be refused."""

from tests.moe_impostors import (  # noqa: F401  (registers them)
    buffers,
    capacity,
    choices,
    cleared,
    experts,
    firsts,
    gates,
    ids,
    indexed,
    joined,
    maps,
    mesh,
    one_hot,
    positions,
    ranks,
    replaced,
    residual,
    rounding,
    routing,
    rows,
    state,
    thresholds,
)
from tests.moe_impostors.base import IMPOSTORS, Impostor

__all__ = ["IMPOSTORS", "Impostor"]
