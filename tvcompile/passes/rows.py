"""A Reader of routed rows: tokens chosen by a mask, sorted by expert, numbered by a permutation.

    torch.where(m)[c][r], x[m][r]     nth(m, c, r)     coordinate c of the r-th place where m holds
    sort(x).indices[r], argsort(x)[r] perm(n, r)       sort(x).values[r] = x[perm(n, r)]
    inverse[perm] = arange            inv(n, i)        perm(n, inv(n, i)) = i
    _grouped_mm(x, W, offs)[r, j]     dot; its expert is group(offs, r)
    any(x, d), sum of integers        any(n, ...), count(n, ...)
    the first n of torch.where(m)     earlier(m, i, j) < n: of m's places before (i, j) fewer hold

`nth`, `perm`, `inv` carry the name of the node they come from. What was computed without gradients is not opened where
the graph trains.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import sympy
import torch
from sympy.core.symbol import Str
from torch import fx

from .. import expr as E
from ..expr import BoolCall, Expr, IntCall
from .contraction import letters
from .counts import as_counted, running_sum, sums_whole
from .ids import SCATTERS, selected, two_valued
from .indices import Indices
from .movement import Index, axis, unravel
from .pointwise import POINTWISE
from .ranges import ANY, Range
from .read import Reader

EMPTY = ("empty", "empty_like", "new_empty", "empty_strided")
GROUPED = ("_grouped_mm", "transformers::grouped_mm_fallback")

if TYPE_CHECKING:
    from .ranks import Rank
    from .synonyms import Call


class RowReader(Reader):
    def __init__(self, graph: fx.Graph, grad: dict[fx.Node, bool]):
        super().__init__(graph)
        self.grad = grad
        self.trains = any(grad.values())
        self.masks: dict[tuple, fx.Node] = {}
        self.ranks: dict[fx.Node, Rank] = {}  # places among the rows of an expert (ranks.py)
        self.synonyms: dict[fx.Node, Call] = {}  # calls that are other operations in other words (synonyms.py)
        self.choosing: dict[fx.Node, bool] = {}  # what terms_of.chooses found inside tensors
        self._indices: Indices | None = None
        self.coarsest = 0.0  # the epsilon of the results that are looked at: what is rounded more keeps its cast

    def name(self, node: fx.Node) -> str:
        return self.synonyms[node][0] if node in self.synonyms else super().name(node)

    def arguments(self, node: fx.Node) -> dict:
        return self.synonyms[node][1] if node in self.synonyms else super().arguments(node)

    def _read(self, node: fx.Node, idx: Index) -> Expr:
        if node.op == "call_function" and isinstance(node.meta.get("val"), torch.Tensor):
            if self.cut(node):
                return self.leaf(node, idx)
            if (rank := self.ranks.get(node)) is not None:
                return settle(IntCall("rank", Str(node.name), rank.sort, idx[0]))
            rule = ROWS.get(self.name(node))
            formula = rule(self, self.arguments(node), node, idx) if rule else None
            if formula is not None:
                return self.result(node, idx, formula)
            formula = as_counted(self, super()._read(node, idx), node.meta["val"].dtype)
            whole = E.op_of(formula) == "load" and E.kind(formula) == "int" and self.name(node) == "scatter"
            # Along another dim than that of the experts it is no routing, but a condition.
            other = whole and axis(self.arguments(node)["dim"], len(idx)) != len(idx) - 1
            return two_valued(self, formula) if other else formula
        return super()._read(node, idx)

    def coerce(self, e: Expr, dtype: torch.dtype) -> Expr:
        if not dtype.is_floating_point and E.kind(e) == "float" and E.op_of(e) == "load":
            e = E.choose(E.as_bool if dtype == torch.bool else E.as_int, two_valued(self, e))
        return super().coerce(e, dtype)

    def nth(self, mask: fx.Node, coordinate: int, row: Expr) -> Expr:
        """A coordinate of a place where a mask holds; masks of one formula are one mask, whatever their shapes."""
        named, shape = self.first_alike(mask), self.shape(mask)
        known = self.shape(named)
        if known == shape:
            return IntCall("nth", Str(named.name), sympy.Integer(coordinate), row)
        number = sympy.Integer(0)
        for c, n in enumerate(known):
            at = IntCall("nth", Str(named.name), sympy.Integer(c), row) if n != 1 else sympy.Integer(0)
            number = number * n + at
        return unravel(sympy.expand(number), shape, self.bounds)[coordinate]

    def first_alike(self, mask: fx.Node) -> fx.Node:
        """Of the masks that hold where this one does the first of most dims: its places are numbers of their own."""
        others, self._unnamed = self._unnamed, []
        for other in others:
            self._alike(other)
        return self._alike(mask)

    def _alike(self, mask: fx.Node) -> fx.Node:
        shape = self.shape(mask)
        size = sympy.expand(sympy.Mul(*shape))
        place = E.index(f"place_{size}")
        self.ranges[place] = size
        formula = E.as_bool(self.read(mask, tuple(unravel(place, shape, self.bounds)), self.position[mask] + 1))
        return self.masks.setdefault((formula, size), mask)

    def chosen_by(self, size: Expr) -> fx.Node | None:
        """The mask that chooses so many rows: sizes that only data tells are each one operation's."""
        mask = self.sizes_of_choices.get(size)
        return None if mask is None else self.first_alike(mask)

    def first_of(self, size: Expr) -> tuple[Expr, Expr | None]:
        """(how many places a mask has, n) where a size is that of the first n of them; (size, None) of others."""
        return self._firsts.get(size, (size, None))

    @functools.cached_property
    def _firsts(self) -> dict[Expr, tuple[Expr, Expr]]:
        found = {}
        for n in self.position:
            if n.op != "call_function" or self.name(n) != "slice":
                continue
            a = self.arguments(n)
            d = axis(a.get("dim", 0), n.meta["val"].dim())
            whole, part, end = self.shape(a["self"])[d], self.shape(n)[d], a.get("end")
            first = a.get("start") in (None, 0) and a.get("step", 1) == 1 and end is not None
            if first and whole in self.sizes_of_choices and part != whole:
                low, _ = self.bounds(self.scalar(end))
                if low is not None and E.at_most(0, low):
                    found[part] = whole, self.scalar(end)
        return found

    @functools.cached_property
    def _unnamed(self) -> list[fx.Node]:
        masks = dict.fromkeys(self.sizes_of_choices.values())
        return sorted(masks, key=lambda m: (-m.meta["val"].dim(), self.position[m]))

    @functools.cached_property
    def sizes_of_choices(self) -> dict[Expr, fx.Node]:
        """{how many places: the mask that holds there}"""
        found: dict[Expr, fx.Node] = {}
        for n in self.position:
            name = self.name(n) if n.op == "call_function" else ""
            if name == "index" and (mask := mask_of(n)) is not None:
                found[self.shape(n)[list(n.args[1]).index(mask)]] = mask
            elif name == "masked_select":
                found[self.shape(n)[0]] = self.arguments(n)["mask"]
            elif name in ("nonzero", "argwhere"):
                found[self.shape(n)[0]] = self.arguments(n)["self"]
            elif name == "getitem" and self.name(n.args[0]) in ("where", "nonzero_numpy"):
                b = self.arguments(n.args[0])
                found[self.shape(n)[0]] = b["condition" if "condition" in b else "self"]
        return {size: mask for size, mask in found.items() if not size.is_Integer}

    def range_of(self, e: Expr) -> Range | None:
        op = E.op_of(e)
        if op == "earlier":
            return sympy.Integer(0), sympy.Mul(*self.shape(self.nodes[E.operands(e)[0].name])) - 1
        if op in ("rank", "rank_of"):
            return sympy.Integer(0), self.shape(self.nodes[E.operands(e)[0].name])[0] - 1
        if op in ("perm", "inv", "nth"):
            node = self.nodes[E.operands(e)[0].name]
            shape = self.shape(self.arguments(node)["self"]) if op != "nth" else self.shape(node)
            return sympy.Integer(0), shape[int(E.operands(e)[1]) if op == "nth" else 0] - 1
        if op == "load" and E.kind(e) == "int":
            if self._indices is None:
                self._indices = Indices(self)
                self._indices.look()
            found = self._indices.range_of(e)
            return super().range_of(e) if found == ANY else found
        return super().range_of(e)

    def is_opened(self, node: fx.Node) -> bool:
        return node.op == "call_function" and self.name(node) in SCATTERS

    def cut(self, node: fx.Node) -> bool:
        """Does no gradient flow through a node, though the graph trains?"""
        val = node.meta.get("val")
        floating = isinstance(val, torch.Tensor) and val.dtype.is_floating_point
        return floating and self.trains and not self.grad[node]

    def step(self, node: fx.Node, idx: Index) -> tuple[fx.Node, Index] | None:
        moved = None if self.cut(node) else self._step(node, idx)
        return moved and (moved[0], tuple(settle(E.as_int(i), self.bounds) for i in moved[1]))

    def _step(self, node: fx.Node, idx: Index) -> tuple[fx.Node, Index] | None:
        if node.op == "call_function" and self.name(node) == "index" and (mask := mask_of(node)) is not None:
            return self.arguments(node)["self"], masked_index(self, node, mask, idx)
        if node.op == "call_function" and self.name(node) == "masked_select":
            source, mask = self.arguments(node)["self"], self.arguments(node)["mask"]
            places = tuple(self.nth(mask, c, idx[0]) for c in range(mask.meta["val"].dim()))
            return (source, places) if self.shape(source) == self.shape(mask) else None
        return super().step(node, idx) or selected(self, node, idx)


def is_zeros(r: Reader, node: fx.Node) -> bool:
    return node.op == "call_function" and r.name(node) in ("zeros", "zeros_like", "new_zeros")


def mask_of(node: fx.Node) -> fx.Node | None:
    """The mask of `x[mask]`, where it is the only index."""
    indices = [i for i in node.args[1] if i is not None]
    if len(indices) == 1 and indices[0].meta["val"].dtype == torch.bool:
        return indices[0]
    return None


def masked_index(r: RowReader, node: fx.Node, mask: fx.Node, idx: Index) -> Index:
    """The position in x of element idx of `x[:, mask]`, or of what is put there."""
    first, rank = list(node.args[1]).index(mask), mask.meta["val"].dim()
    chosen = [r.nth(mask, c, idx[first]) for c in range(rank)]
    return (*idx[:first], *chosen, *idx[first + 1 :])


RANKS = {"rank": ("rank_of", "inv"), "rank_of": ("rank", "perm")}


def settle(e: Expr, bounds=None) -> Expr:
    """perm(n, inv(n, i)) is i, and inv(n, perm(n, r)) is r. rank_of: the rank of what was at i before a sort."""
    while True:
        table = {}
        for call in e.atoms(IntCall):
            if E.op_of(call) in ("perm", "inv"):
                name, inner = E.operands(call)
                other = "inv" if E.op_of(call) == "perm" else "perm"
                if E.op_of(inner) == other and E.operands(inner)[0] == name:
                    table[call] = E.operands(inner)[1]
            elif E.op_of(call) in RANKS:
                name, sort, inner = E.operands(call)
                other, moves = RANKS[E.op_of(call)]
                if E.op_of(inner) == moves and E.operands(inner)[0] == sort:
                    table[call] = IntCall(other, name, sort, E.operands(inner)[1])
        if not table:
            return e
        e = E.substitute(e, table, bounds)


def _atom(r, a, n, idx):
    return r.atom("dot", n, idx) if n.meta["val"].dtype.is_floating_point else None


def _product(r, a, n, idx):
    """An atom is its node's value, with what is `added` to the product (contraction.py): emit writes it as the node."""
    if a.get("beta", 1) != 1 or a.get("alpha", 1) != 1:
        return r.leaf(n, idx)
    return r.atom("dot", n, idx)


def _leaf(r, a, n, idx):
    return r.leaf(n, idx)


def _dropout(r, a, n, idx):
    """What was drawn is the tensor's own."""
    return r.leaf(n, idx) if a.get("train", True) and a["p"] else None


def _nonzero(r, a, n, idx):
    return r.nth(a["self"], int(idx[1]), idx[0]) if E.constant(idx[1]) is not None else None


def _getitem(r, a, n, idx):
    whole, k = n.args
    name = r.name(whole) if isinstance(whole, fx.Node) and whole.op == "call_function" else ""
    b = r.arguments(whole) if name else {}
    if name in ("where", "nonzero_numpy") and isinstance(k, int):
        return r.nth(b["condition" if "condition" in b else "self"], k, idx[0])
    if name == "sort" and len(idx) == 1:
        return _sorted(r, b, whole, idx[0], values=k == 0)
    return None


def _sorted(r, a, n, i, values: bool):
    perm = None if a.get("descending") else _inverse(r, a["self"], i)
    if values:
        return r.read(a["self"], (settle(IntCall("perm", Str(n.name), i)),), r.position[n])
    return perm if perm is not None else IntCall("perm", Str(n.name), i)


def _argsort(r, a, n, idx):
    return _sorted(r, a, n, idx[0], values=False) if len(idx) == 1 else None


def _inverse(r, x: fx.Node, i: Expr) -> Expr | None:
    """inv(n, i) where x is perm(n): what sorts a permutation is its inverse."""
    probe = r.fresh(r.shape(x)[0], "p")
    held = r.read(x, (probe,), r.position[x])
    if E.op_of(held) == "perm" and E.operands(held)[1] == probe:
        return IntCall("inv", E.operands(held)[0], i)
    return None


def _index_put(r, a, n, idx):
    """inverse[perm] = arange"""
    at = a["indices"]
    if len(idx) != 1 or len(at) != 1 or a.get("accumulate") or n.meta["val"].dtype.is_floating_point:
        return None
    return _put(r, a["self"], at[0], a["values"], idx[0], r.position[n])


def _scatter(r, a, n, idx):
    plain = isinstance(a.get("src"), fx.Node) and a.get("reduce") is None
    if len(idx) != 1 or not plain or n.meta["val"].dtype.is_floating_point:
        return None
    return _put(r, a["self"], a["index"], a["src"], idx[0], r.position[n])


def _put_one(r, a, n, idx):
    """m[arange(T), ids] = w"""
    here = r.position[n]
    before, put = r.read(a["self"], idx, here), r.operand(a["src"], idx[:-1], here)
    mine = r.truth(E.eq(E.as_int(r.read(a["index"], idx[:-1], here)), idx[-1]))
    return E.where(mine, E.apply("add", before, put) if a["accumulate"] else put, before)


def _put(r, base: fx.Node, index: fx.Node, values: fx.Node, i: Expr, here: int) -> Expr | None:
    size = r.shape(base)[0]
    if index.meta["val"].dim() != 1 or r.shape(index)[0] != size:
        return None
    probe = r.fresh(size, "p")
    at = r.read(index, (probe,), here)
    if index.meta["val"].dtype == torch.bool or E.op_of(at) not in ("perm", "inv") or E.operands(at)[1] != probe:
        return None
    back = IntCall("inv" if E.op_of(at) == "perm" else "perm", E.operands(at)[0], i)
    return settle(E.substitute(E.as_int(r.operand(values, (probe,), here)), {probe: back}, r.bounds), r.bounds)


def _one_hot(r, a, n, idx):
    chosen = E.as_int(r.operand(a["self"], idx[:-1], r.position[n]))
    return E.where(E.eq(chosen, idx[-1]), sympy.Integer(1), sympy.Integer(0))


def _any(r, a, n, idx):
    return BoolCall("any", Str(n.name), *idx)


def _sum(r, a, n, idx):
    if n.meta["val"].dtype.is_floating_point and not sums_whole(r, n):
        return None
    return IntCall("count", Str(n.name), *idx)


def over(r: Reader, n: fx.Node, idx: Index) -> tuple[fx.Node, Index, list[Expr]]:
    """(source, its index, the positions that a reduction runs over)"""
    a = r.arguments(n)
    source, dims = a["self"], a.get("dim")
    shape = r.shape(source)
    dims = range(len(shape)) if dims is None or dims == [] else dims if isinstance(dims, (list, tuple)) else [dims]
    gone = {axis(d, len(shape)) for d in dims}
    positions = {d: r.fresh(shape[d], "k") for d in gone}
    rest = iter([x for d, x in enumerate(idx) if d not in gone] if a.get("keepdim") else idx)
    return source, tuple(positions[d] if d in gone else next(rest) for d in range(len(shape))), list(positions.values())


def _cumsum(r, a, n, idx):
    """A running sum of integers that has no closed form."""
    if not any(x.free_symbols for x in idx):
        return None
    if n.meta["val"].dtype.is_floating_point:
        return running_sum(r, n, idx) if sums_whole(r, n) else None
    closed = POINTWISE["cumsum"](r, a, n, idx)
    return running_sum(r, n, idx) if closed is None else closed


def _einsum(r, a, n, idx):
    """A product of integers without a sum."""
    names, out = letters(a["equation"], [len(r.shape(t)) for t in a["tensors"]])
    if n.meta["val"].dtype.is_floating_point or any(len(set(t)) != len(t) or set(t) - set(out) for t in (*names, out)):
        return None
    at = dict(zip(out, idx))
    factors = [r.operand(t, tuple(at[c] for c in term), r.position[n]) for t, term in zip(a["tensors"], names)]
    return functools.reduce(lambda x, y: E.apply("mul", x, y), factors)


ROWS = {
    "einsum": _einsum,
    "cumsum": _cumsum,
    **dict.fromkeys(("linear", "addmm", "baddbmm"), _product),
    **dict.fromkeys(("log_softmax", "_log_softmax", "special_log_softmax", "nan_to_num"), _leaf),
    **dict.fromkeys(("dropout", "feature_dropout"), _dropout),
    **dict.fromkeys(GROUPED, _atom),
    **dict.fromkeys(("nonzero", "argwhere"), _nonzero),
    "getitem": _getitem,
    "argsort": _argsort,
    "index_put": _index_put,
    "scatter": _scatter,
    "put_one": _put_one,
    "one_hot": _one_hot,
    "any": _any,
    "sum": _sum,
}
