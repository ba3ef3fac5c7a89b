"""Compiling for a CUDA device that is not there: Dynamo, a rewriting step, AOTAutograd, and Inductor's source.

    capture(model, inputs, train=True, arch="sm80")      [Captured("forward", graph), Captured("backward", graph)]
    inductor_source(fn, inputs, arch="sm120")            what Inductor would import, as text
    packaged_source(fn, inputs)                          what AOTInductor would run to compile the launches, as text
    with fake_cuda("sm90") as mode: ...                  fake CUDA tensors; the machine seems to have an H100

Models and inputs are built on the CPU; nothing is computed. Use a process of its own: under TRITON_INTERPRET=1, which
conftest sets, triton.jit gives nothing that PyTorch takes into a graph, and Inductor keeps the patterns that it traced
for the device it found first.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import fx, nn
from torch._dynamo import device_interface
from torch._export import non_strict_utils
from torch._functorch import aot_autograd, config as functorch_config, partitioners
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._inductor import codecache, config, decomposition, graph, utils
from torch._inductor.codegen import wrapper
from torch._inductor.runtime.hints import DeviceProperties
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree, _triton

from tvcompile import exported
from tvcompile.backend import hand_off, placeholders_of, rewrite
from tvcompile.kernels import selfcheck
from tvcompile.report import GraphRecord
from tvcompile.tracing import tracing_context

DEVICES = {  # name, multiprocessors, KiB of shared memory a block can have, threads per multiprocessor
    "sm80": ("NVIDIA A100-SXM4-80GB", 108, 163, 2048),
    "sm86": ("NVIDIA GeForce RTX 3090", 82, 99, 1536),
    "sm89": ("NVIDIA GeForce RTX 4090", 128, 99, 1536),
    "sm90": ("NVIDIA H100 80GB HBM3", 132, 227, 2048),
    "sm100": ("NVIDIA B200", 148, 227, 2048),
    "sm120": ("NVIDIA GeForce RTX 5090", 170, 99, 1536),
}


class Captured(NamedTuple):
    kind: str  # forward | backward | inference
    graph: fx.GraphModule
    kernels: list[Any]  # of the graph's Triton launches, in order; Dynamo forgets them with its next reset


def tv(gm: fx.GraphModule, record: GraphRecord | None = None) -> fx.GraphModule:
    """The rewriting step of the tv backend; what it found and refused is in `record`."""
    return rewrite(gm, placeholders_of(gm), record or GraphRecord())


def capture(program: Callable, inputs: dict | tuple, step: Callable = tv, **how: Any) -> list[Captured]:
    """The graphs that AOTAutograd makes of step(Dynamo's graph), in order of compilation. `how`: as in _run."""
    found: list[Captured] = []

    def keep(kind):
        return lambda gm, _: found.append(Captured(kind, gm, kernels_of(gm))) or gm.forward

    aot = functools.partial(
        aot_autograd.aot_module_simplified,
        fw_compiler=keep("forward"),
        bw_compiler=keep("backward"),
        inference_compiler=keep("inference"),
        decompositions=decomposition.select_decomp_table(),
        partition_fn=partitioners.min_cut_rematerialization_partition,
        keep_inference_input_mutations=True,
    )
    _run(program, inputs, lambda gm, example_inputs: aot(step(gm), example_inputs), **how)
    return found


def launches_of(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if "triton_kernel_wrapper" in str(node.target)]


def kernels_of(gm: fx.GraphModule) -> list[Any]:
    return [kernel_side_table.get_kernel(node.kwargs["kernel_idx"]) for node in launches_of(gm)]


def inductor_source(program: Callable, inputs: dict | tuple, step: Callable = tv, **how: Any) -> str:
    """The modules that Inductor would import for step(Dynamo's graph), one after the other. `how`: as in _run.

    Padding, which it measures, and constant folding, which it computes, are off: they need the device.
    """
    sources: list[str] = []
    module = SimpleNamespace(call=mock.Mock(side_effect=_Ready), __file__="not imported")
    with (
        mock.patch.object(graph.GraphLowering, "save_output_code", sources.append),
        mock.patch.object(codecache.PyCodeCache, "load_by_key_path", lambda *_, **__: module),
        config.patch(fx_graph_cache=False, shape_padding=False, joint_graph_constant_folding=False),
        contextlib.suppress(_Ready),
    ):
        _run(program, inputs, lambda gm, example_inputs: hand_off(step(gm), example_inputs, None, {}), **how)
    return "\n".join(sources)


def packaged_source(model: nn.Module, inputs: tuple, arch: str = "sm90") -> str:
    """What exported.package would run on the device: the kernels and a launch of each, in the order of the program."""

    sources: list[str] = []

    def stop(wrapper):
        sources.append(wrapper.kernel_autotune_defs.getvalue() + wrapper.kernel_autotune_calls.getvalue())
        raise _Ready

    off = config.patch(fx_graph_cache=False, shape_padding=False, joint_graph_constant_folding=False)
    with fake_cuda(arch) as mode, torch.no_grad(), off:
        mode.shape_env.tracked_fakes = []
        model, inputs = _on_device(model, inputs, mode)
        with mock.patch.object(non_strict_utils, "FakeTensorMode", lambda **_: mode):
            program = torch.export.export(model, inputs, strict=False)
        stopped = mock.patch.object(wrapper.PythonWrapperCodegen, "generate_and_run_autotune_block", stop)
        with unset_fake_temporarily(), stopped:
            try:
                exported.package(program, "never.pt2", {"tv.strict": True, "tv.selfcheck": "off"})
            except Exception:  # Inductor's, about _Ready
                if not sources:
                    raise
    return "\n".join(sources)


class _Ready(Exception):
    """All is compiled, and the first kernel would run."""


def _run(program, inputs, backend, train: bool = False, arch: str = "sm90", dynamic: bool | None = None) -> None:
    """Compiles a copy of the program with fake CUDA parameters and inputs."""
    if train and (reason := training_works()):
        raise RuntimeError(reason)
    backend.backend_ctx_ctor = tracing_context  # type: ignore[attr-defined]
    torch._dynamo.reset()
    with fake_cuda(arch) as mode, torch.set_grad_enabled(train), selfcheck.only_if(False):
        program, inputs = _on_device(program, inputs, mode)
        program = program.train(train) if isinstance(program, nn.Module) else program
        with functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False):
            compiled = torch.compile(program, backend=backend, dynamic=dynamic)
            compiled(**inputs) if isinstance(inputs, dict) else compiled(*inputs)
    torch._dynamo.reset()


def _on_device(program: Any, inputs: Any, mode: FakeTensorMode) -> tuple[Any, Any]:
    """A copy of the program, with fake parameters, and fake inputs."""
    memo: dict[int, torch.Tensor] = {}  # by identity: what is tied stays tied
    with unset_fake_temporarily():
        program = copy.deepcopy(program) if isinstance(program, nn.Module) else program
    for module in program.modules() if isinstance(program, nn.Module) else ():
        for tensors in (module._parameters, module._buffers):
            tensors.update({n: _moved(x, mode, memo) for n, x in tensors.items() if x is not None})
    return program, pytree.tree_map_only(torch.Tensor, lambda x: _moved(x, mode, memo), inputs)


def _moved(x: torch.Tensor, mode: FakeTensorMode, memo: dict[int, torch.Tensor]) -> torch.Tensor:
    if id(x) not in memo:
        with torch.no_grad():
            y = mode.from_tensor(x, static_shapes=True).to("cuda")
        y = nn.Parameter(y) if isinstance(x, nn.Parameter) else y
        memo[id(x)] = y.requires_grad_(x.requires_grad)
    return memo[id(x)]


@contextlib.contextmanager
def fake_cuda(arch: str = "sm90") -> Iterator[FakeTensorMode]:
    """A fake mode, entered, on a machine that seems to have one GPU of that architecture. Does not nest."""
    torch.compile(torch.neg, backend="eager")(torch.ones(1))  # Dynamo lists torch's functions once: not ours
    with contextlib.ExitStack() as stack:
        for target, answers in _answers(arch):
            stack.enter_context(mock.patch.multiple(target, create=True, **answers))
        _forget()
        stack.callback(_forget)
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # no thread serves the device
        if guard := _guard()[0]:
            guard.install()
            stack.callback(guard.restore)
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()))


def _answers(arch: str) -> list[tuple[Any, dict[str, Any]]]:
    """What is replaced: the lowest layer that would ask the driver, so that what is above it stays PyTorch's own."""
    name, processors, shared, threads = DEVICES[arch]
    gpu = SimpleNamespace(name=name, major=int(arch[2:-1]), minor=int(arch[-1]), multi_processor_count=processors)
    gpu.shared_memory_per_block, gpu.shared_memory_per_block_optin = 48 << 10, shared << 10
    gpu.shared_memory_per_multiprocessor, gpu.regs_per_multiprocessor = (shared + 1) << 10, 1 << 16
    gpu.max_threads_per_multi_processor, gpu.max_threads_per_block, gpu.warp_size = threads, 1024, 32
    gpu.total_memory, gpu.L2_cache_size, gpu.gcnArchName = 16 << 30, 32 << 20, ""
    zero, state = (lambda *_, **__: 0), torch.zeros(16, dtype=torch.uint8)
    cuda = dict.fromkeys(("_lazy_init", "_exchange_device", "_maybe_exchange_device"), zero)
    cuda |= dict.fromkeys(("set_rng_state", "is_current_stream_capturing"), zero)
    cuda |= {
        "_get_device_properties": lambda _: gpu,
        "_cached_device_count": 1,
        "get_rng_state": lambda *_, **__: state,
    }
    low = dict.fromkeys(("_cuda_getDevice", "_cuda_setDevice", "_cuda_getCurrentRawStream"), zero)
    low |= {"_cuda_getDeviceCount": lambda: 1}
    low |= {"_ensureCUDADeviceGuardSet": zero} if _guard()[0] else {}  # its guard would take the place of ours
    found: list[tuple[Any, dict[str, Any]]] = [(torch.cuda, cuda), (torch._C, low)]
    # A GPU that is available would be used.
    found += [(FakeTensorMode, {"avoid_device_init": True}), (fake_tensor, {"init_gpu_context": zero})]
    found += [(proxy_tensor, {"CONSTANT_NUMEL_LIMIT": -1})]  # the value of torch.tensor(1) would be moved there
    if _triton.has_triton_package():
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime import driver

        active = object.__new__(CudaDriver)
        active.get_current_device = active.get_current_stream = zero
        active.get_device_capability = lambda device=None: (gpu.major, gpu.minor)
        active.utils = SimpleNamespace(get_device_properties=lambda _: {"max_shared_mem": shared << 10})
        found += [(driver, {"_active": active})]
    return found


def _forget() -> None:
    """Empties what remembers an answer about the device."""
    device_interface.caching_worker_device_properties.clear()
    for holder in (_triton, utils, DeviceProperties):
        for value in list(vars(holder).values()):
            getattr(getattr(value, "__func__", value), "cache_clear", lambda: None)()
    utils.clear_caches()


@functools.cache
def training_works() -> str:
    """Why the autograd engine stops here, or "" where it takes fake CUDA tensors."""
    if not (reason := _guard()[1]):
        with fake_cuda():
            x = torch.ones(2, device="cuda", requires_grad=True)
            try:
                torch.autograd.grad((x * x).sum(), x)
            except RuntimeError as error:
                reason = f"the autograd engine: {error}"
    return reason


@functools.cache
def _guard() -> tuple[ctypes.CDLL | None, str]:
    """(fake_cuda_guard.cpp, compiled once per PyTorch, or None; why not)."""
    source, root = Path(__file__).with_name("fake_cuda_guard.cpp"), Path(torch.__file__).parent
    key = hashlib.sha256(source.read_bytes() + f"{torch.__version__} {root}".encode()).hexdigest()[:16]
    built = Path(tempfile.gettempdir(), f"tvcompile_{os.getuid()}", f"guard_{key}.so")
    built.parent.mkdir(mode=0o700, exist_ok=True)
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
    part = built.with_suffix(f".{os.getpid()}")  # several workers may build at once
    try:
        if not built.exists():
            command = [os.environ.get("CXX", "g++"), str(source), *flags, "-o", str(part)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            part.replace(built)
        return ctypes.CDLL(str(built)), ""
    except (OSError, subprocess.CalledProcessError) as error:
        return None, f"{source.name} cannot be built: {error} {getattr(error, 'stderr', '')[-500:]}"
