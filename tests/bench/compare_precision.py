#!/usr/bin/env python3
"""Train the quickstart's model in fp32 and in bf16 with several seeds, and print the losses at the end as a table.

    tests/bench/compare_precision.py [--seeds N] [--jobs N] [--out DIR] [--config FILE] [KEY=VALUE ...]

Runs that are finished are not repeated, and an interrupted one goes on from its last checkpoint: after a kill, give the
same command again. --table prints what there is and trains nothing. A seed has the same initial weights and the same
sequences in both precisions, so differences are taken seed by seed. Losses are nats a token: of training, the mean of
the last 50 steps; of held-out text, all of it, in fp32 whatever the run's precision (`train_iha eval`).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PRECISIONS = ("fp32", "bf16")
TAIL = 50  # steps whose mean is the loss at the end


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to N in each precision (3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1); give system.threads too")
    parser.add_argument("--out", type=Path, default=Path("runs/precision"), help="folder of the runs (runs/precision)")
    parser.add_argument("--config", default="configs/quickstart.ini")
    parser.add_argument("--table", action="store_true", help="print the table of finished runs, train nothing")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="for every run")
    return parser.parse_args()


def train_iha(*arguments, log):
    """Run the program, its messages into `log`; its standard output."""
    with log.open("a") as errors:
        done = subprocess.run([os.environ.get("TRAIN_IHA", "./train_iha"), *map(str, arguments)], cwd=ROOT, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors)
    if done.returncode:
        raise RuntimeError(f"train_iha {arguments[0]} failed with exit code {done.returncode}; see {log}")
    return done.stdout


def finish(options, precision, seed):
    """Train one run to its end, or the rest of it, and evaluate it; its result stays beside it."""
    run = (options.out / f"{precision}_seed{seed}").resolve()
    result = run.with_suffix(".json")
    if result.exists():
        return
    log = run.with_suffix(".log")
    train_iha("train", options.config, f"run.dir={run}", f"system.precision={precision}", f"train.seed={seed}",
              "run.eval_every=0", "run.sample_every=0", "run.save_every=50", *options.overrides, log=log)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    if not steps or steps[-1]["step"] < TAIL:
        raise RuntimeError(f"{run} has fewer than {TAIL} steps, whose mean is to be the loss at the end")
    held_out = float(train_iha("eval", run, log=log).splitlines()[-1].split()[1])
    end = [line["loss"] for line in steps[-TAIL:]]
    whole = json.dumps({"steps": steps[-1]["step"], "train": statistics.mean(end), "held_out": held_out})
    partial = result.with_suffix(".tmp")
    partial.write_text(whole + "\n")
    partial.replace(result)
    print(f"{precision}, seed {seed}: {whole}", file=sys.stderr)


def spread(values):
    return statistics.stdev(values) if len(values) > 1 else math.nan


def print_table(results):
    """results: {(precision, seed): {...}}; of seeds that both precisions have."""
    seeds = sorted({seed for _, seed in results if all((p, seed) in results for p in PRECISIONS)})
    if not seeds:
        print("no seed has finished in both precisions")
        return
    steps = sorted({results[p, s]["steps"] for p in PRECISIONS for s in seeds})
    print(f"{len(seeds)} seeds, {' or '.join(map(str, steps))} steps\n")
    kinds = (("train", f"training, last {TAIL} steps"), ("held_out", "held-out text, in fp32"))
    print("| seed |" + "".join(f" {name}: fp32 | bf16 | bf16 − fp32 |" for _, name in kinds))
    print("|---|" + "---|" * 3 * len(kinds))
    columns = [[], [], [], [], [], []]
    for seed in seeds:
        row = []
        for kind, _ in kinds:
            fp32, bf16 = (results[p, seed][kind] for p in PRECISIONS)
            row += [fp32, bf16, bf16 - fp32]
        for column, value in zip(columns, row):
            column.append(value)
        print(f"| {seed} |" + "".join(f" {x:+.4f} |" if i % 3 == 2 else f" {x:.4f} |" for i, x in enumerate(row)))
    for name, of in (("mean", statistics.mean), ("standard deviation", spread)):
        print(f"| {name} |" + "".join(
            f" {of(c):+.4f} |" if i % 3 == 2 and of is statistics.mean else f" {of(c):.4f} |" for i, c in enumerate(columns)))
    print()
    for at, (_, name) in zip((0, 3), kinds):
        mean, seeds_spread = statistics.mean(columns[at + 2]), spread(columns[at])
        print(f"{name}: the mean difference, {mean:+.4f}, is {abs(mean) / seeds_spread:.2f} times the standard deviation of "
              "fp32 over seeds" if seeds_spread > 0 else f"{name}: two seeds at least for a spread")


def main():
    options = read_arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    runs = [(p, seed) for seed in range(1, options.seeds + 1) for p in PRECISIONS]
    failed = False
    if not options.table:
        with ThreadPoolExecutor(options.jobs) as pool:
            for future in [pool.submit(finish, options, *run) for run in runs]:
                try:
                    future.result()
                except RuntimeError as error:
                    print(f"compare_precision: {error}", file=sys.stderr)
                    failed = True
    print_table({run: json.loads(path.read_text()) for run in runs
                 if (path := options.out / f"{run[0]}_seed{run[1]}.json").exists()})
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
