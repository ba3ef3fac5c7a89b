"""Compiles the launches of tv.attention and tv.moe for GPUs that are not here: what would run, no imitation of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

import torch

from .. import expr as E
from ..spec import AttentionSpec

SPEC = "scale=0.088; keep = kv <= q"
MASKS = {
    "full": "",
    "causal": "kv <= q",
    "mask": "kv <= q & q - kv < 1024",
    "data": "kv <= q & ids[b, q] == ids[b, kv]",
}
SCORES = {
    "score": "30.0*tanh(s/30.0)",
    "bias": "30.0*tanh((s + bias[h, q, kv])/30.0)",
}
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """The arguments of kernels.launch.launch."""

    kernel: Any
    grid: tuple
    args: Sequence
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int


def spec_of(work: str) -> str:
    """A spec of a class of work, the heaviest that is common; work_of is the inverse."""
    mask, *edits = work.split("+")
    score = next((f"score = {SCORES[x]}" for x in edits if x in SCORES), "")
    keep = f"keep = {MASKS[mask]}" if MASKS[mask] else ""
    sink = "sink = sink[h]" * ("sink" in edits)
    dropout = "dropout=0.1" * ("dropout" in edits)
    empty = "empty=mean" if "mean" in edits else "empty=zero" if mask == "data" else ""
    return "; ".join(filter(None, ["scale=0.088", score, keep, sink, dropout, empty]))


def captured(spec: Any, sizes: Mapping[str, int], dtype: torch.dtype) -> list[torch.Tensor]:
    """Tensors without memory for what a spec captures, each index as long as it may be."""

    kinds = {"bool": torch.bool, "int": torch.int64, "float": dtype}
    found = {}
    for load in (x for formula in spec.formulas() for x in E.loads(formula)):
        name, *indices = E.operands(load)
        shape = [sizes.get(str(i), 4096) for i in indices]
        found[name.name] = torch.empty(shape, dtype=kinds[E.kind(load)], device="meta")
    return [found[name] for name in spec.captures()]


def launches(pass_: str, config: Any, dtype: torch.dtype, D: int, D_v: int, spec: str = SPEC, **sizes) -> list[Launch]:
    """What a pass (fwd, dq, dkdv, decode) launches; sizes: B H H_kv S_q S_kv."""
    from ..kernels import flash
    from ..kernels.problem import Given, Problem

    n = {"B": 2, "H": 16, "H_kv": 4, "S_q": 1 if pass_ == "decode" else 4096, "S_kv": 4096} | sizes

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k = empty(n["B"], n["H"], n["S_q"], D), empty(n["B"], n["H_kv"], n["S_kv"], D)
    v, dout = empty(n["B"], n["H_kv"], n["S_kv"], D_v), empty(n["B"], n["H"], n["S_q"], D_v)
    seed = empty(1, dtype=torch.int64) if "dropout" in spec else None
    parsed = AttentionSpec.parse(spec)
    lengths = {"b": n["B"], "h": n["H"], "q": n["S_q"], "kv": n["S_kv"]}
    captures = captured(parsed, lengths, dtype)
    p = Problem.of(q, k, v, captures, [], spec, seed)
    trained = tuple(name for name, x in p.scope.captures.items() if x.is_floating_point())
    found: list[Launch] = []
    with mock.patch.object(flash, "launch", lambda *a: found.append(Launch(*a))):
        if pass_ in ("fwd", "decode"):
            flash.forward(p, config)
        else:
            lse = empty(n["B"], n["H"], n["S_q"], dtype=torch.float32)
            flash.backward(p, Given(dout, dout, lse, lse), trained, config, config)
            found = [x for x in found if x.kernel.__name__ == f"attention_{pass_}"]
    return found


SWIGLU = "act = g*sigmoid(g)*u; layout=chunk"


def expert_launches(
    config: Any,
    dtype: torch.dtype,
    spec: str = SWIGLU,
    backward: bool = False,
    transposed: bool = True,
    listed: bool = False,
    **sizes,
) -> dict[str, list[Launch]]:
    """What tv.moe launches, by kernel; config: pass -> its Config; transposed: weights lie in memory as [E,N,K];
    listed: experts are tensors of their own.

    sizes: T K E H F H_out.
    """
    from ..kernels import moe_triton
    from ..kernels.experts import Experts, Wanted
    from ..moe_spec import MoESpec

    n = {"T": 4096, "K": 6, "E": 64, "H": 2048, "F": 1408, "H_out": 2048} | sizes

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def weights(a: int, b: int) -> list[torch.Tensor]:
        each = [n["E"], a, b][listed:]
        count = n["E"] if listed else 1
        return [empty(*each[:-2], b, a).mT if transposed else empty(*each) for _ in range(count)]

    parsed = MoESpec.parse(spec)
    two = parsed.layout == "separate"
    ups = weights(n["H"], n["F"]) * 2 if two else weights(n["H"], parsed.parts * n["F"])
    ids, w = empty(n["T"], n["K"], dtype=torch.int64), empty(n["T"], n["K"], dtype=torch.float32)
    p = Experts(parsed, empty(n["T"], n["H"]), ids, w, ups, weights(n["F"], n["H_out"]), [], [])
    found: dict[str, list[Launch]] = {}

    def record(*a) -> None:
        found.setdefault(a[0].__name__, []).append(Launch(*a))

    with mock.patch.object(moe_triton, "launch", record):
        _, hidden = moe_triton.forward(p, True, config)
        if backward:
            found.clear()
            moe_triton.backward(p, empty(n["T"], n["H_out"]), hidden, Wanted(), config)
    return found


REGISTERS = 65536  # of a multiprocessor of NVIDIA, at most 255 for a thread (CUDA C++ programming guide)


def compile_launch(launch: Launch, arch: str, all_registers: bool = False) -> Any:
    """Triton's compiled kernel, specialised as it would be for these arguments.

    all_registers: ptxas is told to take as many as there are for one program, rather than to spill so that more fit
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..kernels import blocks
    from ..kernels.launch import entry_of

    constants_ = dict(launch.constants)
    if "SAME" in constants_:
        constants_["SAME"] = blocks.same_in_warp if arch.startswith("sm") else blocks.same_in_wave
    entry, flat = entry_of(launch.kernel, launch.args, constants_)
    types: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    aligned: dict[tuple[int, ...], Any] = {}
    for i, (name, x) in enumerate(zip(entry.arg_names, flat, strict=True)):
        if isinstance(x, torch.Tensor):
            types[name] = TYPES[x.dtype]
        elif isinstance(x, int) and x == 1:
            types[name], constants[(i,)] = "constexpr", 1
        else:
            types[name] = "fp32" if isinstance(x, float) else "i32" if x < 1 << 31 else "i64"
        if isinstance(x, torch.Tensor) or isinstance(x, int) and x != 1 and x % 16 == 0:
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=entry, signature=types, constexprs=constants, attrs=aligned)
    nvidia = arch.startswith("sm")
    target = GPUTarget("cuda", int(arch[2:]), 32) if nvidia else GPUTarget("hip", arch, 64)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if all_registers and nvidia:
        options["maxnreg"] = min(255, REGISTERS // (32 * launch.num_warps))
    return triton.compile(source, target=target, options=options)
