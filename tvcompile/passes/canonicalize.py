"""Dynamo's graph -> pre-dispatch ATen, with in-place operations on temporaries made functional.

    s = s / 8; s += mask; p = softmax(s)
    ->  div = aten.div.Tensor(s, 8); add = aten.add.Tensor(div, mask); softmax = aten.softmax.int(add, -1)

A higher-order operator stays one node, but for the contexts of torch.export. The body of an activation
checkpoint is canonicalized (and lifted) by itself; every other body is left whole. What is in place on
inputs, parameters or shared views stays in place; the lifting treats it as a barrier.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from .repeated import merge_repeated
from .vmaps import Batched
from .writes import functionalize_temporaries

CHECKPOINTS = ("tag_activation_checkpoint",)
# Of torch.export: a body and the context that it runs in, which Dynamo's graphs have as calls around it.
CONTEXTS: dict[str, Callable] = {
    "wrap_with_set_grad_enabled": torch.set_grad_enabled,
    "wrap_with_autocast": torch.autocast,
}


class _Retrace(fx.Interpreter):
    """Runs Dynamo's graph under make_fx; a higher-order operator becomes one node."""

    def __init__(
        self,
        gm: fx.GraphModule,
        bodies: dict[fx.GraphModule, fx.GraphModule],
        vmaps: dict[fx.Node, Batched],
        kept: list,
    ):
        super().__init__(gm)
        self.bodies, self.vmaps, self.kept = bodies, vmaps, kept
        self.of_vmaps: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node):
        self.node = n
        if (vmap := self.vmaps.get(n)) is not None:
            results = fx.Interpreter(vmap.program).run(*(self.env[x] for x in vmap.inputs))
            self.of_vmaps |= dict.fromkeys(vmap.nodes) | dict(zip(vmap.outputs, results))
        return self.of_vmaps.pop(n) if n in self.of_vmaps else super().run_node(n)

    def call_method(self, target, args, kwargs):
        # With dynamic shapes a Python float is a 0-d input whose item() Dynamo has already named.
        known = self.node.meta.get("example_value")
        if target == "item" and isinstance(known, torch.SymFloat) and isinstance(args[0], FakeTensor):
            args[0].item_memo = known
        return super().call_method(target, args, kwargs)

    def call_function(self, target, args, kwargs):
        if not isinstance(target, HigherOrderOperator):
            return super().call_function(target, args, kwargs)
        if target.name() in CONTEXTS:
            at = next(i for i, x in enumerate(args) if isinstance(x, fx.GraphModule))
            with CONTEXTS[target.name()](*args[:at]):
                return _Retrace(args[at], self.bodies, self.vmaps, self.kept).run(*args[at + 1 :])
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
        example = _example(self.node)
        if target.name() in CHECKPOINTS and any(map(free_unbacked_symbols, pytree.tree_leaves(example))):
            with proxy_tensor.disable_proxy_modes_tracing():  # sizes that data tell have other names than Dynamo's
                example = args[0](*args[1:])
        example = pytree.tree_map(lambda x: in_mode(x, mode), example)
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


def canonicalize(
    gm: fx.GraphModule, fakes: Sequence, bodies: dict, vmaps: dict[fx.Node, Batched]
) -> tuple[fx.GraphModule, list[str]]:
    """(the graph in pre-dispatch ATen, names of the higher-order operators left whole).

    fakes: one fake tensor, SymInt or constant per placeholder, in the fake mode Dynamo used.
    bodies: what takes the place of the body of an activation checkpoint; vmaps: of what is inside of a vmap.
    """
    mode = fake_mode_of(fakes)
    kept: list[str] = []
    retrace = _Retrace(gm, bodies, vmaps, kept)
    tracer = proxy_tensor.make_fx(retrace.run, pre_dispatch=True, tracing_mode="symbolic", _allow_non_fake_inputs=True)
    shape_env = mode.shape_env if mode is not None else None
    fresh = shape_env.ignore_fresh_unbacked_symbols() if shape_env else contextlib.nullcontext()
    with torch.fx.traceback.preserve_node_meta(), fresh:
        traced = tracer(*fakes)
        if any(n.target is torch.amp.autocast_mode._enter_autocast for n in traced.graph.nodes):
            values = [n.meta["val"] for n in traced.graph.find_nodes(op="placeholder")]
            _UnderAutocast(traced, fake_mode_of(values)).run(*values)
    _keep_dynamo_facts(gm, traced)
    remove_asserted_types(traced.graph)
    remove_idle_casts(traced.graph)
    functionalize_temporaries(traced.graph)
    merge_repeated(traced.graph)
    split_contractions(traced.graph)
    remove_dead_nodes(traced.graph)
    traced.recompile()
    return traced, [name for name in kept if name not in CHECKPOINTS]


def split_contractions(graph: fx.Graph) -> None:
    """einsum("bsef,ehf,bse->bsh", a, b, c) -> einsum("bseh,bse->bsh", einsum("bsef,ehf->bseh", a, b), c)

    Two operands at a time, in the order in which ATen takes them itself.
    """
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.einsum.default):
        equation, tensors = node.args
        equation = equation.replace(" ", "")
        alike = {t.meta["val"].dtype for t in tensors} == {node.meta["val"].dtype}
        if len(tensors) < 3 or "->" not in equation or "." in equation or not alike:
            continue
        left, _, out = equation.partition("->")
        held, path = list(zip(left.split(","), tensors)), list(node.kwargs.get("path") or [])
        with graph.inserting_before(node):
            while len(held) > 1:
                taken = path[:2] or [0, 1]
                pair, rest = [held[i] for i in taken], [x for i, x in enumerate(held) if i not in taken]
                asked = set(out).union(*(term for term, _ in rest))
                letters = [c for c in dict.fromkeys("".join(term for term, _ in pair)) if c in asked]
                term = "".join(letters) if rest else out
                new = graph.call_function(
                    node.target, (",".join(t for t, _ in pair) + f"->{term}", [x for _, x in pair])
                )
                new.meta = dict(node.meta)
                new.meta["val"] = node.target(new.args[0], [x.meta["val"] for _, x in pair])
                held, path = [*rest, (term, new)] if path else [(term, new), *rest], path[2:]
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _keep_dynamo_facts(old: fx.GraphModule, new: fx.GraphModule) -> None:
    """Names, sources and static-address marks of the inputs, which AOTAutograd reads."""
    pairs = zip(old.graph.find_nodes(op="placeholder"), new.graph.find_nodes(op="placeholder"))
    for before, after in pairs:
        after.meta = {**before.meta, **after.meta}
        if hasattr(before, "_dynamo_source"):
            after._dynamo_source = before._dynamo_source
        after._rename(before.name)
        after.target = before.target
    new.meta = dict(old.meta)
    new.__dict__.pop("shape_env", None)  # make_fx leaves it; a cache key cannot hold it
    if hasattr(old, "_param_name_to_source"):
        # Tensor literals became buffers of the new module; AOTAutograd asks where each comes from.
        literals = {name: ConstantSource(name) for name, _ in new.named_buffers(remove_duplicate=False)}
        new._param_name_to_source = literals | old._param_name_to_source


def remove_asserted_types(graph: fx.Graph) -> None:
    """Erase what torch.export asserts of a tensor's dtype, device and layout where it is so."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten._assert_tensor_metadata.default):
        given = dict(zip(("a", "size", "stride", "dtype"), node.args)) | node.kwargs
        val, asked = given.pop("a").meta["val"], {k: x for k, x in given.items() if x is not None}
        if asked.keys() <= {"dtype", "device", "layout"} and all(getattr(val, k) == x for k, x in asked.items()):
            graph.erase_node(node)


def remove_idle_casts(graph: fx.Graph) -> None:
    """Erase `x.to(dtype)` of an x that has it: it is x itself."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype):
        given = dict(zip(("self", "dtype", "non_blocking", "copy", "memory_format"), node.args)) | node.kwargs
        x, dtype = given.pop("self"), given.pop("dtype")
        if "val" in x.meta and x.meta["val"].dtype == dtype and not any(given.values()):
            node.replace_all_uses_with(x)
            graph.erase_node(node)


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
    return (
        mask
        or name in ("aten::nonzero", "aten::nonzero_numpy", "aten::argwhere")
        or node.target is torch.ops.aten.where.default
    )


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
