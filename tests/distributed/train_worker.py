"""Trains a toy by HestiaTrainer, one of however many processes: FOLDER [resume] [bf16] [checkpointing] [teacher]."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import toy_models
import toy_training
from safetensors.torch import save_file

import hestia
from hestia import processes
from hestia.evaluation import model_logits, shared_score
from hestia.export.frozen import save_codes
from hestia.training import Distillation, HestiaTrainer, TrainConfig


def main() -> None:
    folder, flags = Path(sys.argv[1]), set(sys.argv[2:])
    torch.set_num_threads(1)
    with processes.joined() as first:
        folder.mkdir(exist_ok=True)
        model, plan = toy_training.converted()
        config = TrainConfig(
            steps=6,
            batch_size=8,
            accumulation=2,
            learning_rate=1e-2,
            bf16="bf16" in flags,
            gradient_checkpointing="checkpointing" in flags,
            distill=Distillation() if "teacher" in flags else None,
            log_every=1,
            eval_every=3,
            eval_blocks=7,
            save_every=3,
        )
        trainer = HestiaTrainer(
            model,
            plan=plan,
            config=config,
            train=toy_training.blocks(48),
            tuning=toy_training.blocks(7, seed=5),
            folder=folder,
            teacher=toy_models.llama() if "teacher" in flags else None,
        )
        resume = folder / "checkpoints" / "step-000003" if "resume" in flags else None
        trainer.fit(resume)
        found = shared_score(
            model_logits(model), toy_training.blocks(7, seed=6), parent=model_logits(toy_models.llama())
        )
        print(json.dumps(found.to_json()))
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        codes = hestia.freeze(model)
        if first:
            save_file(weights, folder / "weights.safetensors")
            save_codes(folder / "codes.safetensors", codes)


if __name__ == "__main__":
    main()
