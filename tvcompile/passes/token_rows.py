"""What an expert reads: a token's row, as it is, weighed, cleared where it is not the expert's, or sent to a place."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import sympy
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse
from .buffers import Way, rows_put
from .capacity import placed_row
from .chosen import numbered
from .contraction import CONTRACTIONS, operands_of
from .ids import SCATTERS, distinct
from .movement import CASTS, MOVEMENT, Index, rounding
from .places import flat
from .projections import Fix, Row, is_row, path_of
from .rows import RowReader, over as positions_of
from .terms_of import Closed, lazily, terms_of


def token_row(r: RowReader, node: fx.Node, idx: Index, at: int, row: Row):
    """(x, factors) where the row is x[t] times the factors, each a formula of the token and its expert."""
    over, fix = row.over, row.fix
    path = [(x, tuple(map(fix, where)), used) for x, where, used in path_of(r, node, idx, at)]
    for x, where, used in reversed(path):
        if is_row(r, x, where, row.t, over, row.length):
            r._note_use(x, used)
            return x, ()
    leaf, where, used = path[-1]
    name, a, here = (r.name(leaf), r.arguments(leaf), r.position[leaf]) if leaf.op == "call_function" else ("", {}, 0)
    if name in CASTS:
        if rounding(leaf.meta["val"].dtype) > rounding(row.dtype):
            raise Refuse(f"the rows of an expert are rounded to {leaf.meta['val'].dtype}", leaf)
        return token_row(r, a["self"], where, here, row)
    if (split := weighed_by(r, leaf, where, over, fix)) is not None:
        (rows, at_rows), factors = split
        x, rest = token_row(r, rows, at_rows, here, row)
        return x, (*factors, *rest)
    made = name and name not in MOVEMENT and name not in ("index", *CONTRACTIONS, *SCATTERS)
    refused = Refuse(f"the rows of an expert are not its tokens{f', but what {name} gives' * bool(made)}", leaf)
    ways = Closed(over, masked=False), Closed(over, masked=True), None
    for (idx, one), closed in itertools.product([(where, row), *of_every_expert(r, leaf, where, row)], ways):
        try:
            if name in CONTRACTIONS and (terms := terms_of(r, fix(r.read(leaf, idx, used)), closed)):
                return placed_row(r, [Way(x) for x in terms], leaf, one), ()
            if (put := rows_put(r, leaf, idx, used, fix, closed)) is not None:
                return placed_row(r, put, leaf, one), ()
        except Refuse as why:
            refused = why
    raise refused


def of_every_expert(r: RowReader, leaf: fx.Node, where: Index, row: Row) -> Iterator[tuple[Index, Row]]:
    """leaf[3, c] as leaf[e, c], and leaf[3*C + c] as leaf[e*C + c], with what has to be a row of expert 3 at e = 3."""
    for ids, n in {found for g in row.outer.guards if (found := numbered(g)) is not None}:
        for j, (x, size) in enumerate(zip(where, r.shape(leaf))):
            places = [s for s in (x - n * r.ranges[s] for s in x.free_symbols & set(r.ranges)) if s in r.ranges]
            C = sympy.Integer(1) if x == n else r.ranges[places[0]] if len(places) == 1 else None
            count = size // C if C is not None else sympy.Integer(0)  # a row beyond the places may be for what has none
            if not count.is_Integer or not n < count:
                continue
            e = r.fresh(count, "e")
            guards = (E.eq(e, ids) if numbered(g) == (ids, n) else g for g in row.outer.guards)
            outer = dataclasses.replace(row.outer, bound=(*row.outer.bound, e), guards=tuple(guards))
            at = (*where[:j], sympy.expand(x + (e - n) * C), *where[j + 1 :])
            yield at, dataclasses.replace(row, outer=outer, number=sympy.Integer(n))


def weighed_by(r: RowReader, leaf: fx.Node, where: Index, over: Expr, fix: Fix):
    """((rows, their index), factors) where a row is others times factors that are alike in all of its features."""
    if (kept := _kept_where(r, leaf, where, fix)) is not None:
        rows, holds = kept
        return None if E.mentions(holds, over) else (rows, tuple(map(condition, flat([holds]))))
    sides = sorted(_sides(r, leaf, where), key=lambda side: E.mentions(sympy.Tuple(*side[1]), over))
    if len(sides) != 2 or E.mentions(sympy.Tuple(*sides[0][1]), over):
        return None
    (factor, at_factor), rows = sides
    formula = fix(lazily(r, factor, at_factor, r.position[leaf]))
    if (call := _any_choice(r, formula)) is not None:
        return rows, (condition(call),)
    terms = terms_of(r, formula)
    if len(terms) != 1 or terms[0].bound or terms[0].links:
        raise Refuse("the weight of an expert's input is no product", leaf)
    return rows, (*terms[0].factors, *map(condition, terms[0].guards))


def _kept_where(r: RowReader, node: fx.Node, idx: Index, fix: Fix):
    """((rows, their index), condition) of where(condition, rows, 0), and of rows.masked_fill(not condition, 0)."""
    if node.op != "call_function" or r.name(node) not in ("where", "masked_fill"):
        return None
    a, here = r.arguments(node), r.position[node]
    fills = r.name(node) == "masked_fill"
    rows, mask, other = (a["self"], a["mask"], a["value"]) if fills else (a.get("self"), a["condition"], a.get("other"))
    if not isinstance(rows, fx.Node) or other is None or E.constant(r.operand(other, idx, here)) != 0:
        return None
    holds = E.as_bool(r.operand(mask, idx, here))
    return (rows, r.broadcast(rows, idx)), fix(E.not_(holds) if fills else holds)


def condition(holds: Expr) -> Expr:
    """A factor that is 1 where a condition holds."""
    return E.where(holds, E.number(1.0), E.number(0.0))


def is_condition(factor: Expr) -> bool:
    return E.op_of(factor) == "where" and [E.constant(x) for x in E.operands(factor)[1:]] == [1, 0]


def _sides(r: RowReader, node: fx.Node, idx: Index) -> list[tuple[fx.Node, Index]]:
    """The factors of a product, each with its index; none of what is a sum of products."""
    if node.op != "call_function" or r.name(node) not in ("mul", "einsum"):
        return []
    if r.name(node) == "einsum":
        sides, bound = operands_of(r, node, idx)
        return [] if bound else sides
    a = r.arguments(node)
    return [(x, r.broadcast(x, idx)) for x in (a["self"], a["other"]) if isinstance(x, fx.Node)]


def _any_choice(r: RowReader, e: Expr) -> Expr | None:
    """That any choice of a token is an expert, where a sum over its choices is 1 for that: its ids differ."""
    e = _uncast(e)
    if E.op_of(e) not in ("reduce", "count") or r.name(node := r.nodes[E.operands(e)[0].name]) != "sum":
        return None
    source, at, positions = positions_of(r, node, E.operands(e)[1:])
    one_hot = _uncast(r.read(source, at, r.position[node]))
    if not is_condition(one_hot):
        return None
    hit = E.operands(one_hot)[0]
    loads = E.loads(hit)
    if E.op_of(hit) != "eq" or len(loads) != 1 or [E.operands(loads[0])[-1]] != positions:
        return None
    return E.BoolCall("any", *E.operands(e)) if distinct(r, r.nodes[E.operands(loads[0])[0].name[1:]]) else None


def _uncast(e: Expr) -> Expr:
    while E.op_of(e) in E.CASTS:
        (e,) = E.operands(e)
    return e
