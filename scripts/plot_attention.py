#!/usr/bin/env python3
"""Draw which tokens attend to which, head by head: in an IHA layer each head has P x P patterns, one for each pair of
a query's and a key's pseudo-head, beside the one pattern of a head in an MHA layer.

Runs `train_iha attention` on a checkpoint, and draws what it writes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from errors import UserError

EXAMPLES = """\
examples:
  scripts/plot_attention.py runs/quickstart --prompt 'And God said, Let there be light'
  scripts/plot_attention.py runs/iha --layer 2 --beside runs/mha --prompt-file text.txt --out heads.png
"""

BINARY = Path(__file__).resolve().parent.parent / "train_iha"
INK, GREY = "#222222", "#6b6b6b"
MAX_LABELS = 64  # tokens whose text is written on the axes


class Layer:
    """The weights [H,P,P,T,T] of a layer, the text of each token, and a name."""

    def __init__(self, checkpoint, layer, prompt):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "attention.safetensors"
            run = subprocess.run([os.environ.get("TRAIN_IHA", BINARY), "attention", checkpoint, "--layer", str(layer),
                                  "--out", path, *prompt], capture_output=True, text=True)
            if run.returncode:
                raise UserError(run.stderr.strip().splitlines()[-1].removeprefix("train_iha: "))
            tensors = load_file(path)
        self.weights = tensors["weights"]
        ends = tensors["text_ends"]
        text, starts = tensors["text"].tobytes(), np.append(0, ends[:-1])
        self.texts = [text[a:b].decode(errors="replace") or str(id) for a, b, id in
                      zip(starts, ends, tensors["tokens"])]
        self.name = f"layer {layer}, {layer_types(checkpoint)[layer]}"


def layer_types(checkpoint):
    """The types in the checkpoint's config.json; checkpoint may be a run's folder, whose newest is taken."""
    path = Path(checkpoint)
    if not (path / "config.json").exists():
        found = sorted(path.glob("step_????????/config.json"))
        if not found:
            raise UserError(f"{checkpoint}: no checkpoint there")
        path = found[-1].parent
    return json.loads((path / "config.json").read_text())["layer_types"]


def first(types, kind):
    """The first layer of a kind, or None."""
    return next((i for i, name in enumerate(types) if name.startswith(kind)), None)


def printable(text):
    return text.replace(" ", "·").replace("\n", "↵").replace("\t", "⇥")


# ------------------------------------------------------------------------------------------ drawing


def draw_panel(axis, weights, texts, norm, labels):
    image = axis.imshow(weights, cmap="Blues", norm=norm, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_color("#cccccc")
    if labels and len(texts) <= MAX_LABELS:
        axis.set_yticks(range(len(texts)), [printable(text) for text in texts], fontsize=5, color=GREY)
        axis.tick_params(length=0, pad=1)
    return image


def draw(layers, out):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import PowerNorm

    heads = max(len(layer.weights) for layer in layers)
    columns = [(layer, p, q) for layer in layers for p in range(layer.weights.shape[1])
               for q in range(layer.weights.shape[1])]
    norm = PowerNorm(0.5, 0, 1)  # the square root of a weight: small ones show
    side = 1.5
    figure, axes = plt.subplots(heads, len(columns), squeeze=False, figsize=(side * len(columns) + 1.4, side * heads + 1),
                                layout="constrained")
    for column, (layer, p, q) in enumerate(columns):
        P = layer.weights.shape[1]
        for head in range(heads):
            axis = axes[head][column]
            if head >= len(layer.weights):
                axis.axis("off")
                continue
            image = draw_panel(axis, layer.weights[head, p, q], layer.texts, norm, column == 0)
            if column == 0:
                axis.set_ylabel(f"head {head}", color=INK, fontsize=8)
            if head == 0:
                axis.set_title((f"{layer.name}\n" if p == q == 0 else "\n") +
                               (f"query {p}, key {q}" if P > 1 else "all"), fontsize=8, color=INK, loc="left")
    bar = figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01)
    bar.set_label("attention weight", color=GREY, fontsize=8)
    bar.ax.tick_params(labelsize=7, colors=GREY)
    bar.outline.set_visible(False)
    figure.supylabel("query token", color=GREY, fontsize=8)
    figure.supxlabel("key token", color=GREY, fontsize=8)
    figure.savefig(out, dpi=160)
    plt.close(figure)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a step_... directory, or a run's, whose newest is taken")
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--prompt", metavar="TEXT")
    text.add_argument("--prompt-file", metavar="FILE")
    parser.add_argument("--layer", type=int, metavar="N", help="default: the first IHA layer")
    parser.add_argument("--beside", metavar="CHECKPOINT", help="of which an MHA layer is drawn too (default: the same)")
    parser.add_argument("--beside-layer", type=int, metavar="N", help="default: its first MHA layer")
    parser.add_argument("--out", default="attention.png", metavar="FILE", help="default: attention.png; svg, pdf too")
    parser.error = lambda message: sys.exit((print(f"plot_attention.py: {message}", file=sys.stderr), 2)[1])
    return parser.parse_args(arguments)


def run(options):
    prompt = ["--prompt", options.prompt] if options.prompt is not None else ["--prompt-file", options.prompt_file]
    layer = options.layer if options.layer is not None else first(layer_types(options.checkpoint), "iha") or 0
    layers = [Layer(options.checkpoint, layer, prompt)]
    beside = options.beside or options.checkpoint
    other = options.beside_layer if options.beside_layer is not None else first(layer_types(beside), "mha")
    if other is not None and (beside, other) != (options.checkpoint, layer):
        layers.append(Layer(beside, other, prompt))
    draw(layers, options.out)
    print(f"{options.out}: {', '.join(layer.name for layer in layers)}; {len(layers[0].texts)} tokens")


def main():
    options = parse(sys.argv[1:])
    try:
        run(options)
    except UserError as error:
        print(f"plot_attention.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"plot_attention.py: {error.filename}: {error.strerror}" if error.filename else
              f"plot_attention.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
