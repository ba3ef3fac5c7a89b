"""A config is used on a GPU only after it computed the right thing there once.

No GPU was at hand when the kernels were written. So the first use of a (pass, config, dtype, width) on a device runs it
on small random inputs against the formula in float64. The verdict is kept in a file, by device, driver, versions and
the kernels' source; a failure is warned of once and the next config takes its place. `tv.selfcheck=off` skips it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..options import cache_folder
from ..tuning import Choice, moe
from ..tuning.attention import Config
from ..tuning.kept import Kept
from .problem import Given, Problem

SPEC = "scale=0.125; keep = kv <= q & q - kv < 200; empty=zero"
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 3e-3}  # of the largest; float32 may be tf32
enabled: contextvars.ContextVar[bool] = contextvars.ContextVar("tv.selfcheck", default=True)


@contextlib.contextmanager
def only_if(wanted: bool) -> Iterator[None]:
    """Checks configs in this context, or trusts them."""
    token = enabled.set(wanted)
    try:
        yield
    finally:
        enabled.reset(token)


def working(choices: tuple[Choice, ...], pass_: str, dtype: torch.dtype, widths: tuple[int, int]) -> tuple[Choice, ...]:
    """The choices that compute the right thing on the current GPU: all of them where nothing is to be checked."""
    if not enabled.get() or not torch.cuda.is_available():
        return choices
    for i, choice in enumerate(choices):
        if _verdict(dataclasses.replace(choice.config, splits=1), pass_, dtype, widths):
            return choices[i:]
    return ()


@functools.lru_cache(maxsize=1024)
def _verdict(config: Config, pass_: str, dtype: torch.dtype, widths: tuple[int, int]) -> bool:
    key = f"{pass_} {dtype} {widths} {config}"
    return _kept(key, lambda: check(config, pass_, dtype, widths, torch.device("cuda")))


@functools.lru_cache(maxsize=1024)
def experts_right(configs: tuple[moe.Config, ...], layout: str, listed: bool, dtype: torch.dtype) -> bool:
    """Do the kernels of tv::moe compute the right thing here with these configs, one for each of moe.PASSES?"""
    if not enabled.get() or not torch.cuda.is_available():
        return True
    key = f"moe {layout} {'listed' if listed else 'stacked'} {dtype} {configs}"
    return _kept(key, lambda: check_experts(configs, layout, listed, dtype, torch.device("cuda")))


def _kept(key: str, run: Callable[[], str]) -> bool:
    """Whether a check found nothing wrong: what the file says, or what it says from now on."""
    file = Kept(cache_folder() / f"selfcheck-{_machine()}.json")
    reason = file.rows().get(key)
    if reason is None:
        reason = run()
        if reason:
            warnings.warn(
                f"tvcompile: the kernel `{key}` failed its check on this GPU ({reason}) and is not "
                f"used. Please report it with the output of `python -m torch.utils.collect_env`; {file.path} keeps the "
                "verdict, tv.selfcheck=off skips the check.",
                stacklevel=2,
            )
        file.update({key: reason})
    return not reason


@functools.lru_cache(maxsize=1)
def _machine() -> str:
    """A hash of the GPU, its driver, the versions and the source of the kernels."""
    import triton

    here = Path(__file__).parent
    source = b"".join(f.read_bytes() for f in sorted([*here.glob("*.py"), here.parent / "bounds.py"]))
    driver = Path("/proc/driver/nvidia/version")
    driver_text = driver.read_text() if driver.exists() else str(torch.version.hip or torch.version.cuda)
    about = (torch.cuda.get_device_name(), driver_text, torch.__version__, triton.__version__)
    return hashlib.sha256(repr(about).encode() + source).hexdigest()[:16]


def check(config: Config, pass_: str, dtype: torch.dtype, widths: tuple[int, int], device: torch.device) -> str:
    """ "" if a config computes the right thing on the device, else what is wrong."""
    from . import flash
    from .attention import attention_ref

    # Whatever the program is in the middle of: tracing, inference mode, no_grad.
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        q, k, v, direction = _inputs(pass_, dtype, widths, device)
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        out, lse = attention_ref(wide[0], wide[1], wide[2], spec=SPEC)
        p = Problem.of(q, k, v, [], [], SPEC, None)
        try:
            with torch.no_grad():
                if pass_ in ("fwd", "decode"):
                    configs = [config] + [dataclasses.replace(config, splits=3)] * config.packed
                    pairs = [(x, y) for c in configs for x, y in zip(flash.forward(p, c), (out, lse))]
                else:
                    given = Given(direction, out.detach().to(dtype), lse.detach().float())
                    found = flash.backward(p, given, (), config, config)
                    exact = torch.autograd.grad(out, wide, direction.double())
                    ours = {"dq": [(found.dq, exact[0])], "dkdv": [(found.dk, exact[1]), (found.dv, exact[2])]}
                    pairs = ours[pass_]
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]
        worst = max(_error(x, y.detach()) for x, y in pairs)
    return "" if worst <= TOLERANCE[dtype] else f"relative error {worst:.1e}, {TOLERANCE[dtype]:.0e} allowed"


def check_experts(
    configs: tuple[moe.Config, ...], layout: str, listed: bool, dtype: torch.dtype, device: torch.device, T: int = 300
) -> str:
    """ "" if forward and backward of a small mixture are right on the device, else what is wrong."""
    from . import moe_triton
    from .experts import Experts, Wanted, moe_ref

    K, E, H, F = 2, 3, 96, 80
    spec = "act = u*sigmoid(u)" if layout == "plain" else f"act = g*sigmoid(g)*u; layout={layout}"
    generator = torch.Generator(device).manual_seed(0)

    def make(*shape: int) -> Tensor:
        x = torch.randn(shape, device=device, generator=generator) / shape[-1] ** 0.5
        return x.to(dtype).double().requires_grad_()

    def weights(out: int, inner: int) -> list[Tensor]:
        return [make(out, inner) for _ in range(E)] if listed else [make(E, out, inner)]

    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        x, w, sets = make(T, H), make(T, K), 2 if layout == "separate" else 1
        wide = F if layout in ("plain", "separate") else 2 * F
        up, down = [t for _ in range(sets) for t in weights(wide, H)], weights(H, F)
        ids = torch.randint(-1, E, (T, K), device=device, generator=generator)
        exact = moe_ref(x, ids, w, [t.mT for t in up], [t.mT for t in down], spec=spec)
        direction = make(T, H).detach()
        grads = torch.autograd.grad(exact, [x, w, *up, *down], direction)
        with torch.no_grad():
            low_up, low_down = ([t.to(dtype).mT for t in ts] for ts in (up, down))
            p = Experts.of(x.to(dtype), ids, w.to(dtype), low_up, low_down, [], [], spec)
            by_pass = dict(zip(moe.PASSES, configs)).__getitem__
            try:
                out, hidden = moe_triton.forward(p, True, by_pass)
                g = moe_triton.backward(p, direction.to(dtype), hidden, Wanted(), by_pass)
            except Exception as error:
                return f"{type(error).__name__}: {error}"[:300]
            found = [out, g.x, g.weights, *(t.mT for t in (*g.up, *g.down))]
            worst = max(_error(a, b.detach()) for a, b in zip(found, [exact, *grads], strict=True))
    return "" if worst <= TOLERANCE[dtype] else f"relative error {worst:.1e}, {TOLERANCE[dtype]:.0e} allowed"


def _inputs(pass_: str, dtype: torch.dtype, widths: tuple[int, int], device: torch.device) -> list[Tensor]:
    D, D_v = widths
    S_q, S_kv, H, H_kv = (3, 333, 8, 2) if pass_ == "decode" else (333, 333, 4, 2)
    shapes = (1, H, S_q, D), (1, H_kv, S_kv, D), (1, H_kv, S_kv, D_v), (1, H, S_q, D_v)
    # A generator of its own: the program's random numbers stay as they are.
    generator = torch.Generator(device).manual_seed(0)
    return [torch.randn(shape, device=device, generator=generator).to(dtype) for shape in shapes]


def _error(found: Tensor, exact: Tensor) -> float:
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    return float((found.double() - exact).abs().max() / exact.abs().max())
