"""The layer rule (an error) and the size report (advice).

    python tools/check.py

expr bounds options <- spec arch report <- passes and kernels, tuning <- select, sites <- backend and integrations <-
exported: a module imports from its own layer and from those before it. Passes see torch.fx, never triton; kernels and
tuning see triton, never torch.fx; neither sees the other. Only options.py reads the environment.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "tvcompile"

# The visible order: part of the package -> its layer.
LAYERS = {
    "terms": 0,
    "expr": 0,
    "syntax": 0,
    "derive": 0,
    "bounds": 0,
    "options": 0,
    "standalone": 0,
    "breaks": 1,
    "moe_spec": 1,
    "spec": 1,
    "arch": 1,
    "report": 1,
    "passes": 2,
    "kernels": 2,
    "tuning": 2,
    "select": 3,
    "tracing": 3,
    "sites": 3,
    "backend": 4,
    "exported": 5,
    "integrations": 4,
    "doctor": 4,
    "tune": 4,
    "__main__": 6,
    "__init__": 6,
}
NEVER = {
    "passes": ("triton", f"{PACKAGE}.kernels", f"{PACKAGE}.tuning"),
    "kernels": ("torch.fx", f"{PACKAGE}.passes"),
    "tuning": ("torch.fx", f"{PACKAGE}.passes"),
}
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 400, 60, 8
MEASURED = ("tvcompile", "tests", "examples", "benchmarks", "tools")


def module_name(file: Path, root: Path) -> str:
    """tvcompile/passes/emit.py -> tvcompile.passes.emit; a package's __init__.py -> the package."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """The part of the package a module belongs to: tvcompile.passes.emit -> passes."""
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """ast.walk without what only a type checker runs."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not _for_types_only(child):
            yield from _walk(child)


def imports(file: Path, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of all that a file imports, inside functions too; relative ones resolved.

    `from a import b` gives both a and a.b, since b may be a module; reading torch.fx counts too.
    """
    package = module_name(file, root).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in _walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield node.lineno, source
            for alias in node.names:
                yield node.lineno, f"{source}.{alias.name}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.fx":
            yield node.lineno, "torch.fx"


def _reads_environment(file: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("os.environ", "os.getenv"):
            yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            if {"environ", "getenv"} & {alias.name for alias in node.names}:
                yield node.lineno


def violations(root: Path = ROOT) -> list[str]:
    """Every break of the layer rule below root/tvcompile, one sentence each."""
    found = []
    for file in sorted((root / PACKAGE).rglob("*.py")):
        here = str(file.relative_to(root))
        module = module_name(file, root)
        part = part_of(module)
        if part not in LAYERS:
            found.append(f"{here}: `{part}` has no layer: give it one in tools/check.py")
            continue
        broken = set()
        for line, name in imports(file, root):
            for other in NEVER.get(part, ()):
                if name == other or name.startswith(other + "."):
                    broken.add((line, f"{part} never imports {other}"))
            inside = name.startswith(PACKAGE + ".")
            if inside and LAYERS.get(part_of(name), -1) > LAYERS[part]:
                broken.add((line, f"{part} comes before {part_of(name)} and may not import it"))
        if part != "options":
            broken |= {(n, "only options.py reads the environment") for n in _reads_environment(file)}
        found += [f"{here}:{line}: {why}" for line, why in sorted(broken)]
    return found


def _is_jit(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def oversized(root: Path = ROOT) -> list[str]:
    """Files, functions and parameter lists over the soft limits; jit functions are exempt."""
    found = []
    for file in sorted(f for top in MEASURED for f in (root / top).rglob("*.py")):
        here = str(file.relative_to(root))
        text = file.read_text(encoding="utf-8")
        lines = text.count("\n")
        if lines > MAX_FILE:
            found.append(f"{here}: {lines} lines (limit {MAX_FILE})")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_jit(node):
                continue
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION:
                found.append(f"{here}:{node.lineno}: {node.name} has {length} lines ({MAX_FUNCTION})")
            a = node.args
            count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
            if count > MAX_PARAMETERS:
                found.append(f"{here}:{node.lineno}: {node.name} has {count} parameters ({MAX_PARAMETERS})")
    return found


def main() -> int:
    large = oversized()
    print(f"size report: {len(large)} over the soft limits" + (":" if large else ""))
    for line in large:
        print("  " + line)
    broken = violations()
    print(f"layers: {len(broken)} broken" + (":" if broken else ""))
    for line in broken:
        print("  " + line)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
