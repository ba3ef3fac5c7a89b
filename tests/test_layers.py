"""Who may import whom (DESIGN.md, layers), checked on the imports themselves."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load_check():
    spec = importlib.util.spec_from_file_location("tv_tools_check", ROOT / "tools" / "check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = _load_check()


def _package(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        file = folder / "tvcompile" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return folder


def test_the_package_keeps_its_layers():
    assert check.violations() == []


def test_every_part_of_the_package_is_there_to_be_checked():
    parts = {check.part_of(check.module_name(f, ROOT)) for f in (ROOT / "tvcompile").rglob("*.py")}
    assert {"expr", "spec", "passes", "kernels", "select", "backend", "options"} <= parts


@pytest.mark.parametrize(
    "file, text, why",
    [
        ("expr.py", "from tvcompile.spec import Spec", "expr comes before spec"),
        ("bounds.py", "from . import select", "bounds comes before select"),
        ("spec.py", "def f():\n    from .backend import tv", "spec comes before backend"),
        ("select.py", "from .backend import tv", "select comes before backend"),
        ("passes/emit.py", "import triton.language as tl", "passes never imports triton"),
        ("passes/emit.py", "from ..kernels import cpu", "passes never imports tvcompile.kernels"),
        ("passes/emit.py", "from .. import tuning", "passes never imports tvcompile.tuning"),
        ("kernels/cpu.py", "from torch import fx", "kernels never imports torch.fx"),
        ("kernels/cpu.py", "import torch\nx = torch.fx.Node", "kernels never imports torch.fx"),
        ("kernels/cpu.py", "from ..passes.emit import e", "kernels never imports tvcompile.passes"),
        ("tuning/cache.py", "from torch.fx import Node", "tuning never imports torch.fx"),
        ("backend.py", "import os\nx = os.environ['X']", "only options.py reads the environment"),
        ("arch.py", "from os import getenv", "only options.py reads the environment"),
        ("strange.py", "", "has no layer"),
    ],
)
def test_a_broken_layer_is_found(tmp_path, file, text, why):
    found = check.violations(_package(tmp_path, {file: text}))
    assert len(found) == 1 and why in found[0], found


@pytest.mark.parametrize(
    "file, text",
    [
        ("backend.py", "from .select import s\nfrom .passes.emit import e\nfrom .kernels import k"),
        ("passes/emit.py", "import torch.fx\nfrom ..spec import Match\nfrom .verify import check"),
        ("kernels/cpu.py", "import triton\nfrom ..bounds import kv_range\nfrom .. import spec"),
        ("options.py", "import os\nx = os.environ.get('TVCOMPILE_LOG')"),
        (
            "expr.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .spec import Spec",
        ),
        ("__init__.py", "from .backend import tv"),
    ],
)
def test_a_kept_layer_is_not_reported(tmp_path, file, text):
    assert check.violations(_package(tmp_path, {file: text})) == []


def test_the_size_report_exempts_triton_functions(tmp_path):
    many = ", ".join(f"a{i}" for i in range(9))
    _package(tmp_path, {"kernels/k.py": f"@triton.jit\ndef f({many}):\n    pass\n"})
    assert check.oversized(tmp_path) == []
    _package(tmp_path, {"kernels/k.py": f"def f({many}):\n" + "    pass\n" * 61})
    assert len(check.oversized(tmp_path)) == 2
