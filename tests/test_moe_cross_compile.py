"""The kernels of tv.moe compiled for GPUs that are not here: what machine code holds, what graphs launch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton beside this PyTorch")

from tests.harness import TURN
from tvcompile.arch import SHARED

ROOT = Path(__file__).resolve().parent.parent
# Warp instructions per MFLOP of the up projection for many tokens, as measured; the best peers: 425, 400, 256, 58, 412.
MOST = {"sm80": 391, "sm86": 391, "sm89": 391, "sm90": 195, "sm100": 60, "sm120": 395}
FORWARD = [
    "experts_up -> act_ptr, hidden_ptr",
    "experts_rows -> out_ptr",
    "experts_combine -> out_ptr",
]
BACKWARD = [
    "experts_dact -> dpre_ptr, act_ptr, dots_ptr",
    "experts_rows -> out_ptr",
    "experts_combine -> out_ptr",
    "experts_dweights -> out_ptr",
]


def shown(what: str) -> list:
    # The interpreter of the other tests would take the kernels' place.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.gpu_moe", what]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


# Half of the architectures at a turn.
@pytest.mark.parametrize("arch", list(SHARED)[TURN % 2 :: 2])
def test_every_launch_compiles_to_good_machine_code(arch):
    rows = shown(arch)
    assert len(rows) >= 10
    wrong = []
    for row in rows:
        if row["spills"]:
            wrong.append(f"{row['kernel']}: {row['spills']} spill instructions")
        if row["shared"] > SHARED[arch] * 1024:
            wrong.append(f"{row['kernel']}: {row['shared']} bytes of shared memory")
        if row["product"] and not row["mma"]:
            wrong.append(f"{row['kernel']}: no tensor-core instruction")
        wide = "loads" in row and "narrow" not in row["kernel"]
        if row["product"] and wide and not any("LDGSTS.128" in x or "UTMALDG" in x for x in row["loads"]):
            wrong.append(f"{row['kernel']}: no 128-bit asynchronous load among {row['loads']}")
    assert not wrong, "\n".join(wrong)
    if arch in MOST:
        assert rows[0]["kernel"] == "experts_up T=4096" and rows[0]["instr_per_mflop"] <= MOST[arch]


def test_graphs_launch_the_kernels_and_see_what_they_write():
    found = shown("graphs")[0]

    def launches(name: str) -> list[str]:
        return [f"{x.split()[0]} -> {x.split(' -> ')[1]}" for x in found[name]]

    sums = ["experts_outer -> outs_0"] * 2 + ["experts_sum -> outs_0"] * 2
    assert launches("stacked") == launches("dynamic") == FORWARD + BACKWARD + sums
    assert launches("listed") == FORWARD + BACKWARD + ["experts_outer -> outs_0, outs_1, outs_2, outs_3"] * 3
    assert all("grid ('n', 1, 1)" in x for x in found["dynamic"][:7])
    # In Inductor's source they run like its own kernels, and nothing goes to the host.
    source = "\n".join(found["source"])
    assert all(f"{name.split()[0]}_" in source for name in FORWARD)
    assert ".item()" not in source and "bincount" not in source
