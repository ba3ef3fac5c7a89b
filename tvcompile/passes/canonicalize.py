"""Dynamo's graph -> pre-dispatch ATen, with in-place operations on temporaries made functional.

    s = s / 8; s += mask; p = softmax(s)
    ->  div = aten.div.Tensor(s, 8); add = aten.add.Tensor(div, mask); softmax = aten.softmax.int(add, -1)

A higher-order operator stays one node. The body of an activation checkpoint is canonicalized (and
lifted) by itself; every other body is left whole. What is in place on inputs, parameters or shared
views stays in place; the lifting treats it as a barrier.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

CHECKPOINTS = ("tag_activation_checkpoint",)


class _Retrace(fx.Interpreter):
    """Runs Dynamo's graph under make_fx; a higher-order operator becomes one node."""

    def __init__(self, gm: fx.GraphModule, bodies: dict[fx.GraphModule, fx.GraphModule]):
        super().__init__(gm)
        self.bodies = bodies
        self.kept: list[str] = []

    def run_node(self, n: fx.Node):
        self.node = n
        return super().run_node(n)

    def call_method(self, target, args, kwargs):
        # With dynamic shapes a Python float is a 0-d input whose item() Dynamo has already named.
        known = self.node.meta.get("example_value")
        if target == "item" and isinstance(known, torch.SymFloat) and isinstance(args[0], FakeTensor):
            args[0].item_memo = known
        return super().call_method(target, args, kwargs)

    def call_function(self, target, args, kwargs):
        if not isinstance(target, HigherOrderOperator):
            return super().call_function(target, args, kwargs)
        self.kept.append(target.name())
        tracer = proxy_tensor.get_proxy_mode().tracer
        mode = fake_mode_of((args, kwargs))

        def as_argument(x):
            if not isinstance(x, fx.GraphModule):
                return tracer.unwrap_proxy(x)
            body = self.bodies.get(x, x)
            tracer.root.register_module(f"body_{len(list(tracer.root.children()))}", body)
            return body

        named = pytree.tree_map(as_argument, (args, kwargs))
        proxy = tracer.create_proxy("call_function", target, *named, name=target.name())
        example = pytree.tree_map(lambda x: in_mode(x, mode), self.node.meta["example_value"])
        return proxy_tensor.track_tensor_tree(example, proxy, constant=None, tracer=tracer)


class _UnderAutocast(fx.Interpreter):
    """Pre-dispatch tracing records values as without autocast: computes them anew, with it."""

    def __init__(self, gm: fx.GraphModule, mode):
        super().__init__(gm)
        self.mode = mode

    def run_node(self, n: fx.Node):
        if n.op == "get_attr" or isinstance(n.target, HigherOrderOperator):
            return n.meta.get("val", self.submodules.get(n.target) if n.op == "get_attr" else None)
        with self.mode:
            result = super().run_node(n)
        if n.op == "call_function" and "val" in n.meta:
            n.meta["val"] = result
        return result


def fake_mode_of(values):
    """The mode of the fake tensors themselves; Dynamo has a second one ready for AOTAutograd."""
    for x in pytree.tree_leaves(values):
        if isinstance(x, FakeTensor):
            return x.fake_mode
    return torch._guards.detect_fake_mode(values)


def in_mode(x, mode):
    """A fake tensor of another fake mode as one of this mode."""
    if not isinstance(x, FakeTensor) or x.fake_mode is mode or mode is None:
        return x
    with mode:
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return y.requires_grad_(x.requires_grad)


def placeholders_of(gm: fx.GraphModule) -> list:
    """The fake inputs that Dynamo stored on its placeholders."""
    return [_example(n) for n in gm.graph.find_nodes(op="placeholder")]


def _example(value):
    if not isinstance(value, fx.Node):
        return value
    return value.meta["example_value"] if "example_value" in value.meta else value.meta["val"]


def checkpoint_bodies(gm: fx.GraphModule) -> list[tuple[fx.GraphModule, list]]:
    """The body of every activation checkpoint in Dynamo's graph, with its fake inputs."""
    found = []
    for n in gm.graph.nodes:
        if isinstance(n.target, HigherOrderOperator) and n.target.name() in CHECKPOINTS:
            found.append((getattr(gm, n.args[0].target), [_example(a) for a in n.args[1:]]))
    return found


def canonicalize(gm: fx.GraphModule, fakes: Sequence, bodies: dict) -> tuple[fx.GraphModule, list[str]]:
    """(the graph in pre-dispatch ATen, names of the higher-order operators left whole).

    fakes: one fake tensor, SymInt or constant per placeholder, in the fake mode Dynamo used.
    bodies: what takes the place of the body of an activation checkpoint.
    """
    mode = fake_mode_of(fakes)
    retrace = _Retrace(gm, bodies)
    tracer = proxy_tensor.make_fx(retrace.run, pre_dispatch=True, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    shape_env = mode.shape_env if mode is not None else None
    fresh = shape_env.ignore_fresh_unbacked_symbols() if shape_env else contextlib.nullcontext()
    with torch.fx.traceback.preserve_node_meta(), fresh:
        traced = tracer(*fakes)
    _keep_dynamo_facts(gm, traced)
    if any(n.target is torch.amp.autocast_mode._enter_autocast for n in traced.graph.nodes):
        values = [n.meta["val"] for n in traced.graph.find_nodes(op="placeholder")]
        _UnderAutocast(traced, fake_mode_of(values)).run(*values)
    functionalize_temporaries(traced.graph)
    remove_dead_nodes(traced.graph)
    traced.recompile()
    return traced, [name for name in retrace.kept if name not in CHECKPOINTS]


def _keep_dynamo_facts(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Names, sources and static-address marks of the inputs, which AOTAutograd reads."""
    pairs = zip(old.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"))
    for before, after in pairs:
        after.meta = {**before.meta, **after.meta}
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
        after._rename(before.name)
    new.meta = dict(old.meta)
    new.__dict__.pop("shape_env", None)  # make_fx leaves it; a cache key cannot hold it
    if hasattr(old, "_param_name_to_source"):
        # Tensor literals became buffers of the new module; AOTAutograd asks where each comes from.
        literals = {name: ConstantSource(name) for name, _ in new.named_buffers(remove_duplicate=False)}
        new._param_name_to_source = literals | old._param_name_to_source


def remove_dead_nodes(graph: fx.Graph) -> None:
    """Erase what nobody uses. Bodies of higher-order operators are not ours to clean: they may write in place."""
    for node in reversed(list(graph.nodes)):
        if not node.users and not node.is_impure(impure_random=False):
            graph.erase_node(node)


def remove_idle_rows(graph: fx.Graph) -> None:
    """Erase rows chosen by a mask of which only the number is still asked: that it is within bounds."""
    for node in reversed(list(graph.nodes)):
        if _chooses_rows(node):
            asked = _askers(node)
            if asked is not None:
                for user in reversed(asked):
                    graph.erase_node(user)


def _chooses_rows(node: fx.Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return False
    name = node.target._schema.name
    mask = name == "aten::index" and any(getattr(i.meta["val"], "dtype", None) == torch.bool for i in node.args[1] if i)
    return mask or name in ("aten::nonzero", "aten::nonzero_numpy") or node.target is torch.ops.aten.where.default


def _askers(node: fx.Node) -> list[fx.Node] | None:
    """The node and what follows from it, in graph order, if that is sizes, comparisons of them and assertions only."""
    found, queue = {node}, list(node.users)
    while queue:
        user = queue.pop()
        if user.op != "call_function":
            return None
        value = user.meta.get("val")
        harmless = (
            isinstance(value, (torch.SymInt, torch.SymBool, bool))
            or user.target is operator.getitem
            or "_assert_scalar" in str(user.target)
            or "sym_constrain_range" in str(user.target)
        )
        if not harmless:
            return None
        if user not in found:
            found.add(user)
            queue += user.users
    return [n for n in node.graph.nodes if n in found]


# Which nodes write, and to which memory


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


def functionalize_temporaries(graph: fx.Graph) -> None:
    """`y = x.op_(...)` becomes `y = x.op(...)` where nobody else can see x's memory.

    A write to a slice of a temporary, `x[:, :5] = True`, becomes x = slice_scatter(x, ...).
    """
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
        chain = _slices_down_to_base(x)
        earlier = [a for a in group if a not in chain and position[a] < now]
        if any(position[user] > now for a in earlier for user in a.users):
            continue
        if len(chain) > 1 and any(position[u] > now for a in chain[:-1] for u in a.users):
            continue
        new = _replace_in_place(graph, node, plain, x, position)
        group.append(new)
        if len(chain) > 1:
            group.append(_scatter_back(graph, new, chain, position, now))


SCATTER = {"aten::slice": torch.ops.aten.slice_scatter.default, "aten::select": torch.ops.aten.select_scatter.default}


def _slices_down_to_base(x: fx.Node) -> list[fx.Node]:
    """[x, what x is a slice of, ...]; [x] alone where it is no slice of a temporary."""
    chain = [x]
    while getattr(getattr(chain[-1].target, "_schema", None), "name", "") in SCATTER:
        chain.append(chain[-1].args[0])
    return chain


def _scatter_back(graph, new: fx.Node, chain: list[fx.Node], position: dict, now: int) -> fx.Node:
    """The base with the written slice in it; it takes the base's place from here on."""
    base, after = chain[-1], new.next
    for view in chain[:-1]:
        whole = view.args[0]
        with graph.inserting_before(after):
            scattered = graph.call_function(SCATTER[view.target._schema.name], (whole, new, *view.args[1:]))
        scattered.meta = dict(whole.meta)
        position[scattered], new = now, scattered
    for user in [u for u in base.users if position.get(u, now) > now]:
        user.replace_input_with(base, new)
    return new


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
