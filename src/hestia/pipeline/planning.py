"""The first stages: which tensors get which quantizer, and the curvature that decides it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from .. import curvature, loading, nn, processes, recipes
from ..errors import ConfigError
from ..export.precheck import check_targets
from ..files import sha256, write_bytes
from ..mixed import candidates
from ..options import Options
from ..planner import require_curvature
from ..plans import Plan
from ..quant import QuantSpec
from ..settings import calibrate_on, plan_of, recipe_of, tell_unread_curvature, widths_may_differ
from .artefacts import PARTIAL_FILE, PLAN_FILE, SENSITIVITY_FILE
from .workspace import Workspace


def given_plan(options: Options) -> tuple[Options, Plan | None]:
    """The plan that ``--plan`` names, and the options with its digest; None where a plan is to be made.

    Raises:
        ConfigError, PlanError: no plan, or another one than the digest says.
    """
    if options.plan is None:
        return options, None
    path = Path(options.plan)
    plan, digest = Plan.load(path), sha256(path)
    if options.plan_sha256 not in (None, digest):
        raise ConfigError(
            f"{path}: not the plan of these options: its SHA-256 is {digest}, theirs {options.plan_sha256}. Give "
            "--plan that one (a run keeps its own as plan.json), or leave out --plan-sha256 to follow this one"
        )
    return dataclasses.replace(options, plan_sha256=digest), plan


def needs_curvature(options: Options) -> bool:
    """Whether the plan that ``options`` ask for needs a sensitivity: its recipe reads one, or widths may differ."""
    return options.plan is None and (recipe_of(options).uses_curvature or widths_may_differ(options))


def calibrates(options: Options) -> bool:
    """Whether a run with these options measures that sensitivity itself."""
    return needs_curvature(options) and options.sensitivity is None and options.calibrate > 0


def plan_without_curvature(work: Workspace, given: Plan | None) -> Plan:
    """The plan before calibration: refuses at once what could not be exported at the end."""
    plan = _first_plan(work, given)
    o = work.options
    loading.require_trainable(work.source, work.config, work.empty_model())
    if not work.begun:
        loading.require_own_tokenizer(work.source)
    tokenizer = loading.tokenizer_folder(work.source)
    check_targets(plan.targets, work.config, Path(work.source.location), tokenizer, head=o.head)
    return plan


def _first_plan(work: Workspace, given: Plan | None) -> Plan:
    estimator = curvature.CurvatureEstimator.make(work.options.estimator)  # unknown even where nothing is measured
    if calibrates(work.options):
        require_curvature(recipe_of(work.options), estimator.primary, estimator.name)
        if widths_may_differ(work.options) and not estimator.measures_damage:
            raise ConfigError(
                f"--estimator {estimator.name} does not measure what a width costs, which a plan of several widths is "
                "made from: take gnb, fisher or kl"
            )
    if given is not None:
        nn.apply(work.empty_model(), given)  # refuses a plan of another model
        return given
    if processes.first():
        tell_unread_curvature(work.options)
    if not widths_may_differ(work.options) or work.options.sensitivity is not None:
        return _make_plan(work, work.options.sensitivity)
    if work.options.calibrate == 0:
        o = work.options
        asked = "--max-kl" if o.max_kl is not None else "--widths" if o.widths else f"--bits {o.bits:g}"
        raise ConfigError(
            f"--calibrate 0 leaves nothing to spend {asked} by; give --sensitivity FILE, or let it calibrate"
        )
    return _make_plan(work, None, alike=True)


def plan_run(work: Workspace, given: Plan | None, plan: Plan) -> Plan:
    """The run's plan: the one in its folder, the one given, or ``plan`` made again with the curvature it needs.

    Raises:
        ConfigError: the folder holds a run by another plan than the one given.
        CalibrationError, PlanError: see ``curvature.calibrate`` and ``hestia.planner.plan``.
    """
    path = work.folder / PLAN_FILE
    if work.resume and path.is_file():
        made = Plan.load(path)
        if given is not None and made.to_json() != given.to_json():
            raise ConfigError(f"{work.folder} holds a run by another plan than the one given. Choose another --out")
        return made
    if needs_curvature(work.options):
        sensitivity = _sensitivity(work, plan)
        if sensitivity is not None:
            plan = _make_plan(work, sensitivity)
    if processes.first():
        if work.options.plan is None:
            plan.save(path)
        else:
            write_bytes(path, Path(work.options.plan).read_bytes())  # as it is: run.yaml holds its digest
    return plan


def _sensitivity(work: Workspace, plan: Plan) -> curvature.Sensitivity | None:
    """The sensitivity given, found in the folder or measured now; None where calibration is switched off."""
    path, kept = work.folder / SENSITIVITY_FILE, work.folder / PARTIAL_FILE
    given = Path(work.options.sensitivity) if work.options.sensitivity else path
    if work.options.sensitivity or (work.resume and path.is_file()):
        sensitivity = curvature.Sensitivity.load(given)
    elif work.options.calibrate == 0:
        return None
    else:
        model: Any = work.load_model()
        model.to(work.device)
        paths, specs = _to_measure(work, plan)
        identity = loading.describe(work.source, work.config)
        sensitivity = work.stopwatch.measure(
            "calibrate",
            lambda: calibrate_on(model, paths, specs, work.training, work.options, identity, kept),
        )
        work.stopwatch.at_least("calibrate", sensitivity.seconds)
    if processes.first():
        sensitivity.save(path)
        kept.unlink(missing_ok=True)
    return sensitivity


def _make_plan(work: Workspace, sensitivity: str | curvature.Sensitivity | None, *, alike: bool = False) -> Plan:
    """The plan; ``alike`` takes all weights for equally sensitive, to see whether any plan meets the budget."""
    o = work.options
    model = work.empty_model()
    if not alike:
        return plan_of(model, o, sensitivity=sensitivity)
    even = {path: {width: 4.0**-width for width in recipes.GRIDS} for path in nn.select(model, o.skip).candidates}
    most = None if o.max_kl is None else math.inf
    return plan_of(model, o, sensitivity=sensitivity, damages=even, max_kl=most, allow_partial=True)


def _to_measure(work: Workspace, plan: Plan) -> tuple[list[str], dict[str, QuantSpec]]:
    """The tensors that calibration looks at, and by label every quantizer that they may get."""
    if not widths_may_differ(work.options):
        return list(plan.layers), {layer.spec.grid.name: layer.spec for layer in plan.layers.values()}
    o = work.options
    specs = candidates(recipe_of(o), o.group(), o.mix())
    return list(nn.select(work.empty_model(), o.skip).candidates), specs
