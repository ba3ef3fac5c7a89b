"""The corpus of mixtures of experts: name -> a block as users write it -> what it must be lifted to.

One module per form of dispatch; a form comes with several kinds of experts, layouts and routers.
"""

from tests.moe_spellings import (  # noqa: F401  (importing a family registers its spellings)
    batched,
    buffers,
    capacity,
    computed,
    conditions,
    dense,
    each,
    firsts,
    gates,
    grouped,
    indexed,
    joined,
    known,
    layers,
    loops,
    mesh,
    otherwise,
    ranks,
    thresholds,
)
from tests.moe_spellings.base import CORPUS, Block, Spelling

__all__ = ["CORPUS", "Block", "Spelling"]
