"""Columns of a mixture's ids: the parts of experts written one by one that are one choice of a token."""

from __future__ import annotations

import dataclasses
import functools
import operator
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

    @property
    def has_all(self) -> bool:
        """Has every token all experts, of which those count whose conditions hold?"""
        return self.choice.ids == self.choice.k != 0


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
    groups: list[list[Column]] = []
    for c in columns:
        for group in groups:
            alike = not (c.single or group[0].single) and _id_of(c) == _id_of(group[0])
            if alike and not {p.number for p in c.parts} & {p.number for other in group for p in other.parts}:
                group.append(c)
                break
        else:
            groups.append([c])
    return [Column(_by_turns(group), [p for c in group for p in c.parts]) for group in groups]


def _id_of(c: Column) -> tuple[Expr, Expr]:
    return c.choice.ids, c.choice.k


def _by_turns(group: list[Column]) -> Chosen:
    """The choice of each where the id is one of its experts."""
    choices = [c.choice for c in group]
    mine = [E.or_(*(E.eq(c.choice.ids, sympy.Integer(p.number or 0)) for p in c.parts)) for c in group]
    factors = [Counter(c.factors) for c in choices]
    common = functools.reduce(operator.and_, factors)
    *own, weight = [
        functools.reduce(lambda x, y: E.apply("mul", x, y), (f - common).elements(), E.number(1.0)) for f in factors
    ]
    alike = set(own) <= {weight}
    for holds, other in zip(mine, own):
        weight = E.where(holds, other, weight)
    counts = choices[0].counts
    if any(c.counts != counts for c in choices):
        counts = (E.or_(*(E.and_(holds, *c.counts) for holds, c in zip(mine, choices))),)
    if alike:
        return dataclasses.replace(choices[0], counts=counts)
    return dataclasses.replace(choices[0], counts=counts, factors=(*common.elements(), weight))


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
