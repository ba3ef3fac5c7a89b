"""Mixtures of experts whose form is not read yet: they say so."""

from __future__ import annotations

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.capacity import Buffer, SwitchPerSequence
from tests.moe_spellings.loops import MakeMoe, ThreeDimsBoolean


@impostor(ANY)
class RowsInABuffer(Buffer):
    """Tokens scattered into the experts' places, gathered back."""


@impostor(ANY)
class WrittenThroughAView(ThreeDimsBoolean):
    """Results put into a flat view of what is returned."""

    three = True


@impostor(ANY)
class TwoMasksOfOneMeaning(MakeMoe):
    """Rows are read by a mask [B,S] and weighed by a view of it, [T]."""


@impostor(ANY)
class PlacesOfASequence(SwitchPerSequence):
    """Places are counted per sequence, not over all tokens."""

    router, kind, three = "top1", "relu", True
