"""Peak memory of attention, forward and backward, as the sequence doubles: eager, Inductor, tv.

    python -m benchmarks.memory [--seq 4096 8192 16384] [--heads 1] [--inference] [--dtype float32]

Each measurement has a process of its own: the highest resident size during a call after the one
that compiled, above the size just before it. Outputs and gradients count, inputs do not. An S×S
tensor makes the ratio per doubling 4, attention without one makes it 2.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

BACKENDS = ("eager", "inductor", "tv")
HEAD_DIM = 64
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def attention(q: Any, k: Any, v: Any) -> Any:
    """Causal attention as people write it."""
    import torch

    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
    causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v


def resident(peak: bool) -> int:
    """Bytes of this process in memory, now or at most since `forget_peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        field = "VmHWM:" if peak else "VmRSS:"
        return 1024 * int(status.read_text().split(field)[1].split()[0])
    scale = 1 if sys.platform == "darwin" else 1024
    return scale * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def forget_peak() -> bool:
    """Restarts the kernel's count of the peak; False where the system has no such thing."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes that a call needs at most, above what is resident before it."""
    gc.collect()
    forget_peak()
    before = resident(peak=False)
    call()
    return resident(peak=True) - before


def measure(backend: str, seq: int, options: argparse.Namespace) -> dict[str, Any]:
    """{"bytes": peak, "norms": of the output and gradients, "sites": fused count}."""
    import torch

    torch.manual_seed(0)
    shape = (1, options.heads, seq, HEAD_DIM)
    train, dtype = not options.inference, getattr(torch, options.dtype)
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_(train) for _ in range(3))
    direction = torch.randn(shape).to(dtype)
    compiled = attention if backend == "eager" else torch.compile(attention, backend=backend)
    norms: list[float] = []

    def step() -> None:
        with torch.set_grad_enabled(train):
            out = compiled(q, k, v)
        grads = torch.autograd.grad(out, (q, k, v), direction) if train else ()
        norms[:] = [float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) for t in (out, *grads)]

    sites = 0
    if backend == "tv":
        import tvcompile

        with tvcompile.collect() as report:
            step()
        sites = len(report.sites)
    else:
        step()
    # A second one, so that pages which the allocator keeps are there before the count begins.
    step()
    return {"bytes": peak_of(step), "norms": norms, "sites": sites}


def in_a_process(backend: str, seq: int, options: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a new process, in which freed tensors go back to the system at once."""
    command = [sys.executable, "-m", "benchmarks.memory", "--one", backend, "--seq", str(seq)]
    command += ["--heads", str(options.heads), "--dtype", options.dtype]
    command += ["--inference"] * options.inference
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    out = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    return json.loads(out.splitlines()[-1])


def table(options: argparse.Namespace) -> None:
    """Measures every length and backend; refuses to print where the results differ."""
    mode = "forward" if options.inference else "forward and backward"
    print(f"causal attention, {mode}, {options.dtype}, B=1 H={options.heads} D={HEAD_DIM}; peak MB")
    print("     S " + "".join(f"{backend:>18}" for backend in BACKENDS))
    last: dict[str, int] = {}
    for seq in options.seq:
        found = {backend: in_a_process(backend, seq, options) for backend in BACKENDS}
        cells = []
        for backend, result in found.items():
            if differs(result["norms"], found["eager"]["norms"], TOLERANCE[options.dtype]):
                cells.append(f"{'WRONG':>18}")
                continue
            ratio = f"(x{result['bytes'] / last[backend]:.2f})" if backend in last else ""
            cells.append(f"{result['bytes'] / 1e6:9.1f} {ratio:>8}")
            last[backend] = max(result["bytes"], 1)
        fused = "" if found["tv"]["sites"] == 1 else "  not fused by tv"
        print(f"{seq:6d} " + "".join(cells) + fused, flush=True)


def differs(norms: list[float], expected: list[float], tolerance: float) -> bool:
    return any(not abs(a - b) <= tolerance * abs(b) for a, b in zip(norms, expected))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--dtype", default="float32", choices=tuple(TOLERANCE))
    parser.add_argument("--one", choices=BACKENDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.seq[0], options)))
    else:
        table(options)


if __name__ == "__main__":
    main()
