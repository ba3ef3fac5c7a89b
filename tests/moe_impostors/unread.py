"""Mixtures of experts whose form is not read yet: they say so."""

from __future__ import annotations

from tests.moe_impostors.base import ANY, impostor
from tests.moe_spellings.capacity import Buffer, SwitchPerSequence


@impostor(ANY)
class RowsInABuffer(Buffer):
    """Tokens scattered into the experts' places, gathered back."""


@impostor(ANY)
class PlacesOfASequence(SwitchPerSequence):
    """Places are counted per sequence, not over all tokens."""

    router, kind, three = "top1", "relu", True
