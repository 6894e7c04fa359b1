"""Muon beside AdamW, on the quickstart's model and on one five times larger.

    .venv/bin/python scripts/reproduce/main.py --experiments scripts/reproduce/optimizers.py \\
        --out runs/optimizers --docs docs/reproduction/optimizers

Each optimizer has the best of its learning rates. Muon trains once for as many steps as AdamW (the larger model: one seed of
that), and once for two thirds of them, on the same schedule compressed, to be compared with AdamW's final loss.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from experiments import LANGUAGE, Experiment, Variant  # noqa: E402

MUON = "train.optimizer=muon"


def optimizers(name, title, steps, size, adamw_rates, muon_rates, whole=0):
    return Experiment(
        name=name, title=title, config="configs/quickstart.ini", data=LANGUAGE.data,
        variants={
            "adamw": Variant("AdamW", ("train.optimizer=adamw",), learning_rates=adamw_rates),
            "muon": Variant("Muon", (MUON,), seeds=whole, learning_rates=muon_rates),
            "muon_short": Variant("Muon, 2/3 of the steps", (MUON, f"train.steps={round(steps * 2 / 3)}"), rate_of="muon"),
        },
        figure="val_loss", seeds=4, quick=("train.steps=60", "run.eval_every=20"), not_quick=("muon_short",),
        overrides=(f"train.steps={steps}", "run.eval_batches=40", "run.eval_every=50", "run.sample_every=0", *size))


EXPERIMENTS = {each.name: each for each in (
    optimizers("4m", "Optimizers, 4M parameters", 500, (), (7.5e-4, 1.5e-3, 3e-3, 6e-3), (3e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2)),
    optimizers("20m", "Optimizers, 20M parameters", 240,
               ("model.hidden_size=512", "model.intermediate_size=2048", "model.num_hidden_layers=6",
                "model.num_attention_heads=8"), (7.5e-4, 1.5e-3, 3e-3), (6e-3, 1.2e-2, 2.4e-2), whole=1),
)}
