"""The corpus: name -> a program as users write it -> the spec text that it must lift to.

One module per family; most programs of a family expect the same text.
"""

from tests.spellings import (  # noqa: F401  (importing a family registers its spellings)
    causal,
    contractions,
    grouped,
    input_masks,
    known,
    modules,
    padding,
    patterns,
    regions,
    scale,
    scores,
    sdpa,
    sinks,
    softmaxes,
)
from tests.spellings.base import CORPUS, Spelling
from tests.spellings.meaning import Means, clauses, same_meaning

__all__ = ["CORPUS", "Means", "Spelling", "clauses", "same_meaning"]
