"""What a program computes twice is computed once, so that the lifting meets one tensor and not two that are equal.

    sum((p * m)[:, e, None] / (p * m).sum(-1, keepdim=True)[:, e, None] * expert(x) for e, expert in enumerate(experts))

Only where nobody could tell: no random numbers, no sizes that data tells, no memory that is written to or handed out.
Products of two batches of matrices stay as they are: two attentions over the same scores have scores of their own each.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable

import torch
from torch import fx
from torch._ops import OpOverload
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from .writes import storage_of, written_arguments

NUMBERS = (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)
PRODUCTS = ("aten::matmul", "aten::bmm", "aten::baddbmm", "aten::einsum")


def merge_repeated(graph: fx.Graph) -> None:
    output = next(iter(graph.find_nodes(op="output")))
    shown = {storage_of(n) for n in output.all_input_nodes}
    shown |= {storage_of(w) for n in graph.nodes for w in written_arguments(n)}
    shown.discard(None)
    seen: dict[Hashable, fx.Node] = {}
    for node in graph.nodes:
        if _switches(node):
            seen.clear()
        elif _merges(node, shown):
            first = seen.setdefault(_key(node), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _switches(node: fx.Node) -> bool:
    """May gradients or autocast be switched on or off here?"""
    other = node.op == "call_function" and not isinstance(node.target, OpOverload)
    return other and node.target is not operator.getitem and not isinstance(node.meta.get("val"), NUMBERS)


def _merges(node: fx.Node, shown: set[int | None]) -> bool:
    if node.op == "call_function" and isinstance(node.target, OpOverload):
        schema = node.target._schema
        if not schema.name.startswith("aten::") or schema.is_mutable:
            return False
        if torch.Tag.nondeterministic_seeded in node.target.tags or _of_batches(node):
            return False
    elif node.op not in ("call_function", "get_attr"):
        return False
    held = [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, (torch.Tensor, *NUMBERS))]
    if not held or any(storage_of(n) in shown for n in (node, *node.all_input_nodes)):
        return False
    numbers = [n for x in held for n in (x.shape if isinstance(x, torch.Tensor) else [x])]
    return not any(map(free_unbacked_symbols, numbers))


def _of_batches(node: fx.Node) -> bool:
    ranks = [n.meta["val"].dim() for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return node.target._schema.name in PRODUCTS and len(ranks) > 1 and min(ranks) > 2


def _key(node: fx.Node) -> Hashable:
    """Target and arguments; 1, 1.0 and True are not alike, nor are 0.0 and -0.0."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    return node.op, node.target, str(spec), tuple(x if isinstance(x, fx.Node) else (type(x), repr(x)) for x in leaves)
