"""Mixtures of experts whose form is not read yet: they say so."""

from __future__ import annotations

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.loops import MakeMoe, ThreeDimsBoolean


@impostor(ANY)
class WrittenThroughAView(ThreeDimsBoolean):
    """Results put into a flat view of what is returned."""

    three = True


@impostor(ANY)
class TwoMasksOfOneMeaning(MakeMoe):
    """Rows are read by a mask [B,S] and weighed by a view of it, [T]."""
