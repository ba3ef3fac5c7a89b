"""One way to launch a Triton kernel: from eager code, in the interpreter, and traced into a graph.

    launch(kernel, (n,), (q, (strides), 0.125), {"D": 128, "KEEP": formula}, num_warps=8)

Kernels take tuples of tensors and numbers, and other jit functions as constants; a graph holds neither. So a launch
goes through an entry, written for the structure of the arguments and the constants:

    def attention_fwd_1f3a(q_ptr, strides_0, strides_1, scale):
        attention_fwd(q_ptr, (strides_0, strides_1,), scale, D=128, KEEP=keep_9c41)

Triton inlines it, and Inductor, which copies a kernel with every jit function it names, launches it like its own.
"""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.library import wrap_triton


def launch(
    kernel: Any, grid: tuple, args: Sequence, constants: Mapping[str, Any], num_warps: int, num_stages: int
) -> None:
    """Runs `kernel` over the grid, or writes that into the graph that is being traced."""
    entry, flat = entry_of(kernel, args, constants)
    if any(map(is_traced, flat)):
        wrap_triton(_configured(entry, num_warps, num_stages))[grid](*flat)
    else:
        # Descriptors are made in memory that Triton asks for; Inductor sets this for its launches.
        triton.set_allocator(_scratch)
        entry[grid](*flat, num_warps=num_warps, num_stages=num_stages)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def entry_of(kernel: Any, args: Sequence, constants: Mapping[str, Any]) -> tuple[Any, list[Any]]:
    """(the entry of a launch, its arguments)"""
    flat: list[Any] = []
    structure = tuple(_structure(a, flat) for a in args)
    return _entry(kernel, structure, tuple(sorted(constants.items()))), flat


def _structure(x: Any, flat: list[Any]) -> Any:
    """The shape of nested tuples; their leaves go to `flat`, except None."""
    if isinstance(x, tuple):
        return tuple(_structure(y, flat) for y in x)
    if x is not None:
        flat.append(x)
    return x is not None


@functools.lru_cache(maxsize=1024)
def _configured(entry: Any, num_warps: int, num_stages: int) -> Any:
    # One object per config: a graph stores a kernel once.
    return triton.autotune([triton.Config({}, num_warps=num_warps, num_stages=num_stages)], key=[])(entry)


@functools.lru_cache(maxsize=1024)
def _entry(kernel: Any, structure: tuple, constants: tuple[tuple[str, Any], ...]) -> Any:
    scope: dict[str, Any] = {kernel.__name__: kernel}
    parameters: list[str] = []
    names = [p for p in kernel.arg_names if p not in dict(constants)]
    values = [_argument(name, s, parameters) for name, s in zip(names, structure, strict=True)]
    for name, value in constants:
        if hasattr(value, "__name__"):
            scope[value.__name__] = value
        values.append(f"{name}={getattr(value, '__name__', None) or repr(value)}")
    body = f"{kernel.__name__}({', '.join(values)})"
    return define(kernel.__name__, parameters, [body], scope)


def _argument(name: str, structure: Any, parameters: list[str]) -> str:
    if isinstance(structure, tuple):
        parts = [_argument(f"{name}_{i}", s, parameters) + ", " for i, s in enumerate(structure)]
        return f"({''.join(parts).rstrip()})"
    if structure:
        parameters.append(name)
    return name if structure else "None"


def define(name: str, parameters: Sequence[str], lines: Sequence[str], scope: Mapping[str, Any]) -> Any:
    """A jit function of its own name; Triton reads its text back, so that has to be where inspect looks."""
    text = "\n    ".join([f"({', '.join(parameters)}):", *lines]) + "\n"
    name = f"{name}_{hashlib.sha256((text + repr(sorted(scope))).encode()).hexdigest()[:12]}"
    text, file = f"def {name}{text}", f"<tvcompile {name}>"
    linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
    held = {"__name__": __name__, "tl": tl, **scope}
    exec(compile(text, file, "exec"), held)
    return triton.jit(held[name])


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 exactly, unless the program lets PyTorch round it to tf32."""
    precise = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    return "ieee" if precise or torch.version.hip else "tf32"


def is_traced(x: object) -> bool:
    return isinstance(x, (FakeTensor, FunctionalTensor))
