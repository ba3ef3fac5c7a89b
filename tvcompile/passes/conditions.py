"""Experts that no ids tell, but a condition for each: every token has all E of them, of which those count that hold.

sum_e gate[t,e] * (gate[t,e] > 0.5) * y_e(t)    ->    ids[t,k] = k, counted where gate[t,k] > 0.5, k < E
"""

from __future__ import annotations

import dataclasses
import itertools

import sympy
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse
from .chosen import Token, Unchosen
from .columns import Part
from .parts import Shared, chosen_parts, part_of, places_choose
from .places import exclude
from .routing import without_rows
from .rows import RowReader
from .terms_of import Term

MOST = 8  # experts that may be held for every token where the program holds rows of its own for each


def parts_of(r: RowReader, terms: list[Term], token: Token, d: Expr, anchor: fx.Node, alone: bool) -> list[Part]:
    """The parts of terms with a projection, all of which tokens chose, by ids or by conditions.

    alone: the sum is no part of a later one; else nothing says that no expert written by itself is missing
    """
    try:
        return chosen_parts(r, terms, token, d, anchor)
    except Unchosen:
        parts = _conditioned(r, terms, token, d, anchor)
        if parts and (alone or parts[0].number is None):
            return parts
        raise


def _conditioned(r: RowReader, terms: list[Term], token: Token, d: Expr, anchor: fx.Node) -> list[Part]:
    """A part for each term, counted under a condition on data that is its own; [] if there are none such."""
    k, at = r.fresh(sympy.Integer(len(terms)), "k"), r.position[anchor]
    try:
        parts = [part_of(r, without_rows(r, t, token, at), token, d, (k, i)) for i, t in enumerate(terms)]
    except Unchosen:
        return []
    conditions = [_own(p) for p in parts]
    found = [c for c in conditions if c]
    if not found or len(set(found)) < len(found) or len(found) == 1 and parts[0].number is not None:
        return []
    if len(found) < len(parts):
        raise Shared({t.product[0] for t, c in zip(terms, conditions) if t.product and not c}, anchor)
    held = any(E.op_of(x) == "nth" for t in terms for e in t.formulas() for x in E.walk(e))
    count = r.ranges[parts[0].choice.k]
    if held and count > MOST:
        why = f"a condition of its own tells the tokens of each of {count} experts: rows of all would be held"
        raise Refuse(why, anchor)
    apart = all(exclude(*a, *b) for a, b in itertools.combinations(conditions, 2))
    for t, part in zip(terms, parts):
        if t.whole and not (apart and part.number is not None and places_choose(r, t, part, token, at, k)):
            raise Refuse("results replace others where the conditions of several experts may hold", anchor)
    # Such places hold one result each.
    return [dataclasses.replace(p, whole=(), puts=()) for p in parts]


def _own(p: Part) -> tuple[Expr, ...]:
    """The conditions on data under which an expert counts, of experts in one stack those on its number."""
    on_data = (c for c in p.choice.counts if any(E.op_of(x) in E.OPAQUE for x in E.walk(c)))
    return tuple(c for c in on_data if p.number is not None or p.choice.k in c.free_symbols)
