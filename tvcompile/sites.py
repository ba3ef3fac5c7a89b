"""From the nodes of the ops to what tuning knows of them: their problems, their configs, and the search of a graph."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from .arch import Device
from .kernels.problem import hint
from .moe_spec import MoESpec
from .spec import AttentionSpec
from .tuning import choose, search
from .tuning.work import Attention, Experts, Work, dtype_name, of_tensors


def work_of(node: fx.Node, learned: set[fx.Node]) -> tuple[Work, torch.device]:
    """The problem of a node of tv.attention or tv.moe; of sizes that may change, as they are now, 0 where not known."""
    args: Any = fx.map_arg(node.args, lambda n: n.meta["val"])
    trains = bool(learned & set(node.all_input_nodes))
    if node.target is torch.ops.tv.attention.default:
        q, k, v, captures, sizes, spec, _ = args
        (B, H, S_q, D), (_, H_kv, S_kv, D_v) = (map(hint, t.shape) for t in (q, v))
        sizes = tuple(map(hint, sizes))
        shape = B, H, H_kv, S_q, S_kv, D, D_v
        wanted: Any = [n in learned for n in node.args[3]]  # type: ignore[union-attr]
        held = of_tensors(captures, wanted, hint)
        return Attention(AttentionSpec.parse(spec), dtype_name(q.dtype), *shape, held, sizes, trains), q.device
    x, ids, _, up, down, *biases, spec, saves = args
    (T, K), (*lead, F, H_out) = (tuple(map(hint, t.shape)) for t in (ids, down[0]))
    how: dict[str, Any] = {"stacked": bool(lead), "biases": (bool(biases[0]), bool(biases[1]))}
    how |= {"columns": up[0].stride(-1) != 1, "backward": trains and saves}
    E, H = lead[0] if lead else len(down), hint(x.shape[1])
    return Experts(MoESpec.parse(spec), dtype_name(x.dtype), T, K, E, H, F, H_out, **how), x.device


def learned(program: fx.GraphModule, inputs: Sequence[Any]) -> set[fx.Node]:
    """Floats that may need a gradient: inputs and parameters that want one, and what is made of them."""
    found: set[fx.Node] = set()
    given = dict(zip(program.graph.find_nodes(op="placeholder"), inputs))
    for node in program.graph.nodes if torch.is_grad_enabled() else ():
        if node.op == "get_attr":
            given[node] = getattr(program, node.target, None)
        val, source = node.meta.get("val"), given.get(node)
        wants = isinstance(source, torch.Tensor) and source.requires_grad
        whole = isinstance(val, torch.Tensor) and not val.is_floating_point()
        if wants or not whole and found & set(node.all_input_nodes):
            found.add(node)
    return found


def configs_of(work: Work, device: torch.device) -> str:
    """What was measured for a site: `bwd: Config(...), measured on ..., 2026-11-24`; "" if nothing was."""
    found = []
    for ask in work.asks(Device.of(device)):
        for choice in choose(ask)[:1]:
            if "measured" in choice.source:
                found.append(f"{ask.pass_}: {choice.config}, {choice.source}")
    return "\n".join(found)


def unknown(work: Work) -> str:
    """ "" if a search can make the problem's tensors, else why not."""
    names = [name for name in ("B", "H", "S_q", "S_kv", "T", "K", "E") if getattr(work, name, 1) == 0]
    if isinstance(work, Attention) and any(0 in c.shape for c in work.captures):
        names.append("a captured tensor")
    return f"the size of {', '.join(names)} is not known" if names else ""


def tune(works: Sequence[tuple[Work, torch.device]], effort: str, strict: bool = False) -> None:
    """Searches for what has no measured config yet. What goes wrong is warned of, or raised if `strict`."""
    able: dict[torch.device, list[Work]] = {}
    for work, device in works:
        if why := unknown(work):
            warnings.warn(f"tvcompile: `{work.spec}` is not tuned: {why} while the graph is compiled", stacklevel=2)
        else:
            able.setdefault(device, []).append(work)
    try:
        for device, of_device in able.items():
            search.tune(of_device, device, effort)
    except Exception as error:
        if strict:
            raise
        warnings.warn(
            f"tvcompile: the search for configs failed ({type(error).__name__}: {error}); the program is compiled with "
            "those it has. options={'tv.strict': True} raises instead.",
            stacklevel=2,
        )
