"""What tv.moe launches on GPUs that are not here, as JSON for tests/test_moe_cross_compile.py.

python -m tests.gpu_moe sm90 ...      the machine code of its kernels, for prefill and decode, one row each
python -m tests.gpu_moe graphs        what the graphs of AOTAutograd hold, by program
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests import fake_cuda
from tests.gpu_program import lines
from tvcompile.arch import Device
from tvcompile.kernels import moe  # noqa: F401  it registers the op
from tvcompile.tuning import amd_code, choose, machine_code
from tvcompile.tuning.cross_compile import Launch, compile_launch, expert_launches
from tvcompile.tuning.moe import PASSES, Ask

K, E = 6, 64
SILU = "act = g*sigmoid(g)*u; layout="


def cases(arch: str) -> Iterator[tuple[str, Launch]]:
    """Launches by name: a layer of 64 experts of 1408 features, 6 of them for each of 4096 tokens or of 64."""

    device = Device.typical(arch)

    def found(T: int, backward: bool, spec: str = SILU + "chunk", nth: int = 0, **how) -> dict[str, list[Launch]]:
        return expert_launches(
            lambda pass_: choose(Ask(device, pass_, "bfloat16", T * K // E))[nth].config,
            torch.bfloat16,
            spec,
            backward,
            T=T,
            **how,
        )

    for T, backward, skipped in ((4096, False, ""), (4096, True, "experts_combine"), (64, False, "experts_combine")):
        for name, made in found(T, backward).items():
            title = f"{name} T={T}" + " backward" * backward
            yield from ((title, launch) for launch in made if name != skipped)
    # What takes the place of a config that fails its check on a GPU.
    if len(choose(Ask(device, "up", "bfloat16", T * K // E))) > 1:
        yield "experts_up plain", found(4096, False, nth=-1)["experts_up"][0]
        yield "experts_outer plain", found(4096, True, nth=-1)["experts_outer"][0]
    # Rows that begin anywhere are loaded element by element.
    narrow = {a: choose(Ask(device, a, "bfloat16", 128, narrow=True))[0].config for a in PASSES}
    odd = {"T": 512, "K": 2, "E": 8, "H": 1000, "F": 500, "H_out": 1000}
    for name, made in expert_launches(narrow.__getitem__, torch.bfloat16, SILU + "chunk", True, **odd).items():
        yield from ((f"{name} narrow", launch) for launch in made if "PRECISION" in launch.constants)
    # What reads the weights by other ways.
    for layout in ("interleave", "separate") if arch in ("sm80", "sm90", "sm100") else ():
        yield f"experts_up {layout}", found(4096, False, SILU + layout, transposed=False)["experts_up"][0]
    if arch in ("sm80", "sm86"):
        few = {"E": 40, "K": 8, "H": 1536, "F": 512}  # 8 trips, which LLVM would unroll
        yield "experts_rows of few trips", found(4096, False, **few)["experts_rows"][0]
    if arch == "sm100":
        even = found(4096, False, K=8, F=1024)["experts_up"][0]  # offsets that are or-ed rather than added
        yield "experts_up of a power of two", even
    for transposed in (False, True) if arch in ("sm86", "sm100", "sm120") else ():
        made = found(4096, True, SILU + "separate", transposed=transposed)["experts_rows"]
        yield f"experts_rows separate backward, transposed={transposed}", made[0]


def measured(arch: str, name: str, launch: Launch) -> dict[str, Any]:
    """Spills, shared memory, tensor-core instructions, and of the steady loop instructions per MFLOP."""
    compiled = compile_launch(launch, arch)
    row = {"arch": arch, "kernel": name, "product": "PRECISION" in launch.constants}
    if arch.startswith("gfx"):
        amd = amd_code.read(compiled, arch, launch.num_warps)
        return row | {"spills": amd.spills, "shared": amd.shared, "mma": len(amd.loops)}
    code = machine_code.read(compiled, arch, launch.num_warps)
    text = compiled.asm["ptx"]
    row |= {"spills": code.spills, "shared": code.shared, "loads": code.loads}
    row["mma"] = sum(text.count(x) for x in ("mma.sync", "wgmma.mma", "tcgen05.mma"))
    if code.steady is not None:
        row["instr_per_mflop"] = code.steady.instr_per_mflop
    return row


def stacked(x: Tensor, ids: Tensor, w: Tensor, up: Tensor, down: Tensor, up_bias: Tensor, down_bias: Tensor) -> Tensor:
    return torch.ops.tv.moe(x, ids, w, [up.mT], [down.mT], [up_bias], [down_bias], SILU + "chunk", True)[0]


def listed(x: Tensor, ids: Tensor, w: Tensor, *weights: Tensor) -> Tensor:
    ups, downs = list(weights[: 2 * len(weights) // 3]), list(weights[2 * len(weights) // 3 :])
    return torch.ops.tv.moe(x, ids, w, ups, downs, [], [], SILU + "separate", True)[0]


def graphs() -> dict[str, list[str]]:
    T, H, F, n = 48, 64, 128, 4

    def leaf(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True)

    first = leaf(T, H), torch.zeros(T, 2, dtype=torch.int64), leaf(T, 2)
    whole = *first, leaf(n, 2 * F, H), leaf(n, H, F), leaf(n, 2 * F), leaf(n, H)
    parts = *first, *(leaf(H, F) for _ in range(2 * n)), *(leaf(F, H) for _ in range(n))
    shown = {
        "stacked": lines(fake_cuda.capture(stacked, whole, train=True)),
        "listed": lines(fake_cuda.capture(listed, parts, train=True)),
        "dynamic": lines(fake_cuda.capture(stacked, whole, train=True, dynamic=True)),
        "source": fake_cuda.inductor_source(stacked, whole).splitlines(),
    }
    return {name: [x for x in found if name == "source" or "experts_" in x] for name, found in shown.items()}


if __name__ == "__main__":
    if sys.argv[1:] == ["graphs"]:
        print(json.dumps(graphs()))
    for arch in sys.argv[1:]:
        if arch != "graphs":
            for name, launch in cases(arch):
                print(json.dumps(measured(arch, name, launch)), flush=True)
