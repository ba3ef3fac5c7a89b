"""Every config that can be chosen, compiled for its architecture without a GPU; what its machine code may hold."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="no Triton beside this PyTorch")

from tools.kernels import cases
from tvcompile.arch import SHARED

ROOT = Path(__file__).resolve().parent.parent
TENSOR_CORE = {"sm90": "HGMMA", "sm100": "UTCHMMA"}


def compiled(arch: str, file: Path) -> list[dict]:
    # The interpreter of the other tests would take the kernels' place.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "tools/kernels.py", "--arch", arch, "--json", str(file)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    rows = json.loads(file.read_text())["ours"]
    assert len(rows) == len(list(cases([arch])))
    return rows


@pytest.mark.parametrize("arch", SHARED)
def test_every_config_compiles_to_good_machine_code(arch, tmp_path):
    wrong = []
    for row in compiled(arch, tmp_path / "found.json"):
        name = f"{row['arch']} {row['pass']} D={row['D']} ({row['source']})"
        ops = row.get("ops", {})
        if row["spills"]:
            wrong.append(f"{name}: {row['spills']} spill instructions")
        if row["shared"] > SHARED[row["arch"]] * 1024:
            wrong.append(f"{name}: {row['shared']} bytes of shared memory")
        if not row["mma"]:
            wrong.append(f"{name}: no tensor-core instruction in the loop over FULL blocks")
        # Heads of 256 features do not fit the registers that the best instructions want.
        best = TENSOR_CORE.get(row["arch"], "HMMA") if row["arch"].startswith("sm") and row["D"] <= 128 else None
        if row["pass"] == "fwd" and best is not None and best not in ops:
            wrong.append(f"{name}: no {best} among {sorted(ops)}")
        if ops.get("FSEL", 0):
            wrong.append(f"{name}: {ops['FSEL']} selects of a mask in the loop over FULL blocks")
        if "loads" in row and not any("128" in op or "UTMALDG" in op for op in row["loads"]):
            wrong.append(f"{name}: no 128-bit load among {row['loads']}")
    assert not wrong, "\n".join(wrong)
