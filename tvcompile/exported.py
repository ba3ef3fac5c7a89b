"""Programs of torch.export, fused: to be saved, run, or compiled ahead of time by AOTInductor.

    from tvcompile import exported
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: Dim.AUTO}})
    exported.package(program, "model.pt2")
    model = torch._inductor.aoti_load_package("model.pt2")

A package for a GPU holds the Triton kernels. One for the CPU calls tv::attention: the process that loads it imports
tvcompile first.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

from . import backend
from .kernels import selfcheck
from .options import Options
from .passes.writes import storage_of, written_arguments


def fuse(program: ExportedProgram, options: Mapping[str, Any] | None = None) -> ExportedProgram:
    """The program with every proven attention and mixture as one operation, or itself where there is none.

    options: those of the backend; Inductor's are not looked at. Raises ValueError for an unknown one, TypeError for
    what is no ExportedProgram.
    """
    if not isinstance(program, ExportedProgram):
        got = type(program).__name__
        raise TypeError(f"expected an ExportedProgram, got {got}: torch.export.export(model, inputs) makes one")
    ours, _ = Options.parse(options)
    old = program.graph_module
    with selfcheck.only_if(ours.selfcheck == "on"):
        new = backend.attempt(old, _fakes(program), ours)
    if new is old:
        return program
    for n in new.graph.find_nodes(op="call_function", target=torch.amp.autocast_mode._enter_autocast):
        n.meta["val"] = None  # the context itself, which no program of torch.export may hold
    return ExportedProgram(
        root=new,
        graph=new.graph,
        graph_signature=_renamed(program.graph_signature, new.graph),
        state_dict=program.state_dict,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=copy.deepcopy(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=program.verifiers,
    )


def package(program: ExportedProgram, path: str, options: Mapping[str, Any] | None = None) -> str:
    """Fuses and compiles the program into a package for `torch._inductor.aoti_load_package`; gives the package's path.

    path: ends in ".pt2". options: as in torch.compile(backend="tv", options=...); those without `tv.` go to Inductor.
    Raises as `fuse` does, and ValueError for another path.
    """
    from torch._inductor import aoti_compile_and_package

    if not path.endswith(".pt2"):
        raise ValueError(f"expected a path that ends in .pt2, got {path!r}")
    ours, inductor = Options.parse(options)
    fused, configs = fuse(program, options), backend.shared(inductor)
    with selfcheck.only_if(ours.selfcheck == "on"):
        try:
            return aoti_compile_and_package(fused, package_path=path, inductor_configs=configs)
        except Exception as error:
            if ours.strict or fused is program:
                raise
            made = aoti_compile_and_package(program, package_path=path, inductor_configs=configs)
            warnings.warn(backend.fallback_message(error), stacklevel=2)
            return made


def _fakes(program: ExportedProgram) -> list:
    """What the placeholders hold before the program runs: its tracing left on them what it wrote, gradients too."""
    nodes, parameters = program.graph_module.graph, program.graph_signature.parameters
    written = {storage_of(x) for n in nodes.nodes for x in written_arguments(n)} - {None}
    found = []
    for spec, node in zip(program.graph_signature.input_specs, nodes.find_nodes(op="placeholder")):
        plain = storage_of(node) not in written or spec.target in parameters
        found.append(node.meta["val"] if plain else node.meta["val"].detach())
    return found


def _renamed(signature: ExportGraphSignature, graph: fx.Graph) -> ExportGraphSignature:
    """The signature with the names that the outputs have now."""
    new = copy.deepcopy(signature)
    for spec, out in zip(new.output_specs, graph.output_node().args[0]):
        if isinstance(out, fx.Node):
            spec.arg = dataclasses.replace(spec.arg, name=out.name)
    return new
