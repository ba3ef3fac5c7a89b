"""A tensor's element as a sum of terms, each a product of formulas and at most one projection of an expert.

    out[t, d] = sum over bound positions, where the guards hold and the links meet, of factors * product
    out.index_add(0, tok, y * w)[t, d] = out[t, d] + sum_r (tok[r] = t) w[r] * y[r, d]

Only operations that are linear in what the experts give are opened; any other raises Refuse.
"""

from __future__ import annotations

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Refuse
from .contraction import added, further
from .counts import counts
from .joined import piece_at, pieces, sorted_parts
from .movement import CASTS, SPLITS, Index, axis, rounding, unravel
from .places import cases, decided, least, opened
from .puts import PUTS
from .rows import EMPTY, RowReader, over
from .terms_of import Term, coefficient, contracted, inverse, lazily, product, terms_of

MOST = 1 << 14  # nodes of a sum that are looked at; where a condition chooses between two sums there may be 2^E


class TooMany(Refuse):
    """A sum of so many terms that reading it would not end."""


class Sums:
    """Terms of the tensors that hold results of the experts: the nodes of `cone`, above the products `ends`."""

    def __init__(self, r: RowReader, cone: set[fx.Node], ends: set[fx.Node]):
        self.r, self.cone, self.ends = r, cone, ends
        self.d: Expr | None = None  # the feature of the result that is read
        self.left = 0  # nodes that may still be looked at
        r.coarsest = max(rounding(end.meta["val"].dtype) for end in ends)

    def of(self, node: fx.Node, idx: Index, at: int) -> list[Term]:
        """The terms of node[idx] as the operation at position `at` sees it."""
        r = self.r
        self.left -= 1
        if self.left < 0:
            raise TooMany("the results of the experts are added up in too many ways to read", node)
        if node.op == "call_function" and r.name(node) in EMPTY:
            return []  # nobody may ask what is in memory that was never written
        if node not in self.cone:
            return coefficient(r, lazily(r, node, idx, at, self.d))
        if r.changed(node, at):
            raise Refuse("what the experts gave is written to before it is added up", node)
        if node in self.ends:
            bias, also = added(r, node, idx), tuple(r.fresh(n, "e") for n in further(r, node))
            return [Term(product=(node, (*also, *idx))).under(also)] + ([] if bias is None else [Term(factors=(bias,))])
        moved = r.step(node, idx)
        if moved is not None and any(map(counts, moved[1])):
            return self.at_places(node, *moved)
        if moved is not None:
            return self.of(moved[0], moved[1], r.position[node])
        rule = LINEAR.get(r.name(node))
        if rule is None:
            raise Refuse(f"{r.name(node)} of what the experts gave is no weighted sum", node)
        return rule(self, r.arguments(node), node, idx)

    def at_places(self, node: fx.Node, source: fx.Node, at: Index) -> list[Term]:
        """What is read at counted places: source[place] = sum_n (n = place) source[n]"""
        r, found = self.r, []
        ways: list[tuple[tuple[Expr, ...], Index]] = [((), ())]
        for x in at:
            split = list(cases(x)) if E.loads(x) or counts(x) else [((), x)]
            ways = [((*g, *conditions), (*done, y)) for g, done in ways for conditions, y in split]
        for given, where in ways:
            if (guards := decided(r, given)) is None:
                continue
            bound, conditions, read = [], list(guards), []
            for x, n in zip(where, r.shape(source)):
                if E.loads(x) or counts(x):
                    if (low := least(r, opened(r, x, guards))) is None or low < 0:
                        raise Refuse("the places that are read back may count from the end", node)
                    bound.append(r.fresh(n, "n"))
                    conditions.append(E.eq(bound[-1], x))
                    x = bound[-1]
                elif x.is_Integer and x < 0:
                    x = x + n
                read.append(x)
            terms = self.of(source, tuple(read), r.position[node])
            found += [t.under(bound, conditions) for t in terms]
        return found

    def operand(self, value, idx: Index, at: int) -> list[Term]:
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
            return self.of(value, self.r.broadcast(value, idx), at)
        return terms_of(self.r, self.r.scalar(value))

    def uncast(self, n: fx.Node) -> fx.Node:
        """What is cast, at least as precisely as the experts give their results."""
        while n.op == "call_function" and self.r.name(n) in CASTS:
            dtype = n.meta["val"].dtype
            if rounding(dtype) > self.r.coarsest:
                raise Refuse(f"what the experts gave is rounded to {str(dtype).removeprefix('torch.')}", n)
            n = n.args[0]
        return n


def _add(sign: float):
    def rule(s: Sums, a, n, idx):
        here, scale = s.r.position[n], E.as_float(s.r.scalar(a.get("alpha", 1)))
        return s.operand(a["self"], idx, here) + _times(_times(s.operand(a["other"], idx, here), scale), E.number(sign))

    return rule


def _times(terms: list[Term], factor: Expr) -> list[Term]:
    return terms if E.constant(factor) == 1 else [t.times(Term(factors=(factor,))) for t in terms]


def _neg(s: Sums, a, n, idx):
    return _times(s.operand(a["self"], idx, s.r.position[n]), E.number(-1.0))


def _mul(s: Sums, a, n, idx):
    here = s.r.position[n]
    return product(s.operand(a["self"], idx, here), s.operand(a["other"], idx, here))


def _addcmul(s: Sums, a, n, idx):
    here, scale = s.r.position[n], E.as_float(s.r.scalar(a.get("value", 1)))
    both = product(s.operand(a["tensor1"], idx, here), s.operand(a["tensor2"], idx, here))
    return s.operand(a["self"], idx, here) + _times(both, scale)


def _div(s: Sums, a, n, idx):
    here = s.r.position[n]
    if a.get("rounding_mode") is not None or a["other"] in s.cone:
        raise Refuse("it is divided by what the experts gave", n)
    other = a["other"]
    e = s.r.operand(other, idx, here) if isinstance(other, fx.Node) else s.r.scalar(other)
    return [t.times(inverse(e)) for t in s.operand(a["self"], idx, here)]


def _cast(s: Sums, a, n, idx):
    return s.operand(s.uncast(n), idx, s.r.position[n])


def _dropout(s: Sums, a, n, idx):
    if a.get("train", True) and a["p"]:
        raise Refuse("dropout is applied to what an expert gives", n)
    return s.operand(a["input"], idx, s.r.position[n])


def _sum(s: Sums, a, n, idx):
    source, at, bound = over(s.r, n, idx)
    return [t.under(bound) for t in s.of(source, at, s.r.position[n])]


def _contract(s: Sums, a, n, idx):
    return contracted(s.r, n, idx, s.of)


def _index_add(s: Sums, a, n, idx):
    r, here = s.r, s.r.position[n]
    if axis(a["dim"], len(idx)) != 0:
        raise Refuse("index_add along another dim than that of the tokens", n)
    found, scale = s.of(a["self"], idx, here), E.as_float(r.scalar(a.get("alpha", 1)))
    for index, start in pieces(r, a["index"]):
        row = r.fresh(r.shape(index)[0], "r")
        link, at = (r.read(index, (row,), here), idx[0]), sympy.expand(start + row)
        found += [t.under([row], links=[link]) for t in _times(s.of(a["source"], (at, *idx[1:]), here), scale)]
    return found


def _scatter_add(s: Sums, a, n, idx):
    r, here = s.r, s.r.position[n]
    rows, index = a["src"], a["index"]
    if axis(a["dim"], len(idx)) != 0 or r.shape(rows) != r.shape(index):
        raise Refuse("scatter_add along another dim than that of the tokens", n)
    row = r.fresh(r.shape(rows)[0], "r")
    at = r.read(index, (row, *idx[1:]), here)
    if any(E.mentions(at, x) for x in idx[1:] if x.free_symbols):
        raise Refuse("scatter_add sends the features of one row to several tokens", n)
    added = [t.under([row], links=[(at, idx[0])]) for t in s.of(rows, (row, *idx[1:]), here)]
    return s.of(a["self"], idx, here) + added


def _scatter_reduce(s: Sums, a, n, idx):
    if a["reduce"] != "sum" or not a.get("include_self", True):
        raise Refuse("scatter_reduce of what the experts gave is no sum", n)
    return _scatter_add(s, a, n, idx)


def _where(s: Sums, a, n, idx):
    r, here = s.r, s.r.position[n]
    c = r.truth(E.as_bool(r.operand(a["condition"], idx, here)))
    for more, same, holds in ((a["self"], a["other"], c), (a["other"], a["self"], E.not_(c))):
        if (rest := _added_to(r, more, same, here)) is not None:
            added = s.operand(rest, r.broadcast(more, idx), r.position[more])
            return s.operand(same, idx, here) + [t.under(guards=[holds]) for t in added]
    yes = [t.under(guards=[c]) for t in s.operand(a["self"], idx, here)]
    return yes + [t.under(guards=[E.not_(c)]) for t in s.operand(a["other"], idx, here)]


def _added_to(r: RowReader, more, same, at: int) -> fx.Node | None:
    """y where `more` is same + y: to what is chosen either way y is added under the condition."""
    if not isinstance(more, fx.Node) or not isinstance(same, fx.Node) or more.op != "call_function":
        return None
    a = r.arguments(more) if r.name(more) == "add" else {}
    sides = a.get("self"), a.get("other")
    if a.get("alpha", 1) != 1 or same not in sides:
        return None
    if r.changed(more, at) or r.changed_between(same, r.position[more] - 1, at):
        return None
    rest = sides[1 - sides.index(same)]
    return rest if isinstance(rest, fx.Node) else None


def _masked_fill(s: Sums, a, n, idx):
    r, here = s.r, s.r.position[n]
    if E.constant(r.operand(a["value"], (), here)) != 0:
        raise Refuse("results of experts are filled with a number", n)
    c = E.not_(r.truth(r.operand(a["mask"], idx, here)))
    return [t.under(guards=[c]) for t in s.operand(a["self"], idx, here)]


def _stack(s: Sums, a, n, idx):
    """A stack of the experts' results at a position that a tensor says."""
    d = axis(a.get("dim", 0), len(idx))
    rest, here = idx[:d] + idx[d + 1 :], s.r.position[n]
    found = []
    for k, part in enumerate(a["tensors"]):
        guard = E.eq(idx[d], sympy.Integer(k))
        found += [
            t.under(guards=[guard] if guard is not E.TRUE else [])
            for t in s.of(part, rest, here)
            if guard is not E.FALSE
        ]
    return found


def _cat(s: Sums, a, n, idx):
    """Parts one after the other, read at a position that a tensor says."""
    r, here = s.r, s.r.position[n]
    d, start, found = axis(a.get("dim", 0), len(idx)), sympy.Integer(0), []
    if any(len(r.shape(part)) != len(idx) for part in a["tensors"]):
        raise Refuse("results of experts are joined with what has other dims", n)
    sizes = {r.shape(part)[d] for part in a["tensors"]}
    if len(sizes) == 1 and not idx[d].is_Symbol:  # the parts lie one after the other as those of a stack do
        k, own = unravel(idx[d], (sympy.Integer(len(a["tensors"])), *sizes), r.bounds)
        guards = [E.eq(k, sympy.Integer(i)) for i in range(len(a["tensors"]))]
        parts = [
            s.of(part, (*idx[:d], own, *idx[d + 1 :]), here) if g is not E.FALSE else []
            for part, g in zip(a["tensors"], guards)
        ]
        return [t.under(guards=[g] if g is not E.TRUE else []) for terms, g in zip(parts, guards) for t in terms]
    if (piece := piece_at(r, a["tensors"], d, idx[d])) is not None:
        return s.of(piece[0], (*idx[:d], piece[1], *idx[d + 1 :]), here)
    for mask, part in zip(sorted_parts(r, a["tensors"]) if d == 0 else (), a["tensors"]):
        row = r.fresh(r.shape(part)[0], "r")
        terms = s.of(part, (row, *idx[1:]), here)
        found += [t.under([row], links=[(r.nth(mask, 0, row), idx[0])]) for t in terms]
    if found:
        return found
    for part in a["tensors"]:
        own = r.fresh(r.shape(part)[d], "n")
        guard = E.eq(idx[d], sympy.expand(start + own))
        if guard is not E.FALSE:
            terms = s.of(part, (*idx[:d], own, *idx[d + 1 :]), here)
            found += [t.under([own], [] if guard is E.TRUE else [guard]) for t in terms]
        start = sympy.expand(start + r.shape(part)[d])
    return found


def _pad(s: Sums, a, n, idx):
    """Zeros around, read at a position that a tensor says."""
    if (
        a.get("mode", "constant") != "constant"
        or a.get("value")
        or any(not isinstance(k, int) or k < 0 for k in a["pad"])
    ):
        raise Refuse("results of experts are padded with what is not zero, or cut", n)
    at, bound, guards = list(idx), [], []
    for d, left, right in zip(range(len(idx))[::-1], a["pad"][::2], a["pad"][1::2]):
        if left or right:
            at[d] = s.r.fresh(s.r.shape(a["self"])[d], "n")
            bound.append(at[d])
            guards.append(E.eq(idx[d], left + at[d]))
    if E.FALSE in guards:
        return []
    terms = s.of(a["self"], tuple(at), s.r.position[n])
    return [t.under(bound, [g for g in guards if g is not E.TRUE]) for t in terms]


LINEAR = {
    "add": _add(1.0),
    "sub": _add(-1.0),
    "neg": _neg,
    "mul": _mul,
    "multiply": _mul,
    "addcmul": _addcmul,
    "div": _div,
    **dict.fromkeys(CASTS, _cast),
    "dropout": _dropout,
    "sum": _sum,
    **dict.fromkeys(("matmul", "bmm", "mm", "einsum"), _contract),
    "index_add": _index_add,
    "scatter_add": _scatter_add,
    "scatter_reduce": _scatter_reduce,
    **PUTS,
    "where": _where,
    "masked_fill": _masked_fill,
    "stack": _stack,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
}
# Data movement and sums that results of experts go through.
THROUGH = frozenset(LINEAR) | frozenset(SPLITS) | {"getitem"}
