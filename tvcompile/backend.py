"""torch.compile(model, backend="tv"): canonicalize -> lift -> select -> emit -> Inductor."""

from __future__ import annotations

import dataclasses
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import fx
from torch._functorch.compile_utils import fx_graph_cse
from torch._inductor.custom_graph_pass import CustomGraphPass

from . import report, sites, tracing, tuning
from .kernels import selfcheck
from .options import Options
from .passes import LIFTS
from .passes.canonicalize import canonicalize, checkpoint_bodies, placeholders_of
from .passes.emit import compute_dtype, emit
from .passes.verify import verify
from .passes.vmaps import batched
from .select import select, select_moe
from .spec import Match, MoEMatch, Refusal, Refuse, where_of
from .tuning import store


def tv(gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None = None, options: dict | None = None):
    """A Dynamo backend. `mode` and options without the prefix `tv.` go to Inductor as they are."""
    ours, inductor = Options.parse(options)
    with selfcheck.only_if(ours.selfcheck == "on"):
        return _compile(gm, example_inputs, mode, ours, inductor)


def _compile(gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, ours: Options, inductor: dict):
    program = attempt(gm, placeholders_of(gm), ours)
    if ours.codegen == "none":
        return program.forward
    if program is gm:
        return as_it_was(gm, example_inputs, mode, inductor)
    try:
        with tracing.backward_at_once(gm):
            return hand_off(program, example_inputs, mode, inductor)
    except Exception as error:
        if ours.strict:
            raise
        compiled = as_it_was(gm, example_inputs, mode, inductor)  # raises too where the fault is not ours
        warnings.warn(fallback_message(error), stacklevel=2)
        return compiled


def as_it_was(gm: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict) -> Callable:
    """Dynamo's graph, compiled; where that fails for sizes that stay in graphs for us alone, Dynamo is to break it."""
    try:
        with tracing.backward_at_once(gm):
            return hand_off(gm, example_inputs, mode, options)
    except Exception as error:
        if tracing.has_sizes_from_data(gm):
            raise tracing.SizesFromData(f"{type(error).__name__}: {error}") from error
        raise


def attempt(gm: fx.GraphModule, fakes: Sequence[Any], ours: Options) -> fx.GraphModule:
    """`rewrite`, reported; after an error of ours that is not to be raised, the graph itself and a warning."""
    record = report.GraphRecord()
    store.load()
    try:
        program = rewrite(gm, fakes, record)
        tune(record, ours)
    except Exception as error:
        if ours.strict:
            raise
        program = gm
        record.failed = f"{type(error).__name__}: {error}"
        warnings.warn(fallback_message(error), stacklevel=2)
    report.publish(record, ours.log)
    return program


def rewrite(gm: fx.GraphModule, fakes: Sequence[Any], record: report.GraphRecord) -> fx.GraphModule:
    """Dynamo's graph with every proven attention and mixture fused, or the graph itself where there is none."""
    try:
        vmaps = batched(gm)
    except Refuse as why:
        assert why.node is not None
        record.refusals.append(Refusal(why.node.name, why.reason, where_of(why.node)))
        return gm
    bodies = {body: rewrite(body, inner, record) for body, inner in checkpoint_bodies(gm)}
    with record.timed("canonicalize"):
        program, whole = canonicalize(gm, fakes, bodies, vmaps)
    record.higher_order += whole
    before = report.lines_of(program.graph)
    matches: list[Match | MoEMatch] = []
    refused: list[tuple[fx.Node, Refusal]] = []
    for lift in LIFTS:
        with record.timed(lift.__name__):
            found, reasons = lift(program.graph)
        matches += found
        refused += reasons.items()
    chosen, fused = [], []
    for match in matches:
        kernel, reason = _select(match)
        if reason:
            refused.append((match.anchor, Refusal(str(match.anchor.target), reason, where_of(match.anchor))))
        else:
            chosen.append(match)
            fused.append(report.site_of(match, kernel))
    if not chosen and all(body is new for body, new in bodies.items()):
        record.refusals += [refusal for _, refusal in refused]
        return gm
    with record.timed("emit"):
        nodes = emit(program.graph, chosen)
        program.recompile()
    left = set(program.graph.nodes)
    # What is gone was a part of something that is fused.
    record.sites += [site for site, node in zip(fused, nodes) if node in left]
    record.refusals += [refusal for node, refusal in refused if node in left]
    with record.timed("verify"):
        verify(program, "emit")
    learned = sites.learned(program, fakes)
    record.works += [sites.work_of(node, learned) for node in nodes if node in left]
    record.keep(program, before)
    return program


def tune(record: report.GraphRecord, ours: Options) -> None:
    """What was measured on this machine, before or now, for the sites of a graph; what it is, the report says."""
    if not record.works:
        return
    if ours.tune != "none":
        with record.timed("tune"):
            sites.tune(record.works, ours.tune, ours.strict)
    record.sites = [
        dataclasses.replace(site, configs=sites.configs_of(*work)) for site, work in zip(record.sites, record.works)
    ]


def _select(match: Match | MoEMatch) -> tuple[str, str]:
    if isinstance(match, MoEMatch):
        return select_moe(match)
    return select(match.spec, match.q.node.meta["val"].device, compute_dtype(match), match.size())


def hand_off(program: fx.GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict) -> Callable:
    """Inductor: autograd, fusion and everything that is neither attention nor experts."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    patches = {**(list_mode_options(mode) if mode and mode != "default" else {}), **options}
    return compile_fx(program, example_inputs, config_patches=shared(patches))


def shared(options: dict[str, Any]) -> dict[str, Any]:
    """Options of Inductor with Sharing after the user's own passes."""
    from torch._inductor import config

    name = "joint_custom_post_pass"
    return {**options, name: Sharing(options.get(name, getattr(config, name)))}


class Sharing(CustomGraphPass):
    """After the user's own pass: what layers compute alike, as the block map of a mask, is computed once.

    AOTAutograd does that for training only.
    """

    def __init__(self, users: Any):
        self.users = users if isinstance(users, (list, tuple)) else [users] * (users is not None)

    def __call__(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        for each in self.users:
            each(module.graph)
        module.graph = fx_graph_cse(module.graph)

    def uuid(self) -> Any:
        found = [each.uuid() if isinstance(each, CustomGraphPass) else None for each in self.users]
        # Cached graphs hold launches of configs as they were chosen.
        return None if None in found else ["tv.sharing", tuning.state(), *found]


def fallback_message(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return (
        f"tvcompile could not treat a graph and left it to Inductor: {type(error).__name__}: {error} "
        f"(at {frame.filename}:{frame.lineno} in {frame.name}). The program is unchanged. "
        "options={'tv.strict': True} raises instead; please report it with the model."
    )


tv.backend_ctx_ctor = tracing.tracing_context  # type: ignore[attr-defined]
