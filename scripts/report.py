#!/usr/bin/env python3
"""Write one self-contained HTML page about one or several runs: curves, samples, configurations, time and memory.

The page asks no server for anything and needs no library; any browser opens it. Long runs are thinned: every point of a
curve is a line of metrics.jsonl, and of many lines the smallest and the largest losses stay. The smoothed loss is
computed from all lines.
"""

import argparse
import datetime
import json
import shlex
import sys
from pathlib import Path

import numpy as np

from plot_loss import smooth
from run_files import Run, names_of, number
from errors import UserError

EXAMPLES = """\
examples:
  scripts/report.py runs/quickstart
  scripts/report.py runs/iha runs/mha --out both.html
"""

PAGE = Path(__file__).resolve().parent / "report"
LARGEST = 4_900_000  # bytes of a page
POINTS = 4000  # of a run's curve, where there are few runs
SAMPLE_CHARACTERS = 3000
PARTS = ("grad_norms", "weight_norms")


def thin(losses, limit):
    """Indices of at most about `limit` lines: in each of equally long stretches the smallest and the largest loss, and
    both ends."""
    count = len(losses)
    if count <= limit:
        return list(range(count))
    values = np.array([np.nan if x is None else x for x in losses])
    edges = np.linspace(0, count, max(1, limit // 2 - 1) + 1).astype(int)
    keep = {0, count - 1}
    for low, high in zip(edges[:-1], edges[1:]):
        stretch = values[low:high]
        if np.isfinite(stretch).any():
            keep |= {low + int(np.nanargmin(stretch)), low + int(np.nanargmax(stretch))}
        elif high > low:
            keep.add(int(low))
    return sorted(keep)


def every(items, limit):
    """At most `limit` of a list, evenly, with the last."""
    if len(items) <= limit:
        return items
    return [items[round(i * (len(items) - 1) / (limit - 1))] for i in range(limit)] if limit > 1 else items[-1:]


def short(value, digits):
    return None if value is None or not np.isfinite(value) else float(f"{value:.{digits}g}")


def of_steps(run, limit, out):
    losses = [number(row.get("loss")) for row in run.steps]
    seconds = run.seconds()
    curve = smooth(np.array([np.nan if x is None else x for x in losses], dtype=float), max(1, len(losses) // 40))
    keep = thin(losses, limit)
    rows = [run.steps[i] for i in keep]
    column = lambda key: [number(row.get(key)) for row in rows]
    out |= {"step": [row["step"] for row in rows], "loss": [losses[i] for i in keep], "lr": column("lr"),
            "grad_norm": column("grad_norm"), "tokens": [row.get("tokens") for row in rows],
            "speed": column("tokens_per_second"), "mfu": column("mfu"),
            "smooth": [short(curve[i], 6) for i in keep], "seconds": [short(seconds[i], 7) for i in keep]}
    skipped = [row for row in run.steps if row.get("skipped") is True]
    out["skipped"] = [{"step": row["step"], "loss": number(row.get("loss")), "grad_norm": number(row.get("grad_norm"))}
                      for row in every(skipped, 200)]
    speeds = [x for x in (number(row.get("tokens_per_second")) for row in run.steps) if x]
    out["summary"] |= {"step": run.steps[-1]["step"] if run.steps else 0,
                       "tokens": number(run.steps[-1].get("tokens")) if run.steps else None,
                       "loss": short(curve[-1], 6) if len(curve) else None, "skipped": len(skipped),
                       "seconds": seconds[-1] if seconds and seconds[-1] else None,
                       "speed": float(np.median(speeds)) if speeds else None}


def of_parts(run, limit):
    rows = every([row for row in run.steps if any(isinstance(row.get(key), dict) for key in PARTS)], limit)
    parts = {"step": [row["step"] for row in rows], "grad": {}, "weight": {}}
    for key, name in zip(PARTS, ("grad", "weight")):
        for part in dict.fromkeys(part for row in rows for part in row.get(key) or ()):
            parts[name][part] = [number((row.get(key) or {}).get(part)) for row in rows]
    return parts


def of_evaluations(run, limit, summary):
    rows = every(run.evals, limit)
    out = {"step": [row["step"] for row in rows], "loss": [number(row["val_loss"]) for row in rows]}
    for key, name in (("val_accuracy", "accuracy"), ("val_exact", "exact")):
        if any(key in row for row in rows):
            out[name] = [number(row.get(key)) for row in rows]
    finite = [(number(row["val_loss"]), row["step"]) for row in run.evals if number(row["val_loss"]) is not None]
    best = min(finite, default=(None, None))
    last = run.evals[-1] if run.evals else {}
    summary |= {"val": number(last.get("val_loss")), "best": best[0], "best_step": best[1],
                "bits_per_byte": number(last.get("val_bits_per_byte"))}
    return out


def of_tasks(run, limit):
    tasks = {}
    for row in run.tasks:
        tasks.setdefault(str(row["task"]), []).append(row)
    keys = ("accuracy", "accuracy_norm", "chance", "items")
    return {name: {"step": [row["step"] for row in kept], **{key: [number(row.get(key)) for row in kept] for key in keys}}
            for name, kept in ((name, every(rows, limit)) for name, rows in tasks.items())}


def starts_of(run):
    out = []
    for start in every(run.starts, 50):
        command = start.get("command")
        out.append({"time": str(start.get("time", "")), "step": start.get("step", 0),
                    "command": shlex.join(map(str, command)) if isinstance(command, list) else "",
                    "device": str(start.get("device", "")), "ranks": number(start.get("ranks")) or 1})
    return out


def describe(run, name, scale):
    """What the page shows of a run; scale: the share of the space that it may take."""
    last = run.starts[-1] if run.starts else {}
    memory = last.get("memory")
    summary = {"total_steps": number(last.get("total_steps"))}
    out = {"name": name, "summary": summary, "config": run.config, "starts": starts_of(run),
           "flops_per_token": number(last.get("flops_per_token")),
           "memory": {str(k): number(v) or 0 for k, v in memory.items()} if isinstance(memory, dict) else None,
           "peak": max((number(end.get("peak_host_bytes")) or 0 for end in run.ends), default=0),
           "profile": [[n, short(s, 5), c] for n, s, c in run.profile[:40]]}
    of_steps(run, max(50, int(POINTS * scale)), out)
    out["parts"] = of_parts(run, max(20, int(500 * scale)))
    out["val"] = of_evaluations(run, max(20, int(1000 * scale)), summary)
    out["tasks"] = of_tasks(run, max(20, int(300 * scale)))
    out["samples"] = [[step, text[:SAMPLE_CHARACTERS]] for step, text in every(run.samples, max(4, int(60 * scale)))]
    return out


def page(runs, title, scale):
    names = names_of([run.folder for run in runs])
    described = [describe(run, name, scale) for run, name in zip(runs, names)]
    points = max(len(run["step"]) for run in described)
    data = {"title": title or (names[0] if len(runs) == 1 else "Training runs"), "runs": described, "points": points,
            "thinned": any(len(out["step"]) < len(run.steps) for out, run in zip(described, runs)),
            "written": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")}
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    parts = {"@CSS@": (PAGE / "page.css").read_text(), "@TITLE@": escape(data["title"]),
             "@SCRIPT@": (PAGE / "chart.js").read_text() + (PAGE / "page.js").read_text().replace('"use strict";\n', "", 1),
             "@DATA@": text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")}
    html = (PAGE / "page.html").read_text()
    for key in ("@TITLE@", "@CSS@", "@SCRIPT@", "@DATA@"):  # the data last: it may contain the others
        html = html.replace(key, parts[key], 1)
    return html.encode("utf-8", errors="replace")


def escape(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def parse():
    parser = argparse.ArgumentParser(prog="report.py", description=__doc__, epilog=EXAMPLES, add_help=False,
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise UserError(message)

    parser.error = fail
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, or its metrics.jsonl")
    parser.add_argument("--out", metavar="FILE", default="report.html", help="default: report.html")
    parser.add_argument("--title", metavar="TEXT", help="default: the name of a single run")
    parser.add_argument("--help", action="help", help="show this and stop")
    return parser.parse_args()


def report():
    options = parse()
    runs = [Run(path) for path in options.runs]
    scale = min(1.0, 8 / len(runs))
    html = page(runs, options.title, scale)
    while len(html) > LARGEST and scale > 1e-3:
        scale /= 2
        html = page(runs, options.title, scale)
    Path(options.out).write_bytes(html)
    print(options.out)


def main():
    try:
        report()
    except UserError as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"report.py: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1 if error.errno == 28 else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
