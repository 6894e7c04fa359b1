"""docs/reproduction/results.md: a table of what the paper says and what came out, and the figures."""

from figures import NAMES, draw, final, finished, spread

HEAD = """\
# Results

Written by `{command}`; do not edit. What the experiments are, what the paper leaves open, and what these results do
and do not show: [discussion]({discussion}).

"""


def number(value, figure):
    return f"{value:.4f}" if figure == "val_loss" else f"{100 * value:.2f} %"


def table(plan, budget, length):
    """Lines of Markdown: a row for each variant that has results. length: of the test set, None where there is but one."""
    figure, lines = plan.experiment.figure, []
    for variant, runs in finished(plan, budget).items():
        mean, deviation = spread([final(result, figure, length) for _, result in runs])
        steps = sorted({result["steps"] for _, result in runs})
        lines.append(" | ".join([
            f"| {plan.experiment.variants[variant].label}", plan.experiment.paper.get(variant, "–"), number(mean, figure),
            number(deviation, figure).replace(" %", " points") if deviation is not None else "–", str(len(runs)),
            f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}",
            f"{sum(result['seconds'] for _, result in runs) / 3600:.2f} |"]))
    return lines


def differences(plan, budget):
    """Lines of Markdown: what each variant has more than the first of the same seed, of which there may be fewer."""
    found, figure = finished(plan, budget), plan.experiment.figure
    results = {name: {run.seed: final(result, figure) for run, result in runs} for name, runs in found.items()}
    first = plan.names[0]
    lines = []
    for name in results:
        seeds = [seed for seed in results[name] if seed in results.get(first, {})]
        if name != first and seeds:
            mean, deviation = spread([results[name][seed] - results[first][seed] for seed in seeds])
            text = f"{mean:+.4f}" + (f" ± {deviation:.4f}" if deviation is not None else "")
            lines.append(f"- {plan.experiment.variants[name].label}: {text} ({len(seeds)} seed{'s' if len(seeds) > 1 else ''})")
    if not lines:
        return []
    label = plan.experiment.variants[first].label
    return [f"Minus {label} of the same seed, mean ± standard deviation:", "", *lines, ""]


def section(plan):
    lines = []
    for budget in plan.budgets():
        if not finished(plan, budget):
            continue
        kind = {"plain": "", "flops": ", at equal FLOPs", "time": ", at equal time"}[budget]
        where = "last evaluation"
        if plan.experiment.test:
            where = "test set" if "/test_" in plan.experiment.test else "whole validation set"
        lines += [f"## {plan.experiment.title}{kind}", ""]
        for length in plan.experiment.lengths or (None,):
            at = f" of {length} tokens" if length else ""
            lines += [f"| variant | the paper says | {NAMES[plan.experiment.figure]}, {where}{at} | standard deviation | seeds | steps | hours |",
                      "|---|---|---|---|---|---|---|", *table(plan, budget, length), ""]
        lines += differences(plan, budget) if plan.experiment.start or plan.experiment.flops_of else []
        _, result = next(iter(finished(plan, budget).values()))[0]
        lines += sweeps(plan) if budget == plan.budgets()[0] else []
        seconds = plan.step_seconds()
        if seconds and budget == "time":
            lines += ["A step takes, in seconds (median, nothing else running): " + ", ".join(
                f"{plan.experiment.variants[name].label} {seconds[name]:.3f}" for name in plan.names) + ".", ""]
        commits, machines = (sorted({each[key] for runs in finished(plan, budget).values() for _, each in runs})
                             for key in ("commit", "machine"))
        lines += [f"First of these runs: `{result['command']}`", "", f"Commit {', '.join(commits)}; {'; '.join(machines)}.", ""]
    return lines


def sweeps(plan):
    """The learning rates that were tried, and what came of them; [] without sweeps."""
    tried = []
    for name in plan.names:
        rate = plan.learning_rate(name)
        if rate is None or plan.experiment.variants[name].rate_of:
            continue
        losses = [f"{each:g}: {run.result()['final']['val_loss']:.4f}" for each, run in zip(plan.learning_rates(name), plan.sweep(name))]
        tried.append(f"- {plan.experiment.variants[name].label}: {rate:g} (losses: {', '.join(losses)})")
    return ["Learning rates, by the held-out loss after runs of a third of the steps:", "", *tried, ""] if tried else []


def write_page(plans, options):
    """Draw and write what is there of the plans; returns the file."""
    out = options.docs / "quick" if options.quick else options.docs
    pictures = draw(plans, out)
    command = "make reproduce" + (" QUICK=1" if options.quick else "")
    lines = [HEAD.format(command=command, discussion="../discussion.md" if options.quick else "discussion.md")]
    if options.quick:
        lines.append("This is the quick form: budgets so small that the tasks run end to end and little is learnt.\n")
    for plan in plans:
        lines += section(plan)
    if pictures:
        lines.append("## Figures\n")
    for picture, text in pictures:
        lines += [f"![{text}]({picture})", "", f"*{text[0].upper()}{text[1:]}; data: [{picture[:-4]}.csv]({picture[:-4]}.csv)*", ""]
    path = out / "results.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path
