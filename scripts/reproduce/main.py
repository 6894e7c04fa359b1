#!/usr/bin/env python3
"""Reproduce the experiments of "Interleaved Head Attention" (arXiv 2602.21371): make the data, train every variant,
evaluate, and write figures and a table. Interrupted, the same command goes on where it was.

Each run of training uses one GPU, or its share of the processors, and as many go on at once as there are. Runs lie in
runs/reproduce/; what is written lies in docs/reproduction/ (with --quick: docs/reproduction/quick/).
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from experiments import EXPERIMENTS  # noqa: E402
from runs import BINARY, Plan, Scheduler, UserError, write_record  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

EXAMPLES = """\
examples:
  make reproduce QUICK=1                 every experiment but the two slowest variants, one seed each
  make reproduce ONLY=binary,lm SEEDS=2
  make reproduce RECORDED=1              go on from the results that are in docs/reproduction/
  make reproduce JOBS=1                  one run at a time, on all cores
"""


def parse(arguments):
    parser = argparse.ArgumentParser(prog="reproduce", description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise UserError(f"{message}; see --help")

    parser.error = fail
    names = ", ".join(EXPERIMENTS)
    parser.add_argument("--only", default="", metavar="NAMES", help=f"experiments, with commas between: {names}")
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="seeds of each variant; default: its own number")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at once; default: GPUs, or processors")
    parser.add_argument("--quick", action="store_true", help="small budgets: everything runs, little is learnt")
    parser.add_argument("--recorded", action="store_true",
                        help="take the results in docs/reproduction/results/ as done, and train what is missing there")
    parser.add_argument("--figures", action="store_true", help="only write figures and table of what has been run")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/reproduce", metavar="FOLDER", help="where runs lie")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs/reproduction", metavar="FOLDER",
                        help="where figures and table are written")
    parser.add_argument("--experiments", type=Path, metavar="FILE.py",
                        help="other experiments: a file that sets EXPERIMENTS, as scripts/reproduce/experiments.py does")
    options = parser.parse_args(arguments)
    if options.seeds < 0 or options.jobs < 0:
        fail("--seeds and --jobs must be 1 or more")
    experiments = load(options.experiments) if options.experiments else EXPERIMENTS
    chosen = list(dict.fromkeys(filter(None, (part.strip() for part in options.only.split(",")))))
    for name in chosen:
        if name not in experiments:
            fail(f"there is no experiment {name!r}: {', '.join(experiments)}")
    options.experiments = [experiments[name] for name in chosen or experiments]
    options.all_experiments = list(experiments.values())
    return options


def load(path):
    """EXPERIMENTS of a Python file."""
    try:
        specification = importlib.util.spec_from_file_location("own_experiments", path)
        module = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(module)
        return module.EXPERIMENTS
    except (OSError, SyntaxError, AttributeError, ImportError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None


def make_data(experiment):
    """The shards that are not there."""
    for folder, command in experiment.data.items():
        if any(Path(folder).glob("train_*.bin")):
            continue
        if "data/corpus/bible.txt" in command and not Path("data/corpus/bible.txt").exists():
            subprocess.run([sys.executable, "data/corpus.py", "bible"], check=True)
        print(f"data: {folder}", file=sys.stderr)
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)


def shown(options):
    """Plans of what the page shows: all experiments and seeds, from the record where this command did not train them."""
    every = argparse.Namespace(**vars(options) | {"recorded": True, "seeds": 0})
    plans = [Plan(experiment, every) for experiment in options.all_experiments]
    for plan in plans:
        plan.seeds = {name: max(seeds, options.seeds) for name, seeds in plan.seeds.items()}
    return plans


def run(arguments):
    options = parse(arguments)
    options.out, options.docs = (path and path.absolute() for path in (options.out, options.docs))
    os.chdir(ROOT)
    if not Path(BINARY).exists():
        raise UserError(f"{BINARY} is not built; run: make")
    plans = [Plan(experiment, options) for experiment in options.experiments]
    failed = []
    if not options.figures:
        for experiment in options.experiments:
            make_data(experiment)
        failed = Scheduler(plans, options).run()
    from page import write_page
    for plan in plans:
        write_record(plan, options)
    print(write_page(shown(options), options))
    return 1 if failed else 0


def interrupt(number, frame):
    raise KeyboardInterrupt


def main():
    signal.signal(signal.SIGTERM, interrupt)
    try:
        return run(sys.argv[1:])
    except UserError as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        return error.returncode  # it has said what is wrong
    except OSError as error:
        print(f"reproduce: {error.filename}: {error.strerror}" if error.filename else f"reproduce: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
