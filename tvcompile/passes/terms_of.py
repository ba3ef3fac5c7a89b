"""A formula as a sum of terms: guarded products, opened as far as they say which expert is meant.

(w * (ids == e)).sum(-1)[t]   ->   sum_k  where ids[t,k] = e:  w[t,k]
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse
from .contraction import added, operands_of
from .ids import scattered
from .movement import Index, rounding
from .rows import RowReader, is_zeros, over, settle


@dataclasses.dataclass(frozen=True)
class Term:
    """bound: summed positions; guards: conditions; links: pairs of equal positions; product: (node, index) or None.

    known  what calls of `nth` with the row of the product stand for
    whole  where `out[i] = y` replaced what was there rather than adding to it: the places, as the result reads them
    puts   names of such `out[i] = y`: of results the one that put all of them, of others those that replaced them
    """

    bound: tuple[Expr, ...] = ()
    guards: tuple[Expr, ...] = ()
    links: tuple[tuple[Expr, Expr], ...] = ()
    factors: tuple[Expr, ...] = ()
    product: tuple[fx.Node, Index] | None = None
    whole: tuple[Expr, ...] = ()
    known: tuple[tuple[Expr, Expr], ...] = ()
    puts: tuple[str, ...] = ()

    def times(self, other: Term) -> Term:
        if self.product and other.product:
            raise Refuse("results of two experts are multiplied", self.product[0])
        return Term(
            self.bound + other.bound, self.guards + other.guards, self.links + other.links,
            self.factors + other.factors, self.product or other.product, self.whole + other.whole,
            self.known + other.known, self.puts + other.puts,
        )  # fmt: skip

    def under(self, bound=(), guards=(), links=(), whole=(), puts=()) -> Term:
        bound = tuple(b for b in bound if b != 0)
        return self.times(Term(bound, tuple(guards), tuple(links), whole=tuple(whole), puts=tuple(puts)))

    def formulas(self) -> tuple[Expr, ...]:
        links = tuple(e for pair in self.links for e in pair)
        return (*self.guards, *links, *self.factors, *(self.product[1] if self.product else ()))

    def rewritten(self, change: Callable[[Expr], Expr]) -> Term:
        return dataclasses.replace(
            self,
            guards=tuple(g for g in map(change, self.guards) if g is not E.TRUE),
            links=tuple((change(a), change(b)) for a, b in self.links),
            factors=tuple(map(change, self.factors)),
            whole=tuple(map(change, self.whole)),
            known=tuple((a, change(b)) for a, b in self.known),
            product=self.product and (self.product[0], tuple(map(change, self.product[1]))),
        )

    def put(self, table: dict, bounds=None) -> Term:
        return self.rewritten(lambda e: settle(E.substitute(e, table, bounds), bounds))


def product(left: list[Term], right: list[Term]) -> list[Term]:
    return [a.times(b) for a in left for b in right]


def lazily(r: RowReader, node: fx.Node, idx: Index, at: int, d: Expr | None = None) -> Expr:
    """The formula of node[idx]; what holds no choice of experts, or feature d, stays the program's own tensor."""
    node, idx, at = r.path(node, idx, at)[-1]
    if d is not None and E.mentions(sympy.Tuple(*idx), d) and not is_zeros(r, node):
        return r.leaf(node, idx, at)
    opened = r.read(node, idx, at)
    if opened in (E.TRUE, E.FALSE) or E.constant(opened) is not None or chooses(r, opened):
        return opened
    return r.leaf(node, idx, at) if isinstance(node.meta["val"], torch.Tensor) else opened


@dataclasses.dataclass(frozen=True)
class Closed:
    """How rows on their way to the experts are read: as tensors of the program, whose formulas stay closed.

    feature   the position of their features
    masked    whether a row times a number of its own shows both, as where the number says that the row counts
    """

    feature: Expr
    masked: bool

    def read(self, r: RowReader, node: fx.Node, idx: Index, at: int) -> Expr:
        node, idx, at = r.path(node, idx, at)[-1]
        if is_zeros(r, node):
            return r.read(node, idx, at)
        closed = r.changed(node, at) or r.cut(node) or node.op != "call_function" or r.name(node) != "mul"
        if closed or not self.masked or all(_wide(r, x) for x in node.args):
            return r.leaf(node, idx, at)
        row, here = dataclasses.replace(self, masked=False), r.position[node]
        sides = (
            row.read(r, x, r.broadcast(x, idx), here) if _wide(r, x) else r.operand(x, idx, here) for x in node.args
        )
        return E.apply("mul", *sides)


def _wide(r: RowReader, x: fx.Node | float) -> bool:
    """Has an operand an element for every feature?"""
    return isinstance(x, fx.Node) and isinstance(x.meta.get("val"), torch.Tensor) and r.shape(x)[-1:] not in ((), (1,))


def chooses(r: RowReader, e: Expr) -> bool:
    """Does the formula say which expert is meant: by a comparison, or what it sums or scatters does?"""
    for x in E.walk(e):
        op = E.op_of(x)
        if E.kind(x) == "bool" or op in ("where", "perm", "nth", "inv", "count"):
            return True
        if op in ("dot", "reduce", "softmax") and E.operands(x):
            node = r.nodes[E.operands(x)[0].name]
            if any(_chooses_inside(r, source) for source in node.all_input_nodes):
                return True
        if op == "load" and scattered(r, x):
            return True
    return False


def _chooses_inside(r: RowReader, node: fx.Node) -> bool:
    val = node.meta.get("val")
    if not isinstance(val, torch.Tensor) or val.dtype in (torch.int64, torch.int32) or node.op != "call_function":
        return isinstance(val, torch.Tensor) and node.op == "call_function" and r.name(node) in ("one_hot", "eq")
    if node not in r.choosing:
        # Everything that is computed before it may be inside: each tensor is asked once.
        probe = tuple(r.fresh(n, "z") for n in r.shape(node))
        r.choosing[node] = chooses(r, r.read(node, probe, r.position[node] + 1))
    return r.choosing[node]


def terms_of(r: RowReader, e: Expr, closed: Closed | None = None) -> list[Term]:
    """A formula as a sum of guarded products; closed: how operands of sums of products are read that have features."""
    value, op = E.constant(e), E.op_of(e)
    if value is not None and not isinstance(value, bool) and value == 0:
        return []
    if value is not None and value == 1:
        return [Term()]
    if E.kind(e) == "bool":
        return [Term(guards=e.args if isinstance(e, sympy.And) else (e,))]
    if op == "mul":
        a, b = E.operands(e)
        return product(terms_of(r, a, closed), terms_of(r, b, closed))
    if op == "add":
        return [t for x in E.operands(e) for t in terms_of(r, x, closed)]
    if op == "div" and chooses(r, E.operands(e)[0]):
        a, b = E.operands(e)
        return [t.times(inverse(b)) for t in terms_of(r, a, closed)]
    if isinstance(e, (sympy.Mul, sympy.Pow)) and e.atoms(E.IntCall):
        parts = e.args if isinstance(e, sympy.Mul) else [e.args[0]] * int(e.args[1])
        found = [Term()]
        for x in parts:
            found = product(found, terms_of(r, x, closed))
        return found
    if isinstance(e, sympy.Add) and e.atoms(E.IntCall) and chooses(r, e):
        return [t for x in e.args for t in terms_of(r, x, closed)]
    if op == "where":
        c, a, b = E.operands(e)
        if E.constant(b) == 0:
            return [t.under(guards=[c]) for t in terms_of(r, a, closed)]
        if E.constant(a) == 0:
            return [t.under(guards=[E.not_(c)]) for t in terms_of(r, b, closed)]
        if (more := _gap(a, b)) is not None:
            return [t.under(guards=[c]) for t in terms_of(r, E.number(more), closed)] + terms_of(r, b, closed)
    if op in E.CASTS:
        (inner,) = E.operands(e)
        if rounding(op) <= r.coarsest:
            split = E.op_of(inner) == "add" and chooses(r, inner)
            if split or E.kind(inner) == "int" or E.op_of(inner) in OPENED:
                return terms_of(r, inner, closed)
        elif E.kind(inner) == "int" and len(found := terms_of(r, inner)) == 1 and not found[0].factors:
            return found  # a one or a zero is exact in every dtype
    if op == "reduce" and chooses(r, e):
        return _summed(r, r.nodes[E.operands(e)[0].name], E.operands(e)[1:]) or [Term(factors=(e,))]
    if op == "dot" and chooses(r, e):
        node, idx = r.nodes[E.operands(e)[0].name], tuple(E.operands(e)[1:])
        more = added(r, node, idx)
        return contracted(r, node, idx, terms_of, closed) + ([] if more is None else terms_of(r, more, closed))
    return [Term(factors=(e,))]


def inverse(e: Expr) -> Term:
    """1 / e as a factor."""
    value = E.constant(e)
    if value == 0:
        raise Refuse("what the experts gave, or their weight, is divided by 0")
    return Term(factors=(E.apply("reciprocal", E.as_float(e)) if value is None else E.number(1.0 / value),))


def _gap(a: Expr, b: Expr) -> float | None:
    """By how much a is more than b >= 0, if that is one number, as of where(c, 2.0, 1.0) and where(c, 1.0, 0.0).

    Of counts only: with other numbers, a sum of the two would be less precise than a.
    """
    x, y = E.constant(a), E.constant(b)
    if x is not None and y is not None:
        return x - y if x in range(1024) and y in range(1024) and x >= y else None
    if E.op_of(a) == E.op_of(b) == "where" and E.operands(a)[0] == E.operands(b)[0]:
        first, second = (_gap(p, q) for p, q in zip(E.operands(a)[1:], E.operands(b)[1:]))
        return first if first == second else None
    return None


def coefficient(r: RowReader, e: Expr) -> list[Term]:
    """The terms of what rows are multiplied by, where a sum of integers is a sum and no number of a place."""
    return [x for t in terms_of(r, e) for x in _with_sums(r, t)]


def _with_sums(r: RowReader, t: Term) -> list[Term]:
    for f in t.factors:
        inner = f
        while E.op_of(inner) in E.CASTS and rounding(E.op_of(inner)) <= r.coarsest:
            (inner,) = E.operands(inner)
        if E.op_of(inner) == "count" and chooses(r, inner):
            found = _summed(r, r.nodes[E.operands(inner)[0].name], E.operands(inner)[1:])
            if found is not None:
                rest = dataclasses.replace(t, factors=tuple(x for x in t.factors if x is not f))
                return [x for s in found for x in _with_sums(r, rest.times(s))]
    return [t]


OPENED = ("mul", "where", "reduce", "dot", *E.CASTS)


def _summed(r: RowReader, node: fx.Node, idx: Index) -> list[Term] | None:
    if r.name(node) != "sum":
        return None
    source, at, bound = over(r, node, idx)
    return [t.under(bound) for t in terms_of(r, r.read(source, at, r.position[node]))]


def contracted(r: RowReader, node: fx.Node, idx: Index, terms: Callable, closed: Closed | None = None) -> list[Term]:
    """The terms of a sum of products of which no operand is a projection."""
    sides, bound = operands_of(r, node, idx)
    found = [Term()]
    for source, at in sides:
        if closed is not None and E.mentions(sympy.Tuple(*at), closed.feature):
            found = product(found, terms_of(r, closed.read(r, source, at, r.position[node])))
        elif terms is terms_of:
            found = product(found, coefficient(r, r.read(source, at, r.position[node])))
        else:
            found = product(found, terms(source, at, r.position[node]))
    return [t.under(bound) for t in found]
