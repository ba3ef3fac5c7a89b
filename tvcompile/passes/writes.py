"""Writes to memory: which nodes make them, and temporaries without them.

    ff = out.view(-1, H); ff.index_add_(0, i, y); use(out)
    ->  new = index_add(ff, 0, i, y); use(view_as(new, out))

A write is made functional where only this graph can see the memory. What else shows the memory later is made anew: the
tensor that views were taken of gets the written view back (scattered into it where it is a slice, reshaped where it is
a reshape), and its other views are taken of that.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._ops import OpOverload
from torch._prims_common import is_contiguous_or_false
from torch.utils import _pytree as pytree

aten = torch.ops.aten


def storage_of(node: fx.Node) -> int | None:
    """Identity of the memory behind a node's tensor, or None."""
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor) and not val.is_sparse:
        return val.untyped_storage()._cdata
    return None


def written_arguments(node: fx.Node) -> list[fx.Node]:
    """The arguments that an ATen or custom operator mutates."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return []
    if not node.target._schema.is_mutable:
        return []
    written: list[fx.Node] = []
    for i, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.kwargs.get(argument.name, node.args[i] if i < len(node.args) else None)
            written += [x for x in pytree.tree_leaves(value) if isinstance(x, fx.Node)]
    return written


def functional_form(target: OpOverload) -> OpOverload | None:
    """aten.add_.Tensor -> aten.add.Tensor, aten.__iand__ -> aten.__and__, or None."""
    name = target._schema.name.split("::")[1]
    if name.startswith("__i") and name.endswith("__"):
        plain = "__" + name[3:]
    elif name.endswith("_") and not name.endswith("__"):
        plain = name[:-1]
    else:
        return None
    if plain == "copy":
        return torch.ops.aten.expand_as.default  # copy itself has no derivative
    packet = getattr(torch.ops.aten, plain, None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


SCATTER = {"aten::slice": aten.slice_scatter.default, "aten::select": aten.select_scatter.default}
RESHAPES = frozenset(
    f"aten::{name}"
    for name in "view reshape _unsafe_view flatten unflatten unsqueeze squeeze view_as reshape_as".split()
)


def functionalize_temporaries(graph: fx.Graph) -> None:
    """`y = x.op_(...)` becomes `y = x.op(...)` where nobody else can see x's memory, or can be shown it anew."""
    position = {n: i for i, n in enumerate(graph.nodes)}
    aliases: dict[int, list[fx.Node]] = {}
    for n in graph.nodes:
        if (key := storage_of(n)) is not None:
            aliases.setdefault(key, []).append(n)
    for node in list(graph.nodes):
        written = written_arguments(node)
        if len(written) != 1 or written[0] is not node.args[0] or node.target.namespace != "aten":
            continue
        plain, x = functional_form(node.target), written[0]
        memory = storage_of(x)
        if plain is None or memory is None or memory != storage_of(node):
            continue
        group, now = aliases[memory], position[node]
        if any(a.op in ("placeholder", "get_attr") for a in group):
            continue
        later = [a for a in group if position[a] < now and any(position[u] > now for u in a.users)]
        path, shown = _path(x), [a for a in later if a is not x]
        if any(_path(a)[-1] is not path[-1] for a in shown):
            continue
        new = _replace_in_place(graph, node, plain, x, position)
        group.append(new)
        if shown:
            group += _show_again(graph, new, path, shown, position, now)


def _name(node: fx.Node) -> str:
    return getattr(getattr(node.target, "_schema", None), "name", "")


def _path(x: fx.Node) -> list[fx.Node]:
    """[x, what x is a slice or a reshape of, ..., the tensor itself]"""
    path = [x]
    while _name(path[-1]) in SCATTER or _name(path[-1]) in RESHAPES and is_contiguous_or_false(path[-1].meta["val"]):
        if storage_of(path[-1].args[0]) != storage_of(x):
            break  # a reshape that copies
        path.append(path[-1].args[0])
    return path


def _show_again(graph: fx.Graph, new: fx.Node, path: list, shown: list, position: dict, now: int) -> list[fx.Node]:
    """Makes anew what shows the written memory later; `new` is what was written, in the place of path[0].

    All of it are views of one tensor again: of `new`, or where that is a slice, of what it was scattered into.
    """
    made: dict[fx.Node, fx.Node] = {path[0]: new}
    after, users = new.next, list(new.users)

    def call(like: fx.Node, target: OpOverload, args: tuple, kwargs: dict | None = None) -> fx.Node:
        with graph.inserting_before(after):
            node = graph.call_function(target, args, kwargs)
        node.meta, position[node] = dict(like.meta), now
        return node

    def again(a: fx.Node) -> fx.Node:
        if a not in made:
            made[a] = call(a, a.target, (again(a.args[0]), *a.args[1:]), a.kwargs)
        return made[a]

    for view, whole in zip(path, path[1:]):
        if _name(view) in SCATTER:
            made = {whole: call(whole, SCATTER[_name(view)], (whole, made[view], *view.args[1:]))}
        else:
            made[whole] = call(whole, aten.view_as.default, (made[view], whole))
    for a in shown:
        for user in [u for u in a.users if position.get(u, now) > now]:
            user.replace_input_with(a, again(a))
    if made.get(path[0]) is not new:
        for user in users:
            user.replace_input_with(new, again(path[0]))
    return list(made.values())


def _replace_in_place(graph, node: fx.Node, plain: OpOverload, x: fx.Node, position: dict) -> fx.Node:
    val, now = node.meta["val"], position[node]
    args = (node.args[1], x) if plain is torch.ops.aten.expand_as.default else node.args
    with graph.inserting_before(node):
        new = graph.call_function(plain, args, {} if args is not node.args else node.kwargs)
        new.meta = dict(node.meta)
        if args is not node.args and args[0].meta["val"].dtype != val.dtype:
            new.args = (graph.call_function(torch.ops.aten.to.dtype, (args[0], val.dtype)), x)
            new.args[0].meta = {**args[0].meta, "val": args[0].meta["val"].to(val.dtype)}
            new.prepend(new.args[0])
            position[new.args[0]] = now
        computed = torch.result_type(*_promoted(node)) if plain._schema.name in _PROMOTING else val.dtype
        if computed != val.dtype:
            new.meta["val"] = val.to(computed)
            cast = graph.call_function(torch.ops.aten.to.dtype, (new, val.dtype))
            cast.meta = dict(node.meta)
            position[new], new = now, cast
    position[new] = now
    node.replace_all_uses_with(new)
    for user in [u for u in x.users if position.get(u, now) > now]:
        user.replace_input_with(x, new)
    graph.erase_node(node)
    return new


_PROMOTING = {"aten::add", "aten::sub", "aten::mul", "aten::div"}


def _promoted(node: fx.Node) -> tuple:
    values = (a.meta["val"] if isinstance(a, fx.Node) else a for a in node.args[:2])
    return tuple(1.0 if isinstance(v, torch.SymFloat) else 1 if isinstance(v, torch.SymInt) else v for v in values)
