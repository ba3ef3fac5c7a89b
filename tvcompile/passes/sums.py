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
from .ids import once
from .movement import CASTS, SPLITS, Index, axis, rounding
from .places import cases, decided, least, opened
from .rows import EMPTY, RowReader, mask_of, over
from .terms_of import Term, coefficient, contracted, inverse, lazily, product, terms_of


class Sums:
    """Terms of the tensors that hold results of the experts: the nodes of `cone`, above the products `ends`."""

    def __init__(self, r: RowReader, cone: set[fx.Node], ends: set[fx.Node]):
        self.r, self.cone, self.ends = r, cone, ends
        self.d: Expr | None = None  # the feature of the result that is read
        r.coarsest = max(rounding(end.meta["val"].dtype) for end in ends)

    def of(self, node: fx.Node, idx: Index, at: int) -> list[Term]:
        """The terms of node[idx] as the operation at position `at` sees it."""
        r = self.r
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
    return s.operand(_uncast(s, n), idx, s.r.position[n])


def _uncast(s: Sums, n: fx.Node) -> fx.Node:
    """What is cast, at least as precisely as the experts give their results."""
    while n.op == "call_function" and s.r.name(n) in CASTS:
        dtype = n.meta["val"].dtype
        if rounding(dtype) > s.r.coarsest:
            raise Refuse(f"what the experts gave is rounded to {str(dtype).removeprefix('torch.')}", n)
        n = n.args[0]
    return n


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
    for rows, index in _pieces(r, a["source"], a["index"]):
        row = r.fresh(r.shape(rows)[0], "r")
        link = (r.read(index, (row,), here), idx[0])
        found += [t.under([row], links=[link]) for t in _times(s.of(rows, (row, *idx[1:]), here), scale)]
    return found


def _pieces(r: RowReader, rows: fx.Node, index: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
    """Rows that were put together from the experts' rows, beside their tokens' numbers."""
    if not (r.name(rows) == r.name(index) == "cat"):
        return [(rows, index)]
    a, b = r.arguments(rows), r.arguments(index)
    pairs = list(zip(a["tensors"], b["tensors"]))
    fit = len(a["tensors"]) == len(b["tensors"]) and all(r.shape(x)[0] == r.shape(y)[0] for x, y in pairs)
    return pairs if fit and axis(a.get("dim", 0), len(r.shape(rows))) == 0 else [(rows, index)]


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


def _scatter(s: Sums, a, n, idx):
    """out.scatter(0, i[:, None].expand_as(y), y) is out[i] = y."""
    r, rows, index = s.r, a.get("src"), a["index"]
    if axis(a["dim"], len(idx)) != 0 or not isinstance(rows, fx.Node) or a.get("reduce") is not None:
        raise Refuse("scatter along another dim than that of the tokens, or of a number", n)
    row = r.fresh(r.shape(rows)[0], "r")
    at = E.as_int(r.read(index, (row, *idx[1:]), r.position[n]))
    features = [x for x in idx[1:] if x.free_symbols]
    if r.shape(rows) != r.shape(index) or r.shape(rows)[1:] != r.shape(n)[1:] or E.mentions(at, *features):
        raise Refuse("scatter sends the features of one row to several tokens, or not all of them", n)
    return _put(s, n, a["self"], ((at,), row, rows), idx, replaced=True)


def _index_put(s: Sums, a, n, idx):
    """out[m] += y, out[m] = y, index_put(accumulate=True)"""
    r = s.r
    base, indices, values, adds = a["self"], a["indices"], a["values"], a.get("accumulate")
    if not r.shape(values):
        raise Refuse("results of experts are replaced by a number", n)
    row = r.fresh(r.shape(values)[0], "r")
    at = _places(r, n, indices, row)
    replaced = not adds
    if replaced and (new := _added_in_place(s, base, indices, values)) is not None:
        if mask_of(n) is None and not once(r, at):
            raise Refuse("out[i] += y adds only one of the rows that meet at one token", n)
        values, replaced = new, False
    return _put(s, n, base, (at, row, values), idx, replaced)


def _index_copy(s: Sums, a, n, idx):
    r = s.r
    if axis(a["dim"], len(idx)) != 0 or a["index"].meta["val"].dim() != 1:
        raise Refuse("index_copy along another dim than that of the tokens", n)
    row = r.fresh(r.shape(a["source"])[0], "r")
    at = (E.as_int(r.read(a["index"], (row,), r.position[n])),)
    return _put(s, n, a["self"], (at, row, a["source"]), idx, replaced=True)


def _masked_scatter(s: Sums, a, n, idx):
    """base.masked_scatter(m[:, None].expand_as(base), rows) is base[m] = rows."""
    r, mask, rows = s.r, a["mask"], a["source"]
    while mask.op == "call_function" and r.name(mask) in (
        "expand",
        "expand_as",
        "unsqueeze",
        "view",
        "reshape",
        "broadcast_to",
    ):
        mask = mask.args[0]
    lead = mask.meta["val"].dim()
    whole = E.as_bool(r.operand(a["mask"], idx, r.position[n]))
    alike = lead < len(idx) and whole == E.as_bool(r.read(mask, idx[:lead], r.position[n]))
    if not alike or r.shape(rows)[1:] != r.shape(n)[lead:] or r.shape(a["self"]) != r.shape(n):
        raise Refuse("masked_scatter takes single elements, not rows", n)
    row = r.fresh(r.shape(rows)[0], "r")
    at = tuple(r.nth(mask, c, row) for c in range(lead))
    return _put(s, n, a["self"], (at, row, rows), idx, replaced=True)


def _put(s: Sums, n: fx.Node, base: fx.Node, put: tuple[Index, Expr, fx.Node], idx: Index, replaced: bool):
    """The terms of a base to which rows are added, or in which they take the places of what was there."""
    here, (at, row, values) = s.r.position[n], put
    links, places = list(zip(at, idx)), idx[: len(at)] if replaced else ()
    if len(s.r.shape(values)) != len(idx) - len(at) + 1:
        raise Refuse("what is put is not a row for each place", n)
    before, rows = s.of(base, idx, here), s.of(values, (row, *idx[len(at) :]), here)
    # What is put under a condition of its own is zero elsewhere, where the place is replaced too.
    everywhere = [not (t.bound or t.guards or t.links) for t in rows]
    if places and any(t.product for t in before) and not (all(everywhere) and any(t.product for t in rows)):
        raise Refuse("results of experts are replaced where there may be none", n)
    whole = places if before or not once(s.r, at) else ()  # else nothing is replaced: what is put is added to zeros
    after = [
        t.under([row], links=links, whole=whole, puts=[n.name] if places and everywhere[i] else ())
        for i, t in enumerate(rows)
    ]
    if places:
        before = [t if t.product or t.links else t.under(puts=[n.name]) for t in before]
    return before + after


def _places(r: RowReader, n: fx.Node, indices: list, row: Expr) -> Index:
    """Where row `row` is put."""
    if (mask := mask_of(n)) is not None:
        if indices[0] is not mask:
            raise Refuse("results of experts are put along another dim than that of the tokens", n)
        return tuple(r.nth(mask, c, row) for c in range(mask.meta["val"].dim()))
    if any(i is None or i.meta["val"].dim() != 1 for i in indices):
        raise Refuse("results of experts are put at places that are no list", n)
    return tuple(E.as_int(r.read(i, (row,), r.position[n])) for i in indices)


def _added_in_place(s: Sums, base: fx.Node, indices: list, values: fx.Node) -> fx.Node | None:
    """y of `out[i] = out[i] + y`"""
    total = _uncast(s, values)
    if s.r.name(total) != "add" or len(total.args) != 2 or total.kwargs:
        return None
    parts = {x: _uncast(s, x) for x in total.args if isinstance(x, fx.Node)}
    old = [x for x, y in parts.items() if s.r.name(y) == "index" and y.args[0] is base]
    if len(old) != 1 or not _same_places(s.r, parts[old[0]].args[1], indices):
        return None
    return next(x for x in total.args if x is not old[0])


def _same_places(r: RowReader, a: list, b: list) -> bool:
    if len(a) != len(b):
        return False
    return all(x is y or (x is not None and y is not None and _alike(r, x, y)) for x, y in zip(a, b))


def _alike(r: RowReader, x: fx.Node, y: fx.Node) -> bool:
    probe = tuple(r.fresh(n, "p") for n in r.shape(x))
    return r.shape(x) == r.shape(y) and r.read(x, probe, r.position[x] + 1) == r.read(y, probe, r.position[y] + 1)


def _where(s: Sums, a, n, idx):
    r, here = s.r, s.r.position[n]
    c = r.truth(E.as_bool(r.operand(a["condition"], idx, here)))
    yes = [t.under(guards=[c]) for t in s.operand(a["self"], idx, here)]
    return yes + [t.under(guards=[E.not_(c)]) for t in s.operand(a["other"], idx, here)]


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
    for part in a["tensors"]:
        if len(r.shape(part)) != len(idx):
            raise Refuse("results of experts are joined with what has other dims", n)
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
    "scatter": _scatter,
    "index_put": _index_put,
    "index_copy": _index_copy,
    "masked_scatter": _masked_scatter,
    "where": _where,
    "masked_fill": _masked_fill,
    "stack": _stack,
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
}
# Data movement and sums that results of experts go through.
THROUGH = frozenset(LINEAR) | frozenset(SPLITS) | {"getitem"}
