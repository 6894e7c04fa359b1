"""The figures of `make reproduce`, each with its data as CSV."""

import csv
import json
import statistics
from pathlib import Path

from runs import flops_per_token

# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = ["#000000", "#0072B2", "#56B4E9", "#009E73", "#D55E00", "#E69F00", "#CC79A7", "#8a8a8a"]
NAMES = {"val_accuracy": "accuracy", "val_exact": "share of values found", "val_loss": "validation loss (nats per byte)"}


def setup():
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True,
                         "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"})
    return plt


def finished(plan, budget):
    """{variant: [(run, result), ...]} of what is there, variants without a result left out."""
    found = {}
    for name in plan.names:
        for seed in range(1, plan.seeds[name] + 1):
            run = plan.compared(name, seed, budget)
            result = run and run.result()
            if result and all(str(length) in result.get("test_by_length", {}) for length in plan.experiment.lengths):
                found.setdefault(name, []).append((run, result))
    return found


def final(result, figure, length=None):
    """The figure of a run that is compared: on the test set (of a length) where there is one, of the last evaluation
    otherwise."""
    test = result["test_by_length"][str(length)] if length else result.get("test", {})
    return test[figure] if figure in test else result["final"][figure]


def spread(values):
    """Mean and standard deviation of a sample; None for one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def tokens_of_epoch(plan):
    """Of the data, or where it is not there, from a run of as many epochs as the experiment says."""
    try:
        description = json.loads((Path(next(iter(plan.experiment.data))) / "dataset.json").read_text())
    except FileNotFoundError:
        epochs = next(int(item.split("=")[1]) for item in plan.common if item.startswith("train.epochs="))
        return max(result["tokens"] for runs in finished(plan, "plain").values() for _, result in runs) / epochs
    return sum(shard["tokens"] for name, shard in description["shards"].items() if name.startswith("train_"))


def colour(plan, name):
    return COLOURS[list(plan.experiment.variants).index(name) % len(COLOURS)]


def write_csv(path, header, rows):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([[f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in rows])


def save(plt, figure, out, name):
    figure.savefig(out / f"{name}.png", dpi=120)
    plt.close(figure)
    return f"{name}.png"


def curves(plt, plan, budget, axis, out):
    """A line for each seed, a thick one for their mean where all have the same steps. axis: (name, label, function of
    variant, step, tokens and result)."""
    name, label, position = axis
    experiment, rows = plan.experiment, []
    figure, axes = plt.subplots(figsize=(7.2, 4.3), layout="constrained")
    for variant, runs in finished(plan, budget).items():
        series = []
        for run, result in runs:
            points = [(position(variant, step, tokens, result), values[experiment.figure])
                      for step, tokens, values in result["curve"] if values.get(experiment.figure) is not None]
            rows += [[variant, run.seed, x, y] for x, y in points]
            series.append(points)
            axes.plot(*zip(*points), color=colour(plan, variant), linewidth=0.7, alpha=0.35 if len(runs) > 1 else 1)
        length = min(map(len, series))
        mean = [(statistics.mean(s[i][0] for s in series), statistics.mean(s[i][1] for s in series)) for i in range(length)]
        axes.plot(*zip(*mean), color=colour(plan, variant), linewidth=2,
                  label=f"{experiment.variants[variant].label} ({len(runs)} seed{'s' if len(runs) > 1 else ''})")
    if not rows:
        plt.close(figure)
        return None
    axes.set_xlabel(label)
    axes.set_ylabel(("" if experiment.figure == "val_loss" else "validation ") + NAMES[experiment.figure])
    if experiment.figure == "val_loss":
        late = sorted(row[3] for row in rows)
        axes.set_ylim(late[0] - 0.02, late[int(0.8 * (len(late) - 1))] + 0.05)
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(experiment.title, loc="left", fontweight="bold")
    stem = f"{experiment.name}_curves" if budget == "plain" else f"{experiment.name}_{budget}_{name}"
    write_csv(out / f"{stem}.csv", ["variant", "seed", name, experiment.figure], rows)
    return save(plt, figure, out, stem)


def continued(plt, plan, out):
    """Loss of runs that continue others: of both halves by tokens, of the second by FLOPs, and minus the first variant's of
    the same seed."""
    experiment, rows = plan.experiment, []
    found = finished(plan, "plain")
    if not found:
        return None
    figure, panels = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    starts = {run.seed: run for runs in found.values() for run in (plan.start(run.seed) for run, _ in runs)}
    first_flops = flops_per_token(experiment.config, next(iter(starts.values())).overrides)

    def points_of(variant, run, flops, tokens_before=0):
        """(tokens, FLOPs, loss) of evaluations, with those of the first half."""
        points = [(tokens_before + tokens, tokens_before * first_flops + tokens * flops, values["val_loss"])
                  for _, tokens, values in run.result()["curve"]]
        rows.extend([variant, run.seed, *point] for point in points)
        return points

    def draw_mean(axes, series, style, label):
        for points in series:
            axes.plot(*zip(*points), linewidth=0.6, alpha=0.3, **style)
        length = min(map(len, series))
        mean = [[statistics.mean(points[i][k] for points in series) for k in (0, 1)] for i in range(length)]
        axes.plot(*zip(*mean), linewidth=1.8, label=label, **style)

    halves = [points_of("start", run, first_flops) for run in starts.values()]
    draw_mean(panels[0], [[(x, loss) for x, _, loss in points] for points in halves], {"color": "#8a8a8a"}, "first half")
    compared = {}  # of the first variant: {(seed, tokens): loss}
    for variant, runs in found.items():
        label = f"{experiment.variants[variant].label} ({len(runs)} seed{'s' if len(runs) > 1 else ''})"
        style = {"color": colour(plan, variant), "linestyle": "--" if experiment.variants[variant].flops_of else "-"}
        series = {run.seed: points_of(variant, run, plan.flops[variant], starts[run.seed].result()["tokens"]) for run, _ in runs}
        for k in (0, 1):
            draw_mean(panels[k], [[(point[k], point[2]) for point in points] for points in series.values()], style, label)
        if variant == plan.names[0]:
            compared = {(seed, x): loss for seed, points in series.items() for x, _, loss in points}
        less = [[(x, loss - compared[seed, x]) for x, _, loss in points if (seed, x) in compared] for seed, points in series.items()]
        less = [points for points in less if points]
        if not experiment.variants[variant].flops_of and less:
            draw_mean(panels[2], less, style, label)
    late = sorted(row[4] for row in rows if row[0] != "start")
    panels[0].set_ylim(late[0] - 0.05, late[-1] + 0.8)
    panels[1].set_ylim(late[0] - 0.02, late[int(0.95 * (len(late) - 1))] + 0.02)
    for axes, x, y in zip(panels, ("training tokens", "FLOPs of both halves, as executed", "training tokens"),
                          (NAMES["val_loss"], "", f"minus {experiment.variants[plan.names[0]].label} of the same seed")):
        axes.set_xlabel(x)
        axes.set_ylabel(y)
    panels[0].legend(frameon=False, fontsize=8)
    panels[0].set_title(experiment.title, loc="left", fontsize=10, fontweight="bold")
    write_csv(out / f"{experiment.name}.csv", ["variant", "seed", "tokens", "flops", "val_loss"], rows)
    return save(plt, figure, out, experiment.name)


def bars(plt, plans, out):
    """Final test accuracy of the compositions, with a point for each seed."""
    panels = [(plan, finished(plan, "plain")) for plan in plans]
    panels = [(plan, found) for plan, found in panels if found]
    if not panels:
        return None
    rows = []
    figure, all_axes = plt.subplots(1, len(panels), figsize=(1 + 4.2 * len(panels), 4), layout="constrained", squeeze=False)
    for axes, (plan, found) in zip(all_axes[0], panels):
        low = 1.0
        for i, (variant, runs) in enumerate(found.items()):
            values = [final(result, plan.experiment.figure) for _, result in runs]
            rows += [[plan.experiment.name, variant, run.seed, value] for (run, _), value in zip(runs, values)]
            axes.bar(i, statistics.mean(values), color=colour(plan, variant), alpha=0.75)
            axes.plot([i] * len(values), values, "o", color="black", markersize=3)
            low = min([low, *values])
        axes.set_xticks(range(len(found)), [plan.experiment.variants[v].label for v in found], rotation=40, ha="right")
        axes.set_ylim(max(0, low - 0.05), 1)
        axes.set_ylabel("test accuracy (axis does not begin at 0)")
        axes.set_title(plan.experiment.title, loc="left", fontsize=10, fontweight="bold")
    write_csv(out / "final_accuracy.csv", ["task", "variant", "seed", "test_accuracy"], rows)
    return save(plt, figure, out, "final_accuracy")


def by_length(plt, plan, out):
    """The figure on the test sets by their length, with a point for each seed."""
    experiment, rows = plan.experiment, []
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for variant, runs in finished(plan, "plain").items():
        values = [[final(result, experiment.figure, length) for _, result in runs] for length in experiment.lengths]
        for length, each in zip(experiment.lengths, values):
            rows += [[variant, run.seed, length, value] for (run, _), value in zip(runs, each)]
            axes.plot([length] * len(each), each, "o", color=colour(plan, variant), markersize=3)
        axes.plot(experiment.lengths, [statistics.mean(each) for each in values], color=colour(plan, variant), linewidth=2,
                  label=f"{experiment.variants[variant].label} ({len(runs)} seed{'s' if len(runs) > 1 else ''})")
    if not rows:
        plt.close(figure)
        return None
    axes.set_xscale("log", base=2)
    axes.set_xticks(experiment.lengths, [str(length) for length in experiment.lengths])
    axes.minorticks_off()
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel(f"{NAMES[experiment.figure]}, test set")
    axes.set_ylim(-0.02, 1.02)
    axes.legend(frameon=False)
    axes.set_title(experiment.title, loc="left", fontweight="bold")
    write_csv(out / f"{experiment.name}_by_length.csv", ["variant", "seed", "length", experiment.figure], rows)
    return save(plt, figure, out, f"{experiment.name}_by_length")


def draw(plans, out):
    """[(file, what it shows)] of the figures that there is data for."""
    plt = setup()
    out.mkdir(parents=True, exist_ok=True)
    drawn = []

    def add(picture, text):
        if picture:
            drawn.append((picture, text))

    compositions = [plan for plan in plans if plan.experiment.figure == "val_accuracy"]
    add(bars(plt, compositions, out), "final accuracy on the test set (the paper's Fig. 3)")
    for plan in (plan for plan in compositions if finished(plan, "plain")):
        epoch = tokens_of_epoch(plan)
        axis = ("epochs", "epochs", lambda variant, step, tokens, result: tokens / epoch)
        add(curves(plt, plan, "plain", axis, out), "accuracy by epoch (the paper's Figs. 4 and 5)")
    for plan in (plan for plan in plans if plan.experiment.figure == "val_loss" and not plan.experiment.flops_of
                 and not plan.experiment.start):
        axis = ("steps", "steps", lambda variant, step, tokens, result: step)
        add(curves(plt, plan, "plain", axis, out), "loss by steps")
    for plan in (plan for plan in plans if plan.experiment.flops_of):
        seconds = plan.step_seconds()

        def time_of(variant, step, tokens, result):
            return step * (seconds[variant] if seconds else result["seconds"] / result["steps"])

        for name, label, position in (
                ("tokens", "training tokens", lambda variant, step, tokens, result: tokens),
                ("flops", "training FLOPs, as executed", lambda variant, step, tokens, result: tokens * plan.flops[variant]),
                ("seconds", "seconds of training", time_of)):
            add(curves(plt, plan, "flops", (name, label, position), out), f"loss by {name}, budgets of equal FLOPs")
        add(curves(plt, plan, "time", ("seconds", "seconds of training", time_of), out),
            "loss by time, budgets of equal time")
    for plan in (plan for plan in plans if plan.experiment.start):
        add(continued(plt, plan, out), "loss of both halves by tokens, of the second by FLOPs, and minus the first variant's")
    for plan in (plan for plan in plans if plan.experiment.lengths):
        axis = ("tokens", "training tokens", lambda variant, step, tokens, result: tokens)
        add(curves(plt, plan, "plain", axis, out), "values found by tokens, at the longest length of training")
        add(by_length(plt, plan, out), "values found by length")
    return drawn
