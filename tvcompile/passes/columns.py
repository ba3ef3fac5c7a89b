"""Columns of a mixture's ids: the parts of experts written one by one that are one choice of a token."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import sympy

from .. import expr as E
from ..expr import Expr
from .chosen import Chosen
from .expert import Expert


@dataclasses.dataclass
class Part:
    """One term: the expert, its number where experts are written one by one, and which tokens choose it."""

    choice: Chosen
    number: int | None
    formula: Expr | None
    expert: Expert
    whole: tuple[Expr, ...]
    k: Expr
    puts: tuple[str, ...] = ()


@dataclasses.dataclass
class Column:
    """Parts that differ in the expert's number only."""

    choice: Chosen
    parts: list[Part]

    @property
    def single(self) -> bool:
        return self.parts[0].number is None


def in_columns(parts: list[Part]) -> list[Column]:
    columns: list[Column] = []
    for p in parts:
        for c in columns:
            numbered = p.number is not None and not c.single and all(q.number != p.number for q in c.parts)
            if numbered and (choice := _in_common(c, p)) is not None:
                c.choice = choice
                c.parts.append(p)
                break
        else:
            columns.append(Column(p.choice, [p]))
    for c in columns:
        c.choice = _at_its_id(c.choice)
    columns = _in_turn(columns)
    for c in columns:
        c.parts.sort(key=lambda p: p.number or 0)
    return columns


def _in_turn(columns: list[Column]) -> list[Column]:
    """Columns of one id whose experts have conditions and factors of their own: each counts where the id is one's."""
    found: list[Column] = []
    for c in columns:
        for other in found:
            alike = not (c.single or other.single) and (c.choice.ids, c.choice.k) == (other.choice.ids, other.choice.k)
            if alike and not {p.number for p in c.parts} & {p.number for p in other.parts}:
                mine = E.or_(*(E.eq(c.choice.ids, sympy.Integer(p.number or 0)) for p in c.parts))
                other.choice = _either(mine, c.choice, other.choice)
                other.parts += c.parts
                break
        else:
            found.append(c)
    return found


def _either(mine: Expr, a: Chosen, b: Chosen) -> Chosen:
    """The choice a where `mine` holds, b elsewhere; their ids are one."""
    one, other = Counter(a.factors), Counter(b.factors)
    both = one & other
    left = [
        functools.reduce(lambda x, y: E.apply("mul", x, y), (only - both).elements(), E.number(1.0))
        for only in (one, other)
    ]
    factors = (*both.elements(), *([E.where(mine, *left)] if left[0] != left[1] else []))
    if a.counts == b.counts:
        return dataclasses.replace(a, factors=factors)
    counts = E.or_(E.and_(mine, *a.counts), E.and_(E.not_(mine), *b.counts))
    return dataclasses.replace(a, factors=factors, counts=(counts,))


OWN = E.index("own_number")  # what stands for an expert's number in what its column has in common


def _in_common(c: Column, p: Part) -> Chosen | None:
    """The choice of a column and one more part, where both have the same but for their expert's own number."""
    a, b = c.choice, p.choice
    if (a.ids, a.k) != (b.ids, b.k) or len(a.counts) != len(b.counts) or len(a.factors) != len(b.factors):
        return None
    first = c.parts[0].number if len(c.parts) == 1 else None
    try:
        counts, factors = (
            tuple(_generalised(x, y, first, p.number) for x, y in zip(xs, ys))
            for xs, ys in ((a.counts, b.counts), (a.factors, b.factors))
        )
    except ValueError:
        return None
    return Chosen(a.ids, a.k, counts, factors)


def _generalised(x: Expr, y: Expr, first: int | None, number: int | None) -> Expr:
    """The formula that is x for expert `first` (None: x holds OWN already) and y for expert `number`."""
    own = x == OWN if first is None else x.is_Integer and x == first
    if own and y.is_Integer and y == number and number is not None:
        return OWN
    if x == y:
        return x
    if x.func is not y.func or len(x.args) != len(y.args) or not x.args:
        raise ValueError("formulas of two shapes")
    return x.func(*(_generalised(a, b, first, number) for a, b in zip(x.args, y.args)))


def _at_its_id(c: Chosen) -> Chosen:
    """An expert's own number is the id of the token that chose it."""
    counts, factors = (tuple(E.substitute(e, {OWN: c.ids}) for e in es) for es in (c.counts, c.factors))
    return Chosen(c.ids, c.k, counts, factors)


def places(c: Column) -> Expr:
    """The ids of a column as places among its experts, outside of them for what is no expert."""
    numbers = [p.number for p in c.parts]
    first = numbers[0]
    if c.single or first is None:
        return c.choice.ids
    if numbers == list(range(first, first + len(numbers))):
        return c.choice.ids - first
    place = sympy.Integer(-1)
    for i, number in enumerate(numbers):
        place = E.where(E.eq(c.choice.ids, sympy.Integer(number)), sympy.Integer(i), place)
    return place
