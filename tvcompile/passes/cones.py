"""Where experts may be: projections after an activation, and what their results flow into.

A cone is the nodes that last projections reach by operations that are linear in them. For the report, `looks_routed`
finds rows that are added up like an expert's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from .atoms import ATOM_RULES
from .contraction import letters, without_sum
from .ids import selected_from
from .movement import CASTS, MOVEMENT, SPLITS
from .pointwise import POINTWISE
from .rows import GROUPED, RowReader, is_zeros
from .sums import THROUGH

ADDS = ("index_add", "scatter_add", "scatter", "index_put", "index_copy", "masked_scatter")
PRODUCTS = ("linear", "addmm", "mm", "bmm", "matmul", "einsum", "baddbmm", *GROUPED)
MOVES = frozenset(MOVEMENT) | frozenset(SPLITS)
ELEMENTWISE = (frozenset(POINTWISE) - frozenset(ATOM_RULES)) | {"exp", "dropout"}


def cones(r: RowReader, graph: fx.Graph) -> Iterator[tuple[list[fx.Node], set[fx.Node]]]:
    """(nodes that last projections reach by linear operations, those projections), each set that hangs together."""
    inner = {n for n in graph.nodes if n.op == "call_function" and r.name(n) in PRODUCTS and _has_weight(r, n)}
    inner = {n for n in inner if not _is_weight(r, n, gathered=True)}
    lasts = {n for n in inner if _activated(r, n, inner)}
    owner: dict[fx.Node, int] = {}
    groups: dict[int, tuple[set[fx.Node], set[fx.Node]]] = {}
    for k, last in enumerate(sorted(lasts, key=r.position.__getitem__)):
        reached = _reached(r, last, owner, lasts)
        touched = {owner[n] for n in reached if n in owner}
        groups[k] = ({last, *reached}, {last})
        for other in touched:
            cone, ends = groups.pop(other)
            groups[k] = (groups[k][0] | cone, groups[k][1] | ends)
        owner |= dict.fromkeys(groups[k][0], k)
    for cone, ends in groups.values():
        if routed(r, cone, ends):
            yield sorted(cone, key=r.position.__getitem__), ends


def _has_weight(r: RowReader, n: fx.Node) -> bool:
    """Is one operand an input of the graph, moved, gathered or cast at most?"""
    val = n.meta.get("val")
    if not (isinstance(val, torch.Tensor) and val.dtype.is_floating_point and val.dim() > 1):
        return False
    return any(_brings_columns(r, n, x) and _is_weight(r, x, gathered=True) for x in n.all_input_nodes)


def _brings_columns(r: RowReader, n: fx.Node, x: fx.Node) -> bool:
    """Has the product dims that are x's alone? What rows are weighed by has none: einsum("tkh,tk->th", y, w)."""
    a = r.arguments(n)
    if r.name(n) == "einsum":
        names, _ = letters(a["equation"], [len(r.shape(t)) for t in a["tensors"]])
        own = [dict(zip(term, r.shape(t))) for term, t in zip(names, a["tensors"]) if t is x]
        others = {c for term, t in zip(names, a["tensors"]) if t is not x for c in term}
        return any(size != 1 for sizes in own for c, size in sizes.items() if c not in others)
    if r.name(n) in ("matmul", "bmm", "mm"):
        return r.shape(x)[-1 if x is n.args[1] else -2] != 1
    return True


def _is_weight(r: RowReader, x: fx.Node, gathered: bool = False) -> bool:
    while x.op == "call_function" and x.all_input_nodes:
        if r.name(x) in MOVES or r.name(x) in CASTS:
            if r.name(x) == "embedding" and not gathered:
                return False
            x = x.all_input_nodes[0]
        elif gathered and (source := selected_from(r, x)) is not None:
            x = source
        else:
            break
    val = x.meta.get("val")
    return x.op in ("placeholder", "get_attr") and isinstance(val, torch.Tensor) and val.dim() > 1


def _activated(r: RowReader, last: fx.Node, inner: set[fx.Node]) -> bool:
    """Does another projection reach the input through operations that are computed element by element?"""
    seen: set[fx.Node] = set()
    queue = list(last.all_input_nodes)
    while queue:
        n = queue.pop()
        if n in seen or n.op != "call_function" or not isinstance(n.meta.get("val"), (torch.Tensor, tuple, list)):
            continue
        seen.add(n)
        if n in inner:
            return True
        sides = [x for x in n.all_input_nodes if _wide(r, x, n) and not _is_weight(r, x)]
        sides = [x for x in sides if selected_from(r, x) is None]
        joins = r.name(n) in ("add", "sub") and len(sides) > 1 and not all(_made_of(r, x, inner) for x in sides)
        if _elementwise(r, n) and not joins and len(seen) < 200:
            queue += n.all_input_nodes
    return False


def _elementwise(r: RowReader, n: fx.Node) -> bool:
    return r.name(n) in ELEMENTWISE or r.name(n) in MOVES or without_sum(r, n)


def _made_of(r: RowReader, n: fx.Node, inner: set[fx.Node], depth: int = 12) -> bool:
    """Is n computed from projections alone, element by element? A residual is not."""
    if n in inner or n.op != "call_function" or not _elementwise(r, n) or depth == 0:
        return n in inner
    sides = n.all_input_nodes[:1] if r.name(n) in MOVES else [x for x in n.all_input_nodes if _wide(r, x, n)]
    return bool(sides) and all(_made_of(r, x, inner, depth - 1) for x in sides)


def _reached(r: RowReader, last: fx.Node, owner: dict, lasts: set[fx.Node]) -> set[fx.Node]:
    """What the results flow into by linear operations, up to another addend or the next layer."""
    found: set[fx.Node] = set()
    queue = list(last.users)
    while queue:
        n = queue.pop()
        if n in found or n.op != "call_function" or n in lasts:
            continue
        if r.name(n) not in THROUGH and r.name(n) not in MOVES:
            continue
        found.add(n)
        others = [x for x in n.all_input_nodes if x not in found and x is not last and x not in owner]
        ends_here = r.name(n) == "add" and any(
            _wide(r, x, n) and selected_from(r, x) is None for x in others if x not in lasts and r.name(x) != "index"
        )
        users = [u for u in n.users if u.op == "call_function"]
        summed_on = list(map(r.name, users)) == ["add"]  # as in a loop that begins with a base
        projected = r.name(n) == "add" and any(_projects(r, u, n) for u in users)
        if not projected and (not ends_here or summed_on):
            queue += n.users
    return found


def _projects(r: RowReader, product: fx.Node, x: fx.Node) -> bool:
    """Is the next layer's product one of x with a weight, over the features of x?"""
    first = {"linear": 0, "matmul": 0, "mm": 0, "addmm": 1}.get(r.name(product))
    return first is not None and product.args[first] is x and _has_weight(r, product)


def _wide(r: RowReader, x: fx.Node, n: fx.Node) -> bool:
    """Is x as large as n, and no zeros?"""
    tensors = all(isinstance(y.meta.get("val"), torch.Tensor) for y in (x, n))
    return tensors and r.shape(x) == r.shape(n) and not is_zeros(r, x)


def routed(r: RowReader, cone: set[fx.Node], ends: set[fx.Node]) -> bool:
    """Is there a sign of routing: several experts, stacked weights, rows gathered or added up by a tensor?"""
    if len(ends) > 1 or any(r.name(n) in (*ADDS, "gather", "index") for n in cone if n.op == "call_function"):
        return True
    if any(r.name(n) == "mul" and any(_says_which(r, x) for x in n.all_input_nodes if x not in cone) for n in cone):
        return True
    return any(r.name(n) in (*GROUPED, "bmm", "einsum", "baddbmm") or _stacked(n) for n in ends)


def _says_which(r: RowReader, x: fx.Node) -> bool:
    """Is a column made of a comparison of ids, a few steps away?"""
    seen: set[fx.Node] = set()
    queue = [x]
    while queue and len(seen) < 25:
        n = queue.pop(0)
        if n in seen or n.op != "call_function" or r.name(n) in PRODUCTS:
            continue
        seen.add(n)
        if r.name(n) in ("eq", "one_hot", "scatter"):
            return True
        if r.name(n) in ELEMENTWISE or r.name(n) in MOVES or r.name(n) in ("sum", "any"):
            queue += n.all_input_nodes
    return False


def _stacked(n: fx.Node) -> bool:
    return any(isinstance(x.meta.get("val"), torch.Tensor) and x.meta["val"].dim() > 2 for x in n.all_input_nodes[1:])


def looks_routed(r: RowReader, node: fx.Node) -> bool:
    """Are rows added up by a tensor, multiplied by a column that compares ids, or by weights that ids chose?"""
    if r.name(node) in PRODUCTS:
        return any(map(gathered, node.all_input_nodes)) and node.meta["val"].dtype.is_floating_point
    if r.name(node) != "mul":
        return r.name(node) in ADDS and r.name(node) != "scatter" and node.meta["val"].dtype.is_floating_point
    columns = [
        x for x in node.all_input_nodes if isinstance(x.meta.get("val"), torch.Tensor) and x.meta["val"].dim() > 1
    ]
    columns = [x for x in columns if r.shape(x)[-1] == 1 != r.shape(node)[-1]]
    return any(_says_which(r, x) for x in columns)


def gathered(x: fx.Node) -> bool:
    """Is a tensor made of the weights of the experts that ids name?"""
    while x.op == "call_function" and x.all_input_nodes:
        first = x.all_input_nodes[0]
        name = str(x.target).split(".")[1] if "aten." in str(x.target) else ""
        if name in ("index", "index_select", "gather") and first.op in ("placeholder", "get_attr"):
            return isinstance(first.meta.get("val"), torch.Tensor) and first.meta["val"].dim() > 2
        if name not in MOVES and name not in CASTS:
            return False
        x = first
    return False


def followers(node: fx.Node) -> set[fx.Node]:
    """What follows from a node: one refusal speaks for a whole loop."""
    found: set[fx.Node] = set()
    queue = [node]
    while queue and len(found) < 500:
        for user in queue.pop().users:
            if user not in found:
                found.add(user)
                queue.append(user)
    return found


def computed(r: RowReader, node: fx.Node) -> bool:
    """Are the rows that are added computed by a projection, not far away?"""
    seen: set[fx.Node] = set()
    queue = list(node.all_input_nodes)
    while queue and len(seen) < 60:
        n = queue.pop(0)
        if n not in seen and n.op == "call_function":
            seen.add(n)
            if r.name(n) in PRODUCTS:
                return True
            queue += n.all_input_nodes
    return False
