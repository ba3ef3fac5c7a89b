"""What benchmarks.attention needs for a GPU: the sizes, the peers, the clocks, the machine.

Written without a GPU at hand: the peers and the report are tested on a CPU, the clock and the sizes are not.
"""

from __future__ import annotations

import functools
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

import tvcompile

if TYPE_CHECKING:
    from .attention import Job

Mod = Callable[..., Tensor] | None

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
WARNED = {"flash": "flash", "cudnn": "cudnn", "efficient": "memory"}  # how SDPA's warnings begin
TOKENS, WIDTH = 16384, 2048  # B S and H D of every size but decoding's
ROUNDS, MOST_ROUNDS, SECONDS = 7, 30, 1.0
EMPTY = "rows that see nothing are zero, in the program a mean"
LEAD = 2.0  # milliseconds that the GPU is kept busy while a call is launched


# Sizes


def plan() -> Iterator[tuple[str, tuple[int, int, int, int, int, int], str]]:
    """(case, (B, H, H_kv, S_q, S_kv, D), pass): what says most first, since time may run out."""
    masked = ("window", "documents", "softcap")
    squares = [("causal", 4096, 128, 1), ("causal", 4096, 128, 4), *((case, 4096, 128, 1) for case in masked)]
    yield from both(squares)
    yield decode(8, 16384, 128)
    yield from both([("causal", 16384, 128, 1), ("causal", 1024, 128, 1), ("causal", 4096, 64, 1)])
    yield from both((case, 16384, 128, 1) for case in masked)
    yield decode(2, 65536, 128)
    yield from both([("causal", 2048, 128, 1), ("causal", 8192, 128, 1), ("causal", 16384, 64, 1)])
    yield decode(16, 16384, 64)
    yield from both((case, 4096, 64, 1) for case in masked)
    yield from both([("causal", 16384, 128, 4), ("causal", 1024, 64, 1)])


def both(squares: Any) -> Iterator[tuple[str, tuple[int, int, int, int, int, int], str]]:
    for case, S, D, group in squares:
        H = WIDTH // D
        for kind in ("fwd", "bwd"):
            yield case, (TOKENS // S, H, H // group, S, S, D), kind


def decode(B: int, S: int, D: int) -> tuple[str, tuple[int, int, int, int, int, int], str]:
    """One new token; K and V are larger than any cache."""
    return "decode", (B, 32, 8, 1, S, D), "fwd"


# Peers: a callable of (q, k, v, extra), or the reason why there is none. Masks are made once and not timed.


def sdpa(name: str, job: Job, keep: Mod, edit: Mod) -> Callable[..., Tensor] | str:
    """F.scaled_dot_product_attention on one of its backends."""
    B, H, H_kv, S_q, S, _ = job.sizes
    if job.case in ("softcap", "sink"):
        return "SDPA has no " + job.case
    if job.case == "left padding" and B > 1:
        return EMPTY
    extra: dict[str, Any] = {"enable_gqa": True} if H != H_kv else {}
    if job.case == "causal":
        extra["is_causal"] = True
    elif keep is not None:
        b, h, q, kv = (torch.arange(n, device=job.device) for n in (B, H, S_q, S))
        at = b[:, None, None, None], h[:, None, None], q[:, None], kv
        mask = keep(*at)
        if edit is not None:
            bias = edit(torch.zeros((), device=job.device), *at)
            mask = bias.masked_fill(~mask, -torch.inf).to(job.dtype)
        extra["attn_mask"] = mask.expand(B, H, S_q, S)

    def attention(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return F.scaled_dot_product_attention(q, k, v, **extra)

    return attention


def flex(job: Job, keep: Mod, edit: Mod, extra: Tensor) -> Callable[..., Tensor] | str:
    """FlexAttention, compiled, at the configs that it chooses by itself."""
    B, H, H_kv, S_q, S, _ = job.sizes
    if job.case == "left padding" and B > 1:
        return EMPTY
    by_batch = B if job.case in ("documents", "left padding") else None
    mask = create_block_mask(keep, by_batch, None, S_q, S, device=job.device) if keep else None
    call = functools.partial(torch.compile(flex_attention), score_mod=edit, block_mask=mask, enable_gqa=H != H_kv)

    def attention(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        return call(q, k, v)

    def with_sink(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> Tensor:
        out, more = call(q, k, v, return_aux=AuxRequest(lse=True))
        return out * torch.sigmoid(more.lse - extra[0, :, None])[..., None].to(out.dtype)

    return with_sink if job.case == "sink" else attention


def reason(problem: Exception, name: str = "", said: Sequence[str] = ()) -> str:
    """Why a call failed, in a line; `said`: warnings, in which SDPA tells of each backend why it does not serve."""
    text = str(problem)
    if isinstance(problem, torch.OutOfMemoryError) or re.search("out of memory|can't allocate memory", text):
        return "out of memory"
    if re.search("No (available kernel|viable backend)", text):
        why: dict[str, list[str]] = {}
        for line in (re.sub(r"\s*\(Triggered internally.*", "", s, flags=re.DOTALL) for s in said):
            if head := re.match("(.*) kernel not used because", line):
                found = why.setdefault(head[1].split()[0].lower(), [])
            elif why:
                found.append(line)
        return "; ".join(why.get(WARNED.get(name, ""), ())) or "no kernel of this backend serves"
    lines = [line for line in text.splitlines() if line.strip()]
    return f"{type(problem).__name__}: {lines[0] if lines else ''}"[:200]


# Clocks


def race(steps: dict[str, Any], device: str) -> dict[str, tuple[float, float]]:
    """Medians of interleaved rounds: milliseconds, and those of the host until the call returned."""
    clock = gpu_clock if device == "cuda" else host_clock
    for step in list(steps.values()) * (3 if device == "cuda" else 0):
        step.timed(step.first())
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    begin = time.perf_counter()
    for n in range(MOST_ROUNDS):
        if n >= ROUNDS and time.perf_counter() - begin > SECONDS:
            break
        for name, step in steps.items():
            times[name].append(clock(functools.partial(step.timed, step.first())))
    return {name: tuple(map(statistics.median, zip(*t))) for name, t in times.items()}


def host_clock(call: Callable[[], Any]) -> tuple[float, float]:
    start = time.perf_counter()
    call()
    ms = 1e3 * (time.perf_counter() - start)
    return ms, ms


def gpu_clock(call: Callable[[], Any]) -> tuple[float, float]:
    """(milliseconds on the GPU, milliseconds of the host until the call returned).

    The call is launched while the GPU is busy with something else, so that short kernels do not wait for Python. Where
    the host takes longer than LEAD, or waits for the GPU, what it takes beyond that counts too.
    """
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(lead())
    start.record()
    begin = time.perf_counter()
    call()
    host = 1e3 * (time.perf_counter() - begin)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop), host


@functools.cache
def lead() -> int:
    """How long LEAD is for torch.cuda._sleep, whose unit differs between GPUs."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):
        start.record()
        torch.cuda._sleep(1_000_000)
        stop.record()
        stop.synchronize()
    return int(1_000_000 * LEAD / start.elapsed_time(stop))


# The device


class Lost(Exception):
    """A kernel failed such that this process cannot use the GPU any more."""


def recover(device: str, cause: str) -> None:
    """Frees what a call that failed had; raises Lost where the device does not answer."""
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as problem:
            raise Lost(f"{cause}; the GPU does not answer after it") from problem


def machine(device: str) -> dict[str, Any]:
    """What a figure depends on."""
    found: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tvcompile": tvcompile.__version__,
    }
    if find_spec("triton"):
        found["triton"] = import_module("triton").__version__
    if device == "cpu":
        return found
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        **found,
        "gpu": p.name,
        "capability": p.gcnArchName if torch.version.hip else f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "memory_gib": round(p.total_memory / 2**30, 1),
        "driver": driver(),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
    }


def driver() -> str:
    """The version of NVIDIA's driver; PyTorch does not tell it."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        file = Path("/proc/driver/nvidia/version")
        found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text()) if file.exists() else None
        return found[0] if found else "unknown"
