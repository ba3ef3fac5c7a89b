"""Mixtures of experts whose form is not read yet: they say so."""

from __future__ import annotations

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.capacity import Buffer
from tests.moe_spellings.loops import ThreeDimsBoolean


@impostor(ANY)
class RowsInABuffer(Buffer):
    """Tokens scattered into the experts' places, gathered back."""


@impostor(ANY)
class WrittenThroughAView(ThreeDimsBoolean):
    """Results put into a flat view of what is returned."""

    three = True
