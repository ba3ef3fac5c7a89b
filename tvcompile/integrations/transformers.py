"""Models of `transformers`, through its own switches; with and without torch.compile.

    from tvcompile.integrations import transformers as tv
    tv.register()
    AutoModelForCausalLM.from_pretrained(name, experts_implementation="tv", attn_implementation="tv")

experts    What the module does between its two projections is traced and read: a MoESpec. Where there is none, the
           library's grouped product runs, with one warning that says why.
attention  The library's mask for SDPA, or its absence, scale, softcap and sinks become an AttentionSpec; K and V are
           passed with the heads they have. Position biases, paged caches and what no kernel serves go to the
           library's SDPA.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from .. import expr as E
from ..derive import derivative
from ..expr import Expr
from ..moe_spec import MoESpec
from ..passes.read import Reader
from ..select import select
from ..spec import AttentionSpec, Refuse, Size

NAME = "tv"
aten = torch.ops.aten


def _power(x: Tensor, n: float) -> Tensor:
    return functools.reduce(torch.mul, [x] * int(n)) if n in (1, 2, 3, 4) else NotImplemented


# Activations that are one operation in PyTorch, as the formulas that they are.
COMPOSED = {
    **get_decompositions([aten.silu, aten.gelu, aten.hardswish, aten.mish, aten.leaky_relu]),
    aten.relu.default: lambda x: torch.where(x <= 0, 0.0, x),
    aten.square.default: lambda x: x * x,
    aten.pow.Tensor_Scalar: _power,
}


def register() -> None:
    """Adds experts_implementation="tv" and attn_implementation="tv". Raises ImportError without transformers 5."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts)
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


def experts(module: torch.nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T,H], top_k_index and top_k_weights [T,K] -> [T,H]; the library's signature."""
    spec = _spec_at(id(module))
    if not spec:
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(module, hidden_states, top_k_index, top_k_weights)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, name), module.down_proj
    if not module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    biases = ([getattr(module, f"{name}_bias")], [module.down_proj_bias]) if module.has_bias else ([], [])
    ids, x = top_k_index, hidden_states.to(up.dtype)
    if module._is_expert_parallel:  # an expert of another process has the number E
        ids = torch.where(ids >= module.num_experts, -1, ids)
    save = torch.is_grad_enabled() and (x.requires_grad or up.requires_grad or top_k_weights.requires_grad)
    out, _ = torch.ops.tv.moe(x, ids, top_k_weights, [up], [down], *biases, spec, save)
    return out.to(hidden_states.dtype)


@torch.compiler.assume_constant_result
def _spec_at(address: int) -> str:
    """`spec_of` the living module at an address: of a constant's function, torch 2.11 takes numbers alone."""
    return spec_of(ctypes.cast(ctypes.c_void_p(address), ctypes.py_object).value)


# Module -> (what its formula depends on, the spec's text).
_specs: weakref.WeakKeyDictionary[torch.nn.Module, tuple[tuple, str]] = weakref.WeakKeyDictionary()


def spec_of(module: torch.nn.Module) -> str:
    """Text of the MoESpec of an experts module, "" where it has none; a warning says why, once for each class."""
    numbers = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float)) and k != "training"}
    facts = (type(getattr(module, "act_fn", None)), *numbers.items())
    known = _specs.get(module)
    if known is None or known[0] != facts:
        try:
            known = facts, str(read_experts(module))
        except Refuse as refusal:
            _warn_once(f'experts_implementation="tv": {type(module).__name__} runs as grouped_mm: {refusal.reason}')
            known = facts, ""
        _specs[module] = known
    return known[1]


@torch.compiler.assume_constant_result
def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, stacklevel=2)


_warned: set[str] = set()


def read_experts(module: torch.nn.Module) -> MoESpec:
    """What an experts module computes. Raises Refuse."""
    if module.has_post_expert_norm:
        raise Refuse("a norm follows each expert")
    up = module.gate_up_proj if module.has_gate else module.up_proj
    if type(up) not in (Tensor, torch.nn.Parameter) or up.dim() != 3 or not up.is_floating_point():
        raise Refuse(f"the weights are a {type(up).__name__} of {up.dtype}")
    wide = up.shape[2] if module.is_transposed else up.shape[1]
    function, F = (module._apply_gate, wide // 2) if module.has_gate else (module.act_fn, wide)
    formula, f = read_activation(function, wide, F)
    layouts = {"plain": {f: E.UP}, "chunk": {f: E.GATE, f + F: E.UP}, "interleave": {2 * f: E.GATE, 2 * f + 1: E.UP}}
    for layout in ("chunk", "interleave") if module.has_gate else ("plain",):
        act = in_units(formula, layouts[layout])
        if act is not None:
            return differentiable(MoESpec(act, layout))
    raise Refuse("the activation is no formula of one gate and one value of the up projection")


def differentiable(spec: MoESpec) -> MoESpec:
    """The spec itself. Raises Refuse where the activation has no derivative."""
    try:
        for unit in (E.GATE, E.UP):
            derivative(spec.act, unit)
    except ValueError as error:
        raise Refuse(str(error)) from None
    return spec


def read_activation(function: Callable[[Tensor], Tensor], wide: int, F: int) -> tuple[Expr, Expr]:
    """(formula of function(pre)[r, f] where pre is [., wide], f). Raises Refuse."""
    # Dynamo may be tracing the model: what is traced here is none of its business.
    with torch.no_grad(), torch._guards.tracing(None):
        tracer = make_fx(
            lambda pre: function(pre), COMPOSED, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True
        )
        graph = tracer(torch.empty(3, wide)).graph
    out = graph.output_node().args[0]
    value = out.meta["val"]
    if list(value.shape) != [3, F]:
        raise Refuse(f"[3, {wide}] becomes {list(value.shape)}")
    kinds = {n.meta["val"].dtype for n in graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    if kinds & {torch.float16, torch.bfloat16}:
        raise Refuse("it rounds to 16 bits whatever the weights' dtype is")
    reader = Reader(graph)
    r, f = (reader.fresh(E.number(n)) for n in (3, F))
    formula = reader.read(out, (r, f), len(reader.position))
    pre = next(iter(graph.nodes)).name
    others = {name.name[1:] for name, *_ in map(E.operands, E.loads(formula))} - {pre}
    if others:
        raise Refuse(f"{min(others)} has no formula")
    return formula, f


def in_units(formula: Expr, units: Mapping[Expr, Expr]) -> Expr | None:
    """The formula with its loads as g and u, or None where it reads other columns or holds their number."""
    columns = {load: E.operands(load)[-1] for load in E.loads(formula)}
    if not set(columns.values()) <= set(units):
        return None
    act = E.substitute(formula, {load: units[column] for load, column in columns.items()})
    return None if act.free_symbols - {E.GATE, E.UP} else act


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [B,H,S_q,D], key [B,H_kv,S_kv,D], value [B,H_kv,S_kv,D_v] -> ([B,S_q,H,D_v], None).

    Of the keyword arguments is_causal, softcap (a number) and s_aux (sinks [H]) are read; a window is in the mask.
    """
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    sinks, causal = kwargs.get("s_aux"), kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    text = spec_text(scale, kwargs.get("softcap"), attention_mask, causal and query.shape[2] > 1, sinks, dropout)
    reason = " and ".join(name for name in ("position_bias", "cache") if kwargs.get(name) is not None)
    reason = reason or no_kernel(text, device, query.dtype, int(query.shape[-1]), int(value.shape[-1]))
    if reason:
        return _library_attention(module, (query, key, value, attention_mask), dropout, scaling, kwargs, reason)
    captures = [] if attention_mask is None else [attention_mask.squeeze(_shared(attention_mask))]
    captures += [] if sinks is None else [sinks]
    seed = torch.randint(-(2**62), 2**62, [], device=query.device) if dropout else None
    out = torch.ops.tv.attention(query, key, value, captures, [], text, seed)[0]
    return out.transpose(1, 2).contiguous(), None


def _shared(mask: Tensor) -> tuple[int, ...]:
    """The dims of a mask [B,H,S_q,S_kv] that all share one entry."""
    return tuple(d for d in range(4) if mask.shape[d] == 1)


def spec_text(
    scale: float, softcap: float | None, mask: Tensor | None, causal: bool, sinks: Tensor | None, dropout: float
) -> str:
    """Text of the AttentionSpec; its captures are mask or bias, then sink."""
    score, keep = "s", "kv <= q" if causal and mask is None else ""
    if softcap is not None:
        score = f"{float(softcap)!r}*tanh(s/{float(softcap)!r})"
    if mask is not None:
        entry = ", ".join(axis for d, axis in enumerate(("b", "h", "q", "kv")) if d not in _shared(mask))
        if mask.dtype == torch.bool:
            keep = f"mask[{entry}]"
        else:
            score = f"{score} + bias[{entry}]"
    clauses = [f"scale={float(scale)!r}"]
    clauses += [f"score = {score}"] * (score != "s") + [f"keep = {keep}"] * bool(keep)
    clauses += ["sink = sink[h]"] * (sinks is not None) + [f"dropout={float(dropout)!r}"] * bool(dropout)
    return "; ".join(clauses + ["empty=zero"] * (mask is not None))


@torch.compiler.assume_constant_result
def no_kernel(text: str, device: str, dtype: torch.dtype, D: int, D_v: int) -> str:
    """Why no kernel serves; empty where one does."""
    return _no_kernel(text, device, dtype, D, D_v)


@functools.cache
def _no_kernel(text: str, device: str, dtype: torch.dtype, D: int, D_v: int) -> str:
    return select(AttentionSpec.parse(text), torch.device(device), dtype, Size(features=(D, D_v)))[1]


def _library_attention(module, tensors, dropout, scaling, kwargs, reason):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _warn_once(f'attn_implementation="tv": {type(module).__name__} runs as sdpa: {reason}')
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"sdpa has no sinks and tv does not serve this attention: {reason}")
    query, key, value, mask = tensors
    return sdpa_attention_forward(module, query, key, value, mask, dropout, scaling, **kwargs)
