"""Every shipped config, compiled for its architecture without a GPU; what its machine code must and must not hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton beside this PyTorch")

from tools.kernels import MMA, SHARED
from tvcompile.tuning import rows

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    file = tmp_path_factory.mktemp("kernels") / "found.json"
    # The interpreter of the other tests would take the kernels' place.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "tools/kernels.py", "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(file.read_text())


def test_every_shipped_config_compiles_to_good_machine_code(found):
    assert len(found) == len(rows())
    wrong = []
    for kernel in found:
        name = f"{kernel['arch']} {kernel['pass']} D={kernel['D']}"
        loop = kernel["full_loop"]
        if kernel["spills"]:
            wrong.append(f"{name}: {kernel['spills']} spill instructions")
        if kernel["shared"] > SHARED[kernel["arch"]] * 1024:
            wrong.append(f"{name}: {kernel['shared']} bytes of shared memory")
        if not MMA & set(loop):
            wrong.append(f"{name}: no tensor-core instruction in the loop over FULL blocks")
        if loop.get("FSEL", 0):
            wrong.append(f"{name}: {loop['FSEL']} selects of a mask in the loop over FULL blocks")
        if not any("128" in op or "UTMALDG" in op for op in kernel["loads"]):
            wrong.append(f"{name}: no 128-bit load among {kernel['loads']}")
    assert not wrong, "\n".join(wrong)


def test_the_forward_uses_the_tensor_cores_of_its_architecture(found):
    best = {"sm90": "HGMMA", "sm100": "UTCHMMA"}
    for kernel in found:
        if kernel["pass"] == "fwd":
            assert best.get(kernel["arch"], "HMMA") in kernel["full_loop"], kernel
