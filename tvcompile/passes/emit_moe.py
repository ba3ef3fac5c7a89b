"""Writes one tv.moe node for a MoEMatch.

for e: out.index_add_(0, tok[e], (act(x[tok[e]] @ W1[e]) @ W2[e]) * w)
->  tv.moe(reshape(x), ids, weights, [permute(W1)], [permute(W2)], [], [], "act = ...", saves)[0] -> reshape back
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import fx

from .. import expr as E
from ..expr import Expr
from ..spec import Choices, MoEMatch, Weights
from .overflow import FEW_BITS
from .projections import joined
from .read import size
from .write import ARITHMETIC, Writer, keep_strides

aten = torch.ops.aten


def write_moe(graph: fx.Graph, m: MoEMatch, nodes: Mapping[str, fx.Node]) -> tuple[fx.Node, fx.Node]:
    """(what takes the anchor's place, the op's node); `nodes` gives what now stands for a name of the match."""
    w = Writer(graph, m.anchor)
    sources = [*graph.find_nodes(op="placeholder"), nodes[m.x.name]]
    tokens = w.size(m.tokens, sources)
    first = m.up[0].nodes[0]
    x = w.call(aten.reshape.default, nodes[m.x.name], [tokens, m.x.meta["val"].shape[-1]])
    x = w.cast(x, first.meta["val"].dtype)
    columns = [_Choice(w, nodes, m, c, tokens, sources) for c in m.choices]
    ids, weights = ([c.ids() for c in columns], [c.weights(x) for c in columns])
    if len(columns) > 1:
        ids, weights = [w.call(aten.cat.default, ids, 1)], [w.call(aten.cat.default, weights, 1)]
    roles = (m.up, m.down, m.up_bias, m.down_bias)
    lists = [[t for ws in role for t in _tensors(w, ws, nodes, m.stacked)] for role in roles]
    pair = w.call(torch.ops.tv.moe.default, x, ids[0], weights[0], *lists, str(m.spec), m.saves)
    out = w.call(operator.getitem, pair, 0)
    before = m.anchor.meta["val"]
    shape = [w.size(size(n), sources) for n in before.shape]
    if m.base is not None and m.stays:
        base = w.call(aten.reshape.default, nodes[m.base.name], [tokens, before.shape[-1]])
        some = [w.call(operator.ge, ids[0], 0), w.call(operator.lt, ids[0], m.experts)]
        out = w.call(aten.where.self, w.call(operator.and_, *some), w.cast(out, before.dtype), base)
    out = w.call(aten.reshape.default, out, shape)
    if m.base is not None and not m.stays:
        base = nodes[m.base.name]
        if m.base.meta["val"].shape != before.shape:  # the same elements in the same order
            base = w.call(aten.reshape.default, base, shape)
        out = w.call(aten.add.Tensor, base, out)
    out = w.cast(out, before.dtype)
    m.anchor.replace_all_uses_with(out)
    graph.erase_node(m.anchor)
    return keep_strides(graph, out, before), pair


def _tensors(w: Writer, ws: Weights, nodes: Mapping[str, fx.Node], stacked: bool) -> list[fx.Node]:
    """The tensors of a weight; of a stack the experts' own where others are not `stacked`."""
    found = []
    for node in ws.nodes:
        node = nodes[node.name]
        if list(node.meta["val"].shape) != list(ws.sizes):
            node = w.call(aten.reshape.default, node, list(ws.sizes))
        if list(ws.order) != sorted(ws.order):
            node = w.call(aten.permute.default, node, list(ws.order))
        for dim, part in enumerate(ws.parts):
            if part is not None:
                node = w.call(aten.slice.Tensor, node, dim, part[0], sum(part))
        found.append(node)
    if ws.stacked and not stacked:
        each = w.call(aten.unbind.int, found[0])
        return [w.call(operator.getitem, each, e) for e in range(ws.shape[0])]
    return found


class _Choice:
    """Writes formulas of t and k as [T, K] tensors."""

    def __init__(self, w: Writer, nodes: Mapping[str, fx.Node], m: MoEMatch, c: Choices, tokens: Any, sources: list):
        self.w, self.nodes, self.m, self.c, self.tokens, self.sources = w, nodes, m, c, tokens, sources
        self.device = m.anchor.meta["val"].device
        self.written: dict[Expr, Any] = {}

    def ids(self) -> fx.Node:
        ids = self.write(self.c.ids)
        for condition in self.c.counts:
            none = self.w.call(aten.full.default, [], -1, dtype=ids.meta["val"].dtype, device=self.device)
            ids = self.w.call(aten.where.self, self.write(condition), ids, none)
        return self._whole(ids)

    def weights(self, x: fx.Node) -> fx.Node:
        values = [self.write(factor) for factor in self.c.factors]
        number = math.prod(float(v) for v in values if not isinstance(v, fx.Node))
        nodes = [v for v in values if isinstance(v, fx.Node)]
        if not any(isinstance(n.meta["val"], torch.Tensor) for n in nodes):
            ones = self.w.call(aten.full.default, [1, 1], 1.0, dtype=x.meta["val"].dtype, device=self.device)
            nodes = [ones, *nodes]
        result = functools.reduce(lambda a, b: self.w.call(operator.mul, a, b), nodes)
        result = result if number == 1.0 else self.w.call(operator.mul, result, number)
        return self._whole(result)

    def _whole(self, node: fx.Node) -> fx.Node:
        return self.w.call(aten.expand.default, node, [self.tokens, int(self.c.size)])

    def write(self, e: Expr) -> Any:
        """A node that broadcasts to [T, K], or a number."""
        if e not in self.written:
            self.written[e] = self._write(e)
        return self.written[e]

    def _write(self, e: Expr) -> Any:
        value, op = E.constant(e), E.op_of(e)
        number = torch.int64 if E.kind(e) == "int" else torch.promote_types(self.m.x.meta["val"].dtype, torch.float32)
        if value is not None:
            return value
        if e == self.m.t:
            return self._positions(self.tokens, 1)
        if e == self.c.k:
            return self._positions(int(self.c.size), 0)
        if isinstance(e, sympy.Symbol):
            return self.w.size(e, self.sources)
        if op in E.OPAQUE:
            loaded = self._load(e)
            if op == "any" and loaded.meta["val"].dtype != torch.bool:  # a sum of hits
                return self.w.call(operator.ne, loaded, 0)
            few = getattr(loaded.meta["val"], "dtype", None) in FEW_BITS
            return self.w.cast(loaded, torch.int64) if few else loaded
        if op in ("le", "eq"):
            compare, left, right = E.sides(e)
            return self.w.call(getattr(operator, compare), self.write(left), self.write(right))
        if op == "where":
            condition, *values = map(self.write, E.operands(e))
            return self.w.call(aten.where.self, *self._tensors(torch.bool, condition), *self._tensors(number, *values))
        args = [self.write(a) for a in E.operands(e)]
        if op in ("max", "min"):
            args = self._tensors(number, *args)
        if op in E.CASTS or op == "int":
            return self.w.cast(args[0], torch.int64 if op == "int" else getattr(torch, op))
        if op == "reciprocal":
            return self.w.call(operator.truediv, 1.0, *args)
        if op is not None:
            return self.w.call(CALLS[op] if op in CALLS else getattr(aten, op).default, *args)
        result = args[0]
        if isinstance(e, sympy.Not):
            return self.w.call(aten.logical_not.default, result)
        for other in args[1:]:
            result = self.w.call(JOINS[type(e)], result, other)
        return result

    def _positions(self, n: Any, dim: int) -> fx.Node:
        return self.w.call(aten.unsqueeze.default, self.w.call(aten.arange.default, n, device=self.device), dim)

    def _tensors(self, number: torch.dtype, *values: Any) -> list[fx.Node]:
        """Numbers among values as tensors, of the dtype of what else is there, or that of `number`."""
        there = [x for x in values if isinstance(x, fx.Node) and isinstance(x.meta["val"], torch.Tensor)]
        like = there[0].meta["val"].dtype if there else number
        full = functools.partial(self.w.call, aten.full.default, [], dtype=like, device=self.device)
        return [x if x in there else full(x) for x in values]

    def _load(self, e: Expr) -> fx.Node:
        name, *idx = E.operands(e)
        node = self.nodes[name.name.removeprefix("%")]
        if E.op_of(e) == "rank_of":
            sort, *idx = idx
            node = self._before_the_sort(node, self.nodes[sort.name])
        if E.op_of(e) == "earlier":
            node = self._earlier(node)
        if not isinstance(node.meta["val"], torch.Tensor):
            return node
        shape = [size(n) for n in node.meta["val"].shape]
        number = sympy.Integer(0)
        for n, i in zip(shape, idx):
            number = sympy.expand(number * n + i)
        number, total, t, k = joined(number), sympy.expand(sympy.Mul(*shape)), self.m.t, self.c.k
        T, K = self.m.tokens, self.c.size
        if sympy.expand(total - T * K) == 0 and sympy.expand(number - (t * K + k)) == 0:
            return self.w.call(aten.reshape.default, node, [self.tokens, int(K)])
        if sympy.expand(total - T * K) == 0 and sympy.expand(number - (k * T + t)) == 0:
            return self.w.call(aten.t.default, self.w.call(aten.reshape.default, node, [int(K), self.tokens]))
        if sympy.expand(total - T) == 0 and sympy.expand(number - t) == 0:
            return self.w.call(aten.reshape.default, node, [self.tokens, 1])
        return self._gather(node, idx)

    def _earlier(self, mask: fx.Node) -> fx.Node:
        """How many places of a mask hold before each."""
        shape = [self.w.size(size(n), self.sources) for n in mask.meta["val"].shape]
        holds = self.w.call(operator.ne, self.w.call(aten.reshape.default, mask, [-1]), 0)
        flat = self.w.cast(holds, torch.int64)
        before = self.w.call(operator.sub, self.w.call(aten.cumsum.default, flat, 0), flat)
        return self.w.call(aten.reshape.default, before, shape)

    def _before_the_sort(self, node: fx.Node, sort: fx.Node) -> fx.Node:
        """What sorted rows have, in the order before the sort."""
        pair = isinstance(sort.meta["val"], (tuple, list))
        order = self.w.call(operator.getitem, sort, 1) if pair else sort
        return self.w.call(aten.scatter.src, self.w.call(aten.zeros_like.default, node), 0, order, node)

    def _gather(self, node: fx.Node, idx: list[Expr]) -> fx.Node:
        for d in reversed(range(len(idx))):
            if idx[d].is_Integer:
                node = self.w.call(aten.select.int, node, d, int(idx[d]))
        places = [i for i in idx if not i.is_Integer]
        if not places:
            return node
        at = [self._inside(i, size(n)) for i, n in zip(places, node.meta["val"].shape)]
        return self.w.call(aten.index.Tensor, node, at)

    def _inside(self, i: Expr, n: Expr) -> Any:
        """A place among n: of a pair without an expert it may be none, and what is read there does not count."""
        place = self.write(i)
        return self.w.call(operator.mod, place, self.w.size(n, self.sources)) if E.loads(i) else place


CALLS: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "//": operator.floordiv, "%": operator.mod, "fle": operator.le, "flt": operator.lt, "feq": operator.eq,
    "max": aten.maximum.default, "min": aten.minimum.default, "pow": operator.pow,
}  # fmt: skip
JOINS: dict[Any, Callable] = {
    **ARITHMETIC, sympy.And: operator.and_, sympy.Or: operator.or_,
}  # fmt: skip
