"""Near-misses: name -> a program that looks like attention -> why it must be refused."""

from tests.impostors import mutations, structure, weights  # noqa: F401  (registers them)
from tests.impostors.base import IMPOSTORS, Impostor

__all__ = ["IMPOSTORS", "Impostor"]
