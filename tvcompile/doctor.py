"""What tvcompile finds on this machine, what is missing, and what to do: `python -m tvcompile doctor`.

Versions, processors with the configs that they get, the compilers, the cache. tools/doctor.py is another thing: it asks
before the installation whether this Python can have one.
"""

from __future__ import annotations

import dataclasses
import platform
import subprocess
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import options
from .arch import SHARED, Device, family
from .tuning import lookup, store
from .tuning.kept import Kept

PACKAGES = ("tvcompile", "torch", "triton", "sympy", "transformers")
OPERATORS = ("attention", "moe")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report. trouble: what is wrong, with what to do; fatal: nothing is compiled with that."""

    what: str
    found: str
    trouble: str = ""
    fatal: bool = False


def doctor(console: Console) -> int:
    """Prints what there is; 1 if something is missing without which nothing is compiled."""
    sections = {
        "versions": list(versions()),
        "processors": list(processors()),
        "compilers": list(compilers()),
        "configs": list(configs()),
        "cache": list(cache()),
    }
    for title, findings in sections.items():
        table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
        for f in findings:
            mark = "" if not f.trouble else "[red]missing[/red]" if f.fatal else "[yellow]note[/yellow]"
            table.add_row(f.what, escape(f.found), mark)
        console.print(table)
    troubles = [f for findings in sections.values() for f in findings if f.trouble]
    for f in sorted(troubles, key=lambda f: not f.fatal):
        console.print(f"{'missing' if f.fatal else 'note'}: {f.what}: {f.trouble}", markup=False, highlight=False)
    if not troubles:
        console.print("Nothing is missing.")
    return int(any(f.fatal for f in troubles))


def versions() -> Iterator[Finding]:
    yield Finding("Python", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        try:
            yield Finding(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            if name == "triton" and (torch.version.cuda or torch.version.hip):
                yield Finding(name, "not installed", "GPU kernels need the Triton of this PyTorch: reinstall PyTorch.")
            else:
                yield Finding(name, "on the path" if name == "tvcompile" else "not installed")
    built = torch.version.cuda or torch.version.hip
    kind = "CUDA" if torch.version.cuda else "ROCm"
    yield Finding("PyTorch is for", f"{kind} {built} and CPUs" if built else "CPUs")


def gpus() -> list[tuple[str, Device]]:
    """(name, what configs have to know) of each GPU that PyTorch can use."""
    if not torch.cuda.is_available():
        return []
    found = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [(torch.cuda.get_device_name(d), Device.of(d)) for d in found]


def processors() -> Iterator[Finding]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("CPU", f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads")
    for i, (name, device) in enumerate(gpus()):
        about = f"{name}, {device.arch}, {device.units} multiprocessors, {device.shared // 1024} KiB of shared memory"
        trouble = ""
        if family(device.arch) is None:
            trouble = f"no kernels for {device.arch} (there are for {', '.join(SHARED)}): programs stay as they were."
        yield Finding(f"GPU {i}", about, trouble)
    if not gpus():
        built = torch.version.cuda or torch.version.hip
        why = "its driver may be missing or too old" if built else "this PyTorch is built for CPUs alone"
        yield Finding("GPU", "none that PyTorch can use", f"CPU kernels serve; if there is a GPU, {why}.")


def compilers() -> Iterator[Finding]:
    yield _cpp()
    if torch.version.cuda and gpus():
        yield _ptxas()


def _cpp() -> Finding:
    """Inductor's C++ compiler builds a small program against this Python."""
    from torch._inductor.cpp_builder import get_cpp_compiler

    what, fix = "C++", "Debian: g++, Fedora: gcc-c++, macOS: xcode-select --install; or name yours in CXX"
    try:
        name = get_cpp_compiler()
    except Exception:
        return Finding(what, "none", f"Inductor needs a C++ compiler: install one ({fix}).", fatal=True)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "hello.cpp"
        source.write_text("#include <Python.h>\n#include <vector>\nint main() { return std::vector<int>(1).at(0); }\n")
        command = [name, "-std=c++17", f"-I{sysconfig.get_paths()['include']}", "-fsyntax-only", str(source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            said, good = done.stderr, done.returncode == 0
        except (OSError, subprocess.SubprocessError) as error:
            said, good = str(error), False
    if good:
        return Finding(what, name)
    if "Python.h" in said:
        fix = "Debian: python3-dev, Fedora: python3-devel"
        return Finding(what, name, f"the C headers of Python are missing: install them ({fix}).", fatal=True)
    return Finding(what, name, f"it cannot build a small program: install another ({fix}).", fatal=True)


def _ptxas() -> Finding:
    try:
        from triton import knobs

        tool = knobs.nvidia.ptxas
        return Finding("ptxas", f"{tool.version} at {tool.path}")
    except Exception as error:
        return Finding("ptxas", "none", f"Triton cannot compile for this GPU: {error}", fatal=True)


def configs() -> Iterator[Finding]:
    """Where the configs of each processor come from: rows that apply, measurements, else the formula."""
    store.load()
    here = [device for _, device in gpus()] or [Device.of(torch.device("cpu"))]
    for device in dict.fromkeys(here):
        arch = device.arch if device.arch == "cpu" else family(device.arch)
        for op in OPERATORS:
            rows = [r for r in lookup.rows(op) if r.when.get("arch", arch) == arch and r.shared <= device.shared]
            measured = [e for (name, _), e in store.entries().items() if name.startswith(f"{op}-{device.arch}-")]
            parts = [f"{len(measured)} measured here"] if measured else []
            parts += [f"table {arch}: {n} rows ({source})" for source, n in Counter(r.source for r in rows).items()]
            fallback = f"; {arch} stands in for {device.arch}" if arch != device.arch else ""
            yield Finding(f"{op} on {device.arch}", ", ".join([*parts, "formula"]) + fallback)


def cache() -> Iterator[Finding]:
    """The user's cache folder: what is in it, whether it can be written."""
    folder = options.cache_folder()
    yield Finding("folder", str(folder))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fix = "make it writable, or name another folder in TVCOMPILE_CACHE_DIR."
        yield Finding("writing", f"fails: {error}", f"nothing that is measured or checked can be kept: {fix}")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        files = list(store.folder().glob("*.json"))
        held = [Kept(f).rows() for f in files]
        checks = [Kept(f).rows() for f in folder.glob("selfcheck-*.json")]
    current = sum(f.stem in store.current() for f in files)
    yield Finding("measured", f"{sum(map(len, held))} configs in {len(files)} files, {current} of these kernels")
    bad = [key for rows in checks for key, reason in rows.items() if reason]
    trouble = "these are not used; please report them: " + "; ".join(bad[:3]) if bad else ""
    yield Finding("checks of kernels", f"{sum(map(len, checks))}, {len(bad)} failed", trouble)
    for each in said:
        yield Finding("corrupt", str(each.message), "it will be written anew; nothing is to be done.")
