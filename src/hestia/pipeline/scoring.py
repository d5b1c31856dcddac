"""The honest table: parent, round-to-nearest and the frozen model on the same held-out blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PreTrainedModel

from .. import loading, nn, processes, recipes
from ..data import Blocks
from ..evaluation import Score, model_logits, over_blocks, shared_score
from ..evaluation.diagnostics import continuations
from ..export.frozen import MODEL_FOLDER
from ..files import read_json, write_json
from ..plans import Plan
from ..quant import STE, AbsMean, QuantSpec
from ..resources import release
from .artefacts import DIAGNOSTICS_FILE, SCORES_FILE
from .workspace import Workspace


def score_run(work: Workspace, plan: Plan, reference: dict[str, Any] | None = None) -> dict[str, Any]:
    """Parent, round-to-nearest and frozen model on the same held-out blocks; nothing on any process but the first."""
    path = work.folder / SCORES_FILE
    if work.resume and path.is_file():
        return read_json(path)
    release()  # the trainer
    blocks = work.scored
    parent: Any = work.load_model()
    parent.to(work.device)
    if reference is None:
        of_parent = _numbers(shared_score(model_logits(parent), blocks, description="scoring the parent"))
        rounded = nn.apply(work.load_model(), round_to_nearest_twin(plan)).to(work.device)
        of_rounded = _numbers(_score_against(parent, rounded, blocks, "scoring round-to-nearest"))
        del rounded
    else:
        of_parent, of_rounded = reference["parent"], reference["round_to_nearest"]
    frozen: Any = loading.load_model(loading.Source(str(work.folder), str(work.folder / MODEL_FOLDER)))
    frozen.to(work.device)
    of_frozen = _numbers(_score_against(parent, frozen, blocks, "scoring the frozen model"))
    if not processes.first():
        return {}
    ours, theirs = of_frozen["block_nll"], of_rounded["block_nll"]
    tokens = of_frozen["block_tokens"]
    interval = over_blocks(ours, theirs, tokens).to_json() if len(ours) > 1 else None
    diagnostics = read_json(work.folder / DIAGNOSTICS_FILE)
    diagnostics["samples"] = continuations(parent, frozen, work.tokenizer, blocks)
    write_json(work.folder / DIAGNOSTICS_FILE, diagnostics)
    record = {
        "parent": of_parent,
        "round_to_nearest": of_rounded,
        "quantized": of_frozen,
        "quantized_minus_round_to_nearest": interval,
        "blocks": len(blocks),
    }
    write_json(path, record)
    return record


def round_to_nearest_twin(plan: Plan) -> Plan:
    """The plan that rounds the same tensors to the same levels and groups, without training, shift or constraint."""
    recipe = recipes.get("round_to_nearest")
    scales = {grid.values: recipe.spec_for(bits, "row").scale for bits, grid in recipes.GRIDS.items()}

    def rounded(spec: QuantSpec) -> QuantSpec:
        return QuantSpec(
            grid=dataclasses.replace(spec.grid, block=0),
            group_size=spec.group_size,
            scale=scales.get(spec.grid.values) or AbsMean(),
            estimator=STE(),
        )

    layers = {
        path: dataclasses.replace(layer, spec=rounded(layer.spec), temperature_factor=1.0)
        for path, layer in plan.layers.items()
    }
    return dataclasses.replace(
        plan, recipe=recipe.to_json(), trains=False, schedule=recipe.schedule(), layers=layers, correction=None
    )


def _score_against(parent: PreTrainedModel, model: Any, blocks: Blocks, description: str) -> Score:
    return shared_score(model_logits(model), blocks, parent=model_logits(parent), description=description)


def _numbers(result: Score) -> dict[str, Any]:
    """A score as scores.json keeps it: the means, and every block's NLL and tokens for paired comparisons."""
    counted = result.block_tokens > 0
    blocks = {"block_nll": result.block_nll[counted].tolist(), "block_tokens": result.block_tokens[counted].tolist()}
    return {**result.to_json(), **blocks}
