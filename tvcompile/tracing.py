"""What Dynamo does while it traces for this backend: shapes that depend on data stay in one graph.

Where it cannot go on with such a shape, it traces the frame as it would for any other backend: the graph breaks there.
The private parts of Dynamo that this takes are all here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import fx
from torch._dynamo import config, convert_frame
from torch._dynamo.exc import BackendCompilerFailed, UserError, unimplemented
from torch._dynamo.repro.after_dynamo import WrapBackendDebug
from torch._dynamo.variables import TensorVariable
from torch._functorch import config as functorch_config
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, free_unbacked_symbols


@contextlib.contextmanager
def tracing_context() -> Iterator[None]:
    """Data-dependent shapes stay in one graph while Dynamo traces for this backend."""
    with (
        config.patch(capture_dynamic_output_shape_ops=True),
        mock.patch.object(TensorVariable, "call_method", _call_method),
        mock.patch.object(convert_frame, "_compile", _compile),
    ):
        yield


_traced_call = TensorVariable.call_method
_compile_once = convert_frame._compile


def _call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
    """A list of unknown length ends the graph, as it does without data-dependent shapes, instead of the program."""
    held = self.as_proxy().node.meta.get("example_value") if name == "tolist" else None
    if isinstance(held, torch.Tensor) and any(free_unbacked_symbols(n) for n in held.shape):
        unimplemented(
            gb_type="tolist() of a tensor whose length depends on data",
            context=f"call_method {self} tolist",
            explanation="A list needs a length that is known while the program is traced.",
            hints=["Keep the numbers in a tensor."],
        )
    return _traced_call(self, tx, name, args, kwargs)


def _compile(*args: Any, **kwargs: Any) -> Any:
    """Dynamo's compilation of a frame; once more without data-dependent shapes where these were its undoing."""
    try:
        return _compile_once(*args, **kwargs)
    except (UserError, GuardOnDataDependentSymNode, BackendCompilerFailed) as error:
        if not (config.capture_dynamic_output_shape_ops and _of_shapes(error)):
            raise
        with config.patch(capture_dynamic_output_shape_ops=False):
            return _compile_once(*args, **kwargs)


def _of_shapes(error: BaseException) -> bool:
    """Did a decision about a size fail that only the data tells?"""
    causes = error, error.__cause__, getattr(error, "inner_exception", None)
    return any(isinstance(e, (GuardOnDataDependentSymNode, SizesFromData)) for e in causes)


class SizesFromData(RuntimeError):
    """Inductor could not compile a graph with sizes that only the data tells."""


def has_sizes_from_data(gm: fx.GraphModule) -> bool:
    """Has a tensor of Dynamo's graph a size that only the data tells?"""
    held = (node.meta.get("example_value") for node in gm.graph.nodes)
    return any(free_unbacked_symbols(n) for t in held if isinstance(t, torch.Tensor) for n in t.shape)


def backward_at_once(gm: fx.GraphModule) -> contextlib.AbstractContextManager:
    """With sizes from data, that the backward pass cannot be compiled must show before the forward pass is run."""
    name = "force_non_lazy_backward_lowering"
    return functorch_config.patch({name: has_sizes_from_data(gm) or getattr(functorch_config, name)})


def _context_of(wrapper: Any) -> Callable:
    """The context of the innermost backend; Dynamo itself looks only at the outermost wrapper."""
    inner = wrapper._torchdynamo_orig_backend
    return getattr(getattr(inner, "compiler_fn", inner), "backend_ctx_ctor", contextlib.nullcontext)


WrapBackendDebug.backend_ctx_ctor = property(_context_of)  # type: ignore[attr-defined]
