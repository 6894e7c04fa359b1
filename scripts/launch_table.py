#!/usr/bin/env python3
"""Print the second table of docs/estimate.md: what a training step of five models moves and computes on one H200.

  scripts/launch_table.py [BINARY]      default ./train_iha

The counts are those of `train_iha info CONFIG --gpus 1 --launches`, which lists every kernel."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GPT2 = ["train.micro_batch=128", "train.batch_tokens=131072"]
MODELS = [
    ("GPT-2 124M, MHA", "gpt2_124m.ini", GPT2),
    ("GPT-2 124M, IHA P = 2", "iha_gpt2_124m.ini", GPT2),
    ("GPT-2 124M, IHA P = 4", "iha_gpt2_124m.ini", [*GPT2, "model.num_pseudo_heads=4"]),
    ("2.4B, IHA P = 4", "paper/2.4b_iha.ini", ["train.batch_tokens=8192", "model.num_pseudo_heads=4"]),
    ("2.4B, IHA P = 20", "paper/2.4b_iha.ini", ["train.batch_tokens=8192", "model.num_pseudo_heads=20"]),
]
LAYER = re.compile(r"^(\w+): \d+ layers?$.*?^  layer \d+, a pass: ([\d.]+) u outside .*?, ([\d.]+) u in attention", re.M | re.S)


def info(binary, config, *args):
    command = [binary, "info", str(ROOT / "configs" / config), "--gpus", "1", *args]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def row(binary, name, config, args):
    launches, estimate = info(binary, config, "--launches", *args), info(binary, config, *args)
    layers = {kind[:3]: (float(other), float(attention)) for kind, other, attention in LAYER.findall(launches)}

    def units(which):
        return " and ".join(f"{layers[kind][which]:g}" for kind in ("iha", "mha") if kind in layers)

    kernels, size, flops, floor = re.search(r"^  all +(\d+) +([\d.]+) +([\d.]+) +([\d.]+)$", launches, re.M).groups()
    others = re.search(r"^  all else in layers +\d+ +([\d.]+)", launches, re.M)[1]
    step = re.search(r"^  step +([\d.]+) ms", estimate, re.M)[1]
    memory = re.search(r"^Memory for training .*: ([\d.]+) GB$", estimate, re.M)[1]
    return (f"| {name} | {units(0)} | {units(1)} | {float(others):.1f} | {float(size):.1f} | {float(flops):.1f} "
            f"| {kernels} | {floor} | {step} | {memory} |")


def main():
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    binary = sys.argv[1] if len(sys.argv) > 1 else "./train_iha"
    if not Path(binary).exists():
        print(f"launch_table: {binary} is not built; run: make", file=sys.stderr)
        sys.exit(2)
    print("| model | u of a layer without products and attention (IHA and MHA) | u of attention | the same, of all layers, GB "
          "| everything, GB | TFLOP | kernels | floor, ms | `info`'s step, ms | memory, GB |")
    print("|---" * 10 + "|")
    for model in MODELS:
        print(row(binary, *model))


if __name__ == "__main__":
    main()
