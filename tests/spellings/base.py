"""What a spelling is, and how its inputs are made.

Shapes are letters, so that every size is distinct and an S_q x S_kv tensor is recognizable:
B 4 · H 6 heads · G 2 kv heads · R 3 = H / G · M 37 = S_q · N 41 = S_kv · D 16 · E 24 = D_v ·
C 96 = H D
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from tests.spellings.meaning import Means, clauses, same_meaning

SIZES = {"B": 4, "H": 6, "G": 2, "R": 3, "M": 37, "N": 41, "D": 16, "E": 24, "C": 96, "1": 1}
Expected = Any  # exact text, Means, a compiled pattern, a tuple of alternatives, or None: any text


@dataclass(frozen=True)
class Spelling:
    """A program as a user writes it, its inputs, and the spec text that it must lift to."""

    name: str
    family: str
    program: Callable
    inputs: tuple[Any, ...]
    spec: Expected
    sizes: tuple[int, int, int, int]
    kv_heads: int | None
    sites: int
    train: bool

    def build(self, dtype: torch.dtype) -> Any:
        """The function, or a new module with seeded parameters in `dtype`."""
        if not isinstance(self.program, type):
            return self.program
        torch.manual_seed(0)
        return self.program().to(dtype)

    def make_inputs(self, dtype: torch.dtype, seed: int = 0) -> list[Any]:
        gen = torch.Generator().manual_seed(seed)
        return [make(spec, dtype, gen) for spec in self.inputs]

    def accepts(self, text: str) -> bool:
        """Whether a site's text is one that this spelling may lift to."""
        return accepts(self.spec, text, self.sizes)


CORPUS: dict[str, Spelling] = {}


def accepts(expected: Expected, text: str, sizes: tuple[int, int, int, int]) -> bool:
    if expected is None:
        return bool(clauses(text))
    if isinstance(expected, tuple):
        return any(accepts(e, text, sizes) for e in expected)
    if isinstance(expected, re.Pattern):
        return expected.fullmatch(text) is not None
    if isinstance(expected, Means):
        return same_meaning(expected.text, text, sizes)
    return text == expected


def size(letters: str) -> list[int]:
    return [SIZES[letter] for letter in letters]


def make(spec: Any, dtype: torch.dtype, gen: torch.Generator) -> Any:
    """A tensor from 'kind:LETTERS' (kind is float when left out), or what a callable makes."""
    if callable(spec):
        return spec(dtype, gen)
    if not isinstance(spec, str):
        return spec
    kind, _, letters = spec.rpartition(":")
    return MAKERS[kind](size(letters), dtype, gen)


def learned(shape, dtype, gen):
    return torch.randn(shape, generator=gen).to(dtype).requires_grad_()


def positive(shape, dtype, gen):
    return (torch.rand(shape, generator=gen) + 0.5).to(dtype).requires_grad_()


def const(shape, dtype, gen):
    return torch.randn(shape, generator=gen).to(dtype)


def left_pad(shape, dtype, gen):
    """Row b starts with 3 b padded positions: with a causal mask its first rows see nothing."""
    start = 3 * torch.arange(shape[0]).unsqueeze(1)
    return torch.arange(shape[1]) >= start


def right_pad(shape, dtype, gen):
    return torch.arange(shape[1]) < shape[1] - 3 * torch.arange(shape[0]).unsqueeze(1)


def allowed(shape, dtype, gen):
    """A random bool mask whose every row attends to its first position."""
    mask = torch.rand(shape, generator=gen) < 0.6
    mask[..., 0] = True
    return mask


def additive(shape, dtype, gen):
    """The same as a float mask of 0 and -inf."""
    blocked = ~allowed(shape, dtype, gen)
    return torch.zeros(shape, dtype=dtype).masked_fill(blocked, float("-inf"))


def documents(shape, dtype, gen):
    """Non-decreasing document ids, about three documents a row."""
    starts = torch.rand(shape, generator=gen) < 3 / shape[-1]
    return starts.long().cumsum(-1)


def restarts(shape, dtype, gen):
    """Position ids of packed sequences: they start again at 0 where a document starts."""
    ids = documents(shape, dtype, gen)
    return (torch.arange(shape[-1]) - torch.searchsorted(ids, ids)).long()


def lengths(shape, dtype, gen):
    return torch.randint(5, 30, shape, generator=gen)


MAKERS = {
    "": learned,
    "positive": positive,
    "const": const,
    "left": left_pad,
    "left01": lambda *a: left_pad(*a).long(),
    "right": right_pad,
    "allowed": allowed,
    "additive": additive,
    "ids": documents,
    "pos": restarts,
    "len": lengths,
}


def spells(spec: Expected, *inputs: Any, rows="M", columns="N", kv_heads=None, sites=1, train=True):
    """Register the decorated function or module as a spelling of `spec`."""

    def register(program):
        family = program.__module__.rpartition(".")[2]
        name = f"{family}.{program.__name__}"
        assert name not in CORPUS, name
        sizes = (
            SIZES["B"],
            SIZES["H"],
            *(SIZES[x] if x in SIZES else int(x) for x in (rows, columns)),
        )
        CORPUS[name] = Spelling(name, family, program, inputs, spec, sizes, kv_heads, sites, train)
        return program

    return register
