"""A tensor's element as a sum of terms, each a product of formulas and at most one projection of an expert.

    out[t, d] = sum over bound positions, where the guards hold and the links meet, of factors * product
    out.index_add(0, tok, y * w)[t, d] = out[t, d] + sum_r (tok[r] = t) w[r] * y[r, d]

Only operations that are linear in what the experts give are opened; any other raises Refuse.
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
from .contraction import contraction, letters
from .movement import SPLITS, Index, axis
from .rows import RowReader, mask_of, over, settle


@dataclasses.dataclass(frozen=True)
class Term:
    """bound: summed positions; guards: conditions; links: pairs of equal positions; product: (node, index) or None.

    known  what calls of `nth` with the row of the product stand for
    whole  where `out[i] = y` replaced what was there rather than adding to it: the places, as the result reads them
    """

    bound: tuple[Expr, ...] = ()
    guards: tuple[Expr, ...] = ()
    links: tuple[tuple[Expr, Expr], ...] = ()
    factors: tuple[Expr, ...] = ()
    product: tuple[fx.Node, Index] | None = None
    whole: tuple[Expr, ...] = ()
    known: tuple[tuple[Expr, Expr], ...] = ()

    def times(self, other: Term) -> Term:
        if self.product and other.product:
            raise Refuse("results of two experts are multiplied", self.product[0])
        return Term(
            self.bound + other.bound, self.guards + other.guards, self.links + other.links,
            self.factors + other.factors, self.product or other.product, self.whole + other.whole,
            self.known + other.known,
        )  # fmt: skip

    def under(self, bound=(), guards=(), links=(), whole=()) -> Term:
        return self.times(Term(tuple(b for b in bound if b != 0), tuple(guards), tuple(links), whole=tuple(whole)))

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


class Sums:
    """Terms of the tensors that hold results of the experts: the nodes of `cone`, above the products `ends`."""

    def __init__(self, r: RowReader, cone: set[fx.Node], ends: set[fx.Node]):
        self.r, self.cone, self.ends = r, cone, ends
        self.d: Expr = sympy.Integer(0)

    def of(self, node: fx.Node, idx: Index, at: int) -> list[Term]:
        """The terms of node[idx] as the operation at position `at` sees it."""
        r = self.r
        if node.op == "call_function" and r.name(node) in EMPTY:
            return []  # nobody may ask what is in memory that was never written
        if node not in self.cone:
            return terms_of(r, lazily(r, node, idx, at, self.d))
        if r.changed(node, at):
            raise Refuse("what the experts gave is written to before it is added up", node)
        if node in self.ends:
            whole = r.read(node, idx, at)
            extra = E.operands(whole)[1:] if E.op_of(whole) == "add" else ()
            return [Term(product=(node, idx)), *(Term(factors=(e,)) for e in extra)]
        moved = r.step(node, idx)
        if moved is not None:
            return self.of(*moved, r.position[node])
        rule = LINEAR.get(r.name(node))
        if rule is None:
            raise Refuse(f"{r.name(node)} of what the experts gave is no weighted sum", node)
        return rule(self, r.arguments(node), node, idx)

    def operand(self, value, idx: Index, at: int) -> list[Term]:
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor):
            return self.of(value, self.r.broadcast(value, idx), at)
        return terms_of(self.r, self.r.scalar(value))


def product(left: list[Term], right: list[Term]) -> list[Term]:
    return [a.times(b) for a in left for b in right]


# Formulas as sums


def lazily(r: RowReader, node: fx.Node, idx: Index, at: int, d: Expr = sympy.Integer(0)) -> Expr:
    """The formula of node[idx]; what holds no choice of experts, or feature d, stays the tensor that the program has."""
    while not r.changed(node, at) and (moved := r.step(node, idx)) is not None:
        at = r.position[node]
        node, idx = moved
    if d != 0 and E.mentions(sympy.Tuple(*idx), d):
        return r.leaf(node, idx, at)
    opened = r.read(node, idx, at)
    if opened in (E.TRUE, E.FALSE) or E.constant(opened) is not None or chooses(r, opened):
        return opened
    return r.leaf(node, idx, at) if isinstance(node.meta["val"], torch.Tensor) else opened


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
    probe = tuple(r.fresh(n, "z") for n in r.shape(node))
    return chooses(r, r.read(node, probe, r.position[node] + 1))


def terms_of(r: RowReader, e: Expr) -> list[Term]:
    """A formula as a sum of guarded products."""
    value, op = E.constant(e), E.op_of(e)
    if value is not None and not isinstance(value, bool) and value == 0:
        return []
    if value is not None and value == 1:
        return [Term()]
    if E.kind(e) == "bool":
        return [Term(guards=e.args if isinstance(e, sympy.And) else (e,))]
    if op == "mul":
        a, b = E.operands(e)
        return product(terms_of(r, a), terms_of(r, b))
    if op == "add":
        return [t for x in E.operands(e) for t in terms_of(r, x)]
    if isinstance(e, (sympy.Mul, sympy.Pow)) and e.atoms(E.IntCall):
        parts = e.args if isinstance(e, sympy.Mul) else [e.args[0]] * int(e.args[1])
        found = [Term()]
        for x in parts:
            found = product(found, terms_of(r, x))
        return found
    if isinstance(e, sympy.Add) and e.atoms(E.IntCall) and chooses(r, e):
        return [t for x in e.args for t in terms_of(r, x)]
    if op == "where":
        c, a, b = E.operands(e)
        if E.constant(b) == 0:
            return [t.under(guards=[c]) for t in terms_of(r, a)]
        if E.constant(a) == 0:
            return [t.under(guards=[E.not_(c)]) for t in terms_of(r, b)]
    if op in E.CASTS and (E.kind(E.operands(e)[0]) == "int" or E.op_of(E.operands(e)[0]) in OPENED):
        return terms_of(r, E.operands(e)[0])
    if op == "reduce" and chooses(r, e):
        return _summed(r, r.nodes[E.operands(e)[0].name], E.operands(e)[1:]) or [Term(factors=(e,))]
    if op == "dot" and chooses(r, e):
        return contracted(r, r.nodes[E.operands(e)[0].name], E.operands(e)[1:], terms_of)
    return [Term(factors=(e,))]


OPENED = ("mul", "where", "reduce", "dot", *E.CASTS)


def _summed(r: RowReader, node: fx.Node, idx: Index) -> list[Term] | None:
    if r.name(node) != "sum":
        return None
    source, at, bound = over(r, node, idx)
    return [t.under(bound) for t in terms_of(r, r.read(source, at, r.position[node]))]


def contracted(r: RowReader, node: fx.Node, idx: Index, terms: Callable) -> list[Term]:
    """The terms of a sum of products of which no operand is a projection."""
    sides, bound = operands_of(r, node, idx)
    found = [Term()]
    for source, at in sides:
        if terms is terms_of:
            found = product(found, terms_of(r, r.read(source, at, r.position[node])))
        else:
            found = product(found, terms(source, at, r.position[node]))
    return [t.under(bound) for t in found]


def operands_of(r: RowReader, node: fx.Node, idx: Index) -> tuple[list[tuple[fx.Node, Index]], list[Expr]]:
    """([(operand, its index)], the summed positions) of a matmul or an einsum of any number of operands."""
    if r.name(node) == "einsum":
        a = r.arguments(node)
        tensors, shapes = a["tensors"], [r.shape(t) for t in a["tensors"]]
        names, out = letters(a["equation"], [len(s) for s in shapes])
        if all(len(set(t)) == len(t) for t in (*names, out)):
            sizes = {c: n for term, shape in zip(names, shapes) for c, n in zip(term, shape) if n != 1}
            at = {c: r.fresh(sizes.get(c, sympy.Integer(1)), "k") for c in sizes}
            at |= dict(zip(out, idx))
            found = [
                (t, r.broadcast(t, tuple(at.get(c, sympy.Integer(0)) for c in term))) for t, term in zip(tensors, names)
            ]
            return found, [at[c] for c in sizes if c not in out]
    inner = contraction(r, node, idx)
    if inner is None:
        raise Refuse("a sum of products has a form that is not read", node)
    return [inner.lhs, inner.rhs], [inner.over]


# Operations that are linear in the results of the experts


def _add(sign: float):
    def rule(s: Sums, a, n, idx):
        here = s.r.position[n]
        scale = a.get("alpha", 1)
        if scale != 1 or sign != 1:
            raise Refuse("results of experts are subtracted or scaled as they are added", n)
        return s.operand(a["self"], idx, here) + s.operand(a["other"], idx, here)

    return rule


def _mul(s: Sums, a, n, idx):
    here = s.r.position[n]
    return product(s.operand(a["self"], idx, here), s.operand(a["other"], idx, here))


def _div(s: Sums, a, n, idx):
    here = s.r.position[n]
    if a.get("rounding_mode") is not None or a["other"] in s.cone:
        raise Refuse("it is divided by what the experts gave", n)
    other = a["other"]
    e = s.r.operand(other, idx, here) if isinstance(other, fx.Node) else s.r.scalar(other)
    return [t.times(Term(factors=(E.apply("reciprocal", E.as_float(e)),))) for t in s.operand(a["self"], idx, here)]


def _cast(s: Sums, a, n, idx):
    return s.operand(a["self"], idx, s.r.position[n])


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
    d = axis(a["dim"], len(idx))
    if a.get("alpha", 1) != 1 or d != 0:
        raise Refuse("index_add has a factor, or another dim than that of the tokens", n)
    found = s.of(a["self"], idx, here)
    for rows, index in _pieces(r, a["source"], a["index"]):
        row = r.fresh(r.shape(rows)[0], "r")
        link = (r.read(index, (row,), here), idx[0])
        found += [t.under([row], links=[link]) for t in s.of(rows, (row, *idx[1:]), here)]
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


def _index_put(s: Sums, a, n, idx):
    """out[m] += y, out[m] = y, index_put(accumulate=True)"""
    r, here = s.r, s.r.position[n]
    base, indices, values, adds = a["self"], a["indices"], a["values"], a.get("accumulate")
    row = r.fresh(r.shape(values)[0], "r")
    at = _places(r, n, indices, row)
    rest = idx[len(at) :]
    links, places = list(zip(at, idx)), () if adds else idx[: len(at)]
    if not adds and (new := _added_in_place(r, base, indices, values)) is not None:
        if not once(r, at):
            raise Refuse("out[i] += y adds only one of the rows that meet at one token", n)
        values, places = new, ()
    before = s.of(base, idx, here)
    if places and any(not (t.product or t.links) for t in before):
        raise Refuse("results of experts replace what is not zero", n)
    return before + [t.under([row], links=links, whole=places) for t in s.of(values, (row, *rest), here)]


def _places(r: RowReader, n: fx.Node, indices: list, row: Expr) -> Index:
    """Where row `row` is put."""
    if (mask := mask_of(n)) is not None:
        if indices[0] is not mask:
            raise Refuse("results of experts are put along another dim than that of the tokens", n)
        return tuple(r.nth(mask, c, row) for c in range(mask.meta["val"].dim()))
    if any(i is None or i.meta["val"].dim() != 1 for i in indices):
        raise Refuse("results of experts are put at places that are no list", n)
    return tuple(E.as_int(r.read(i, (row,), r.position[n])) for i in indices)


def _added_in_place(r: RowReader, base: fx.Node, indices: list, values: fx.Node) -> fx.Node | None:
    """y of `out[i] = out[i] + y`"""
    if r.name(values) != "add" or len(values.args) != 2 or values.kwargs:
        return None
    old = [x for x in values.args if isinstance(x, fx.Node) and r.name(x) == "index" and x.args[0] is base]
    if len(old) != 1 or not _same_places(r, old[0].args[1], indices):
        return None
    return next(x for x in values.args if x is not old[0])


def _same_places(r: RowReader, a: list, b: list) -> bool:
    if len(a) != len(b):
        return False
    return all(x is y or (x is not None and y is not None and _alike(r, x, y)) for x, y in zip(a, b))


def _alike(r: RowReader, x: fx.Node, y: fx.Node) -> bool:
    probe = tuple(r.fresh(n, "p") for n in r.shape(x))
    return r.shape(x) == r.shape(y) and r.read(x, probe, r.position[x] + 1) == r.read(y, probe, r.position[y] + 1)


def once(r: RowReader, at: Index) -> bool:
    """Does every place occur once: all coordinates of a mask's places, or of one that compares distinct ids?"""
    if any(E.op_of(x) != "nth" for x in at):
        return len(at) == 1 and E.op_of(at[0]) in ("perm", "inv")
    masks = {E.operands(x)[0] for x in at}
    if len(masks) != 1:
        return False
    mask = r.nodes[next(iter(masks)).name]
    held = {int(E.operands(x)[1]) for x in at}
    missing = set(range(mask.meta["val"].dim())) - held
    if not missing:
        return True
    probe = tuple(r.fresh(n, "p") for n in r.shape(mask))
    formula = r.truth(E.as_bool(r.read(mask, probe, r.position[mask] + 1)))
    loads = E.loads(formula)
    if len(missing) != 1 or len(loads) != 1 or E.op_of(formula) != "eq":
        return False
    name, *idx = E.operands(loads[0])
    free = probe[missing.pop()]
    return idx[-1] == free and distinct(r, r.nodes[name.name[1:]]) and not any(E.mentions(i, free) for i in idx[:-1])


def distinct(r: RowReader, ids: fx.Node) -> bool:
    """Do the ids of one token differ from each other, as those of a topk do?"""
    while ids.op == "call_function":
        if r.name(ids) == "getitem":
            return r.name(ids.args[0]) in ("topk", "sort") and ids.args[1] == 1
        if r.name(ids) in ("clone", "contiguous", "detach", "alias", "to"):
            ids = ids.args[0]
            continue
        break
    return r.shape(ids)[-1] == 1


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


CASTS = ("to", "_to_copy", "type_as", "float", "half")
EMPTY = ("empty", "empty_like", "new_empty", "empty_strided")
LINEAR = {
    "add": _add(1),
    "mul": _mul,
    "multiply": _mul,
    "div": _div,
    **dict.fromkeys(CASTS, _cast),
    "dropout": _dropout,
    "sum": _sum,
    **dict.fromkeys(("matmul", "bmm", "mm", "einsum"), _contract),
    "index_add": _index_add,
    "scatter_add": _scatter_add,
    "index_put": _index_put,
    "where": _where,
    "masked_fill": _masked_fill,
    "stack": _stack,
}
# Data movement and sums that results of experts go through.
THROUGH = frozenset(LINEAR) | frozenset(SPLITS) | {"getitem"}


# Routing matrices made by scatter


def scattered(r: RowReader, e: Expr) -> tuple[fx.Node, dict] | None:
    """(node, arguments) where a load is one of a tensor in which few places per row were set."""
    node = r.nodes.get(E.operands(e)[0].name[1:])
    if node is None or node.op != "call_function" or r.name(node) not in ("scatter", "scatter_add"):
        return None
    return node, r.arguments(node)
