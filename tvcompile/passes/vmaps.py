"""What is inside of torch.vmap, as operations on whole batches.

    _vmap_increment_nesting(4); u = _add_batch_dim(U, 0, 1); y = x @ u; Y = _remove_batch_dim(y, 1, 4, 0)
    ->  Y = bmm(x.expand(4, T, H), U)

Inside, a tensor is not what its shape says. PyTorch's own batching rules say what each operation becomes. Other
function transforms, and a vmap whose operations depend on a mode or draw numbers, leave a graph whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import fx
from torch._functorch import predispatch
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx.experimental import proxy_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from ..spec import Refuse

BEGIN, END = predispatch._vmap_increment_nesting, predispatch._vmap_decrement_nesting
OF_VMAP = (BEGIN, END, predispatch._add_batch_dim, predispatch._remove_batch_dim)
IDLE = (predispatch.lazy_load_decompositions,)
MODES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast", "inference_mode")


@dataclasses.dataclass(frozen=True)
class Batched:
    """A vmap: its nodes; what they read from outside; what is read of them; and what computes that in whole batches."""

    nodes: frozenset[fx.Node]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    program: fx.GraphModule


def batched(gm: fx.GraphModule) -> dict[fx.Node, Batched]:
    """The outermost vmaps of Dynamo's graph by their first node. Refuse where a function transform stays."""
    found = {}
    for nodes in _regions(gm.graph):
        found[nodes[0]] = _batched(gm, nodes)
    inside = frozenset().union(*(b.nodes for b in found.values()))
    for n in gm.graph.nodes:
        if n not in inside and _is_functorch(n) and n.target not in IDLE:
            raise Refuse("a graph with a function transform (grad, jvp) is left whole", n)
    return found


def _is_functorch(n: fx.Node) -> bool:
    return n.op == "call_function" and getattr(n.target, "__module__", "").startswith("torch._functorch")


def _name(n: fx.Node) -> str:
    return getattr(n.target, "__name__", "")


def _regions(graph: fx.Graph) -> Iterator[list[fx.Node]]:
    depth, nodes = 0, []
    for n in graph.nodes:
        depth += n.target is BEGIN
        if depth:
            nodes.append(n)
        if n.target is END:
            depth -= 1
            if not depth:
                yield nodes
                nodes = []


def _batched(gm: fx.GraphModule, nodes: list[fx.Node]) -> Batched:
    about, inside = nodes[0], set(nodes)
    for n in nodes:
        foreign = _is_functorch(n) and n.target not in (*OF_VMAP, *IDLE)
        if foreign or isinstance(n.target, HigherOrderOperator) or _name(n) in MODES:
            raise Refuse("a graph with a vmap around another transform or a mode is left whole", n)
    if torch.is_autocast_enabled() or any(
        getattr(n.target, "__name__", "") == "_enter_autocast" for n in gm.graph.nodes
    ):
        raise Refuse("a graph with a vmap and autocast is left whole", about)
    inputs = tuple(dict.fromkeys(x for n in nodes for x in n.all_input_nodes if x not in inside))
    if any("example_value" not in x.meta for x in inputs):
        raise Refuse("a graph with a vmap that reads what Dynamo gives no example of is left whole", about)
    outputs = tuple(n for n in nodes if any(user not in inside for user in n.users))
    graph, copies = fx.Graph(), {}
    for x in inputs:
        copies[x] = graph.placeholder(x.name)
    for n in nodes:
        copies[n] = graph.node_copy(n, copies.__getitem__)
    graph.output([copies[n] for n in outputs])
    inner = fx.GraphModule(gm, graph)

    def run(*values):
        results = fx.Interpreter(inner).run(*values)
        if any(isinstance(x, torch.Tensor) and torch._C._functorch.is_batchedtensor(x) for x in results):
            raise ValueError("a tensor leaves it as it is inside")
        return results

    values = pytree.tree_map(lambda x: x.meta["example_value"], inputs)
    env = next((x.fake_mode.shape_env for x in values if isinstance(x, torch._subclasses.FakeTensor)), None)
    fresh = env.ignore_fresh_unbacked_symbols() if env else contextlib.nullcontext()
    try:
        # The other kernels of scaled_dot_product_attention would be operations that have no formula.
        with torch.fx.traceback.preserve_node_meta(), fresh, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            traced = proxy_tensor.make_fx(run, tracing_mode="symbolic", _allow_non_fake_inputs=True)(*values)
    except Exception as error:
        why = f"a graph with a vmap that has no rule of batches ({type(error).__name__}: {error}) is left whole"
        raise Refuse(why, about) from error
    for n in traced.graph.nodes:
        if isinstance(n.target, OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags:
            raise Refuse("a graph with a vmap that draws numbers is left whole", n)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return Batched(frozenset(nodes), inputs, outputs, traced)
