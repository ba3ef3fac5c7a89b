"""Near-misses: programs that look like attention and are not, or are only almost.

Each gives the refusal's reason (a pattern over its text; the site must be refused), or None:
"refused or right", where fusing is allowed as long as every number agrees with eager.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.spellings.base import make

SELF = ("BHMD", "BHMD", "BHMD")
QKV = ("BHMD", "BHND", "BHND")
CUBE = ("HHHH", "HHHH", "HHHH")  # every dim is 6: only the order tells them apart
INF = float("-inf")
ANY = "."


@dataclass(frozen=True)
class Impostor:
    """A program, its inputs, and the reason pattern of its refusal (None: refused or right)."""

    name: str
    program: Callable
    inputs: tuple[Any, ...]
    reason: str | None
    train: bool

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> list[Any]:
        gen = torch.Generator().manual_seed(seed)
        return [make(spec, dtype, gen) for spec in self.inputs]


IMPOSTORS: dict[str, Impostor] = {}


def impostor(reason: str | None, *inputs: Any, train: bool = True):
    def register(program):
        name = program.__name__
        assert name not in IMPOSTORS, name
        IMPOSTORS[name] = Impostor(name, program, inputs, reason, train)
        return program

    return register


def scores(q, k):
    return q @ k.transpose(-2, -1) / 4


def tril():
    return torch.ones(37, 37, dtype=torch.bool).tril()
