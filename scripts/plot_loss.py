#!/usr/bin/env python3
"""Draw the loss curves of one or several runs from their metrics.jsonl.

Training loss is a thin pale line as logged, and a strong line smoothed; validation loss has markers. Incomplete runs
are drawn up to their last complete line.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np

from errors import UserError
from run_files import names_of, rows_of, step_of
from run_files import number as finite_number

EXAMPLES = """\
examples:
  scripts/plot_loss.py runs/bible
  scripts/plot_loss.py runs/iha runs/mha --out iha-vs-mha.png
  scripts/plot_loss.py runs/iha runs/mha --x time --bytes --out clock.svg
  scripts/plot_loss.py runs/gpt2 --bytes 4.35
"""

# Okabe and Ito's palette, which colour-blind readers can tell apart; the strongest first
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
MARKERS = "osD^vPX"
INK, GREY = "#222222", "#6b6b6b"


class Run:
    """One run: steps, losses (NaN where not finite) and x of its training steps; losses and x of its evaluations."""

    def __init__(self, path, x):
        path = Path(path)
        self.file = path / "metrics.jsonl" if path.is_dir() else path
        self.folder = self.file.resolve().parent
        train, val = read_metrics(self.file)
        self.steps = np.array(sorted(train), dtype=float)
        self.loss = np.array([number(train[step].get("loss")) for step in sorted(train)])
        self.x = self.axis([train[step] for step in sorted(train)], x)
        self.val = np.array([number(val[step]) for step in sorted(val)])
        # an evaluation's line has only its step: its x is that of the training step
        self.val_x = np.interp(sorted(val), np.append(0, self.steps), np.append(0, self.x)) if len(train) else \
            np.array(sorted(val), dtype=float) * (1 if x == "step" else math.nan)

    def axis(self, rows, x):
        if x == "step":
            return self.steps
        tokens = np.array([number(row.get("tokens")) for row in rows])
        if len(rows) and np.isnan(tokens).all():
            raise UserError(f'{self.file}: its lines have no "tokens"; use --x step')
        if x == "tokens":
            return tokens
        speed = np.array([number(row.get("tokens_per_second")) for row in rows])
        seconds = np.diff(tokens, prepend=0) / np.where(speed > 0, speed, np.nan)
        return np.cumsum(np.nan_to_num(seconds))

    def has_points(self):
        return bool(np.isfinite(self.loss).any() or np.isfinite(self.val * self.val_x).any())


def number(value):
    """A finite float, or NaN."""
    value = finite_number(value)
    return math.nan if value is None else value


def read_metrics(path):
    """({step: line}, {step: val_loss}). Of two lines of a step the later counts."""
    train, val = {}, {}
    for row in rows_of(path):
        step = step_of(row)
        if step is not None and "val_loss" in row:
            val[step] = row["val_loss"]
        elif step is not None and "loss" in row:
            train[step] = row
    return train, val


def smooth(values, window):
    """Two centred moving averages: a single one turns each spike into a plateau."""
    return moving_average(moving_average(values, window), window // 2)


def moving_average(values, window):
    """Mean over the finite values in a window. At the start the window shrinks, so that the fall from the initial loss
    stays sharp; at the end it is cut off on one side only, so that the last points do not swing."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0], np.cumsum(np.where(finite, values, 0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    half = np.minimum(window // 2, index)
    low, high = index - half, np.minimum(index + half + 1, len(values))
    total = counts[high] - counts[low]
    mean = (sums[high] - sums[low]) / np.maximum(total, 1)
    return np.where(finite & (total > 0), mean, np.nan)


# ------------------------------------------------------------------------------------------- drawing


def quantity(value, _=None):
    """1500 -> 1.5K, 2000000 -> 2M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{name}"
    return f"{value:.4g}"


def clock(longest):
    """Unit for times up to `longest` seconds: (seconds, name)."""
    return (3600, "hours") if longest >= 2 * 3600 else (60, "minutes") if longest >= 120 else (1, "seconds")


def loss_range(runs, curves):
    """Limits of the loss axis: the smoothed curves and the evaluations fit in. Single spikes may be cut off, and so may
    the fall of the first tenth from the initial loss, where it would leave little room for the rest."""
    values = np.concatenate([np.append(curve, run.val) for run, curve in zip(runs, curves)])
    values = values[np.isfinite(values)]
    raw = [np.nanpercentile(run.loss, 0.5) for run in runs if np.isfinite(run.loss).any()]
    low, high = min([values.min(), *raw]), values.max()
    later = np.concatenate([np.append(curve[len(curve) // 10:], run.val[len(run.val) // 10:])
                            for run, curve in zip(runs, curves)])
    high = min(high, low + 1.4 * (np.nanmax(later) - low)) if np.isfinite(later).any() else high
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 1
    return low - pad, high + pad


def style(plt):
    plt.rcParams.update({
        "font.size": 11, "axes.edgecolor": GREY, "axes.labelcolor": INK, "text.color": INK, "xtick.color": GREY,
        "ytick.color": GREY, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "axes.grid": True,
        "grid.color": "#e4e4e4", "grid.linewidth": 0.8, "axes.axisbelow": True, "axes.spines.top": False,
        "svg.fonttype": "none"})


def draw(plt, options, runs):
    style(plt)
    figure, axes = plt.subplots(figsize=(8.6, 4.6), layout="constrained")
    scale, label = 1, {"step": "optimizer step", "tokens": "training tokens"}.get(options.x)
    if options.x == "time":
        scale, unit = clock(max((np.nanmax(run.x) for run in runs if len(run.x)), default=0))
        label = f"training time ({unit}, without evaluation and saving)"
    curves = [smooth(run.loss, max(1, len(run.loss) // 40)) for run in runs]
    for i, (run, curve, name) in enumerate(zip(runs, curves, names_of([run.folder for run in runs]))):
        draw_run(axes, run, curve, name, COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)], scale)
    axes.set_ylim(*loss_range(runs, curves))
    axes.margins(x=0.02)
    axes.set_xlabel(label)
    axes.set_ylabel("loss (nats per token)")
    axes.xaxis.set_major_formatter(quantity if options.x != "time" else "{x:g}")
    if options.bytes:
        factor = math.log(2) * options.bytes
        right = axes.secondary_yaxis("right", functions=(lambda y: y / factor, lambda y: y * factor))
        right.set_ylabel("bits per byte")
    else:
        axes.spines["right"].set_visible(False)
    axes.set_title(options.title or (names_of([run.folder for run in runs])[0] if len(runs) == 1 else "Loss"), loc="left", fontsize=14,
                   fontweight="bold", pad=24)
    axes.text(0, 1.02, what_is_drawn(runs), transform=axes.transAxes, va="bottom", color=GREY, fontsize=10)
    axes.legend(frameon=False, loc="upper right", handlelength=2.4)
    return figure


def draw_run(axes, run, curve, name, colour, marker, scale):
    single = np.isfinite(run.loss).sum() == 1
    axes.plot(run.x / scale, run.loss, color=colour, linewidth=0.7, alpha=1 if single else 0.28,
              marker="." if single else None, markersize=12, zorder=1)
    # about twenty markers at most
    every = max(1, math.ceil(len(run.val) / 20))
    line, = axes.plot(run.x / scale, curve, color=colour, linewidth=1.9, label=name)
    finite = run.val[np.isfinite(run.val)]
    if len(finite):
        axes.plot(run.val_x / scale, run.val, color=colour, linewidth=1, linestyle=(0, (1, 2)), marker=marker,
                  markevery=slice((len(run.val) - 1) % every, None, every), markersize=6,
                  markerfacecolor="white", markeredgecolor=colour, markeredgewidth=1.5, zorder=3)
        line.set_label(f"{name}   val {finite[-1]:.4f}")
        line.set_marker(marker)
        line.set_markevery([])  # the legend shows the marker, the line itself does not
        line.set_markerfacecolor("white")
        line.set_markeredgewidth(1.5)


def what_is_drawn(runs):
    parts = []
    if any(np.isfinite(run.loss).any() for run in runs):
        parts.append("training loss: line, smoothed (pale: as logged)")
    if any(np.isfinite(run.val).any() for run in runs):
        parts.append("validation loss: markers")
    return ";  ".join(parts)


def save(figure, out):
    """A PNG with a palette takes a third of the space."""
    figure.savefig(out, dpi=125)
    if out.suffix.lower() == ".png":
        from PIL import Image  # comes with matplotlib
        with Image.open(out) as picture:
            small = picture.convert("RGB").quantize(64)
        small.save(out, optimize=True)


# ---------------------------------------------------------------------------------------------- main


def parse():
    parser = argparse.ArgumentParser(prog="plot_loss.py", description=__doc__, epilog=EXAMPLES, add_help=False,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise UserError(message)

    parser.error = fail
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its metrics.jsonl")
    parser.add_argument("--out", metavar="FILE", help=".png, .svg or .pdf (default for one run: RUN/curve.png)")
    parser.add_argument("--x", choices=("tokens", "step", "time"), default="tokens", help="horizontal axis (default: tokens)")
    parser.add_argument("--bytes", nargs="?", type=float, const=1.0, metavar="N",
                        help="a second axis in bits per byte, at N bytes per token (default: 1, the byte tokenizer); "
                             "give it after the runs")
    parser.add_argument("--title", metavar="TEXT", help="default: the name of a single run")
    parser.add_argument("--help", action="help", help="show this and stop")
    options = parser.parse_args()
    if options.bytes is not None and not options.bytes > 0:
        raise UserError(f"--bytes {options.bytes}: must be above 0")
    if options.out is None and len(options.runs) > 1:
        raise UserError("several runs: give the file to write: --out FILE.png")
    return options


def plot():
    options = parse()
    runs = [Run(path, options.x) for path in options.runs]
    for run in runs:
        if not run.has_points():
            print(f"plot_loss.py: {run.file}: contains no loss", file=sys.stderr)
    runs = [run for run in runs if run.has_points()]
    if not runs:
        raise UserError("no run has a loss to draw")
    try:
        import matplotlib
    except ImportError:
        raise UserError("needs matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    out = Path(options.out) if options.out else runs[0].folder / "curve.png"
    try:
        save(draw(plt, options, runs), out)
    except ValueError as error:  # a suffix that matplotlib does not know
        raise UserError(f"{out}: {str(error).splitlines()[0]}") from None
    print(out)


def main():
    try:
        plot()
    except UserError as error:
        print(f"plot_loss.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"plot_loss.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
