#!/usr/bin/env python3
"""Follow runs and send what they write to TensorBoard or Weights & Biases.

A process of its own, which only reads metrics.jsonl and starts.jsonl: it cannot disturb training, and may be started and
stopped at any time. It goes on past restarts of a run.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from run_files import Run, names_of, number, step_of
from errors import UserError

EXAMPLES = """\
examples:
  scripts/watch.py runs/quickstart --to tensorboard            then: tensorboard --logdir runs/tensorboard
  WANDB_MODE=offline scripts/watch.py runs/iha runs/mha --to wandb --once
"""

NAMES = {"loss": "train/loss", "grad_norm": "train/grad_norm", "lr": "train/lr", "tokens": "train/tokens",
         "tokens_per_second": "speed/tokens_per_second", "mfu": "speed/mfu", "skipped": "train/skipped",
         "val_loss": "val/loss", "val_accuracy": "val/accuracy", "val_exact": "val/exact",
         "val_bits_per_byte": "val/bits_per_byte"}


def scalars_of(row):
    """{name: value} of a line of metrics.jsonl."""
    if "task" in row:
        return {f"tasks/{row['task']}/{key}": number(row[key]) for key in ("accuracy", "accuracy_norm")
                if number(row.get(key)) is not None}
    out = {NAMES[key]: number(value) for key, value in row.items() if key in NAMES and number(value) is not None}
    for key in ("grad_norms", "weight_norms"):
        for part, value in (row.get(key) or {}).items() if isinstance(row.get(key), dict) else ():
            if number(value) is not None:
                out[f"{key}/{part}"] = number(value)
    return out


class Follower:
    """The lines that a file gains, whole ones only. A file that a restart has made shorter, or replaced, is read again."""

    def __init__(self, path):
        self.path, self.inode, self.offset, self.tail = path, None, 0, b""

    def rows(self):
        """(is this a new beginning, the new lines)"""
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                again = self.inode is not None and (stat.st_ino != self.inode or stat.st_size < self.offset)
                if again or self.inode is None:
                    self.inode, self.offset, self.tail = stat.st_ino, 0, b""
                file.seek(self.offset)
                content = self.tail + file.read()
                self.offset = file.tell()
        except FileNotFoundError:
            return False, []
        *lines, self.tail = content.split(b"\n")
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict) and step_of(row) is not None:
                rows.append(row)
        return again, rows


def config_of(folder):
    try:
        return Run(folder).config
    except UserError:
        return {}


class TensorBoard:
    """Event files. An event that says a session starts makes TensorBoard drop what it has of that step and later."""

    def __init__(self, folder, name, config):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self.event, self.summary = event_pb2, summary_pb2
        self.writer = EventFileWriter(str(Path(folder) / name))
        self.begin(0)

    def begin(self, step):
        log = self.event.SessionLog(status=self.event.SessionLog.START)
        self.writer.add_event(self.event.Event(wall_time=time.time(), step=step, session_log=log))

    def add(self, step, scalars):
        values = [self.summary.Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self.writer.add_event(self.event.Event(wall_time=time.time(), step=step, summary=self.summary.Summary(value=values)))

    def flush(self):
        self.writer.flush()

    def close(self):
        self.writer.close()


class WandB:
    """A W&B run, whose curves are over `step`, since W&B's own counter cannot go back when a run restarts."""

    def __init__(self, folder, name, config):
        import wandb
        try:
            self.run = wandb.init(project=os.environ.get("WANDB_PROJECT", "iha"), name=name, config=config,
                                  dir=str(folder), reinit="create_new",
                                  settings=wandb.Settings(silent=True, x_disable_stats=True))
        except wandb.Error as error:
            raise UserError(f"wandb: {' '.join(str(error).split())}; log in with `wandb login`, or set WANDB_MODE=offline") \
                from None
        self.run.define_metric("*", step_metric="step")

    def begin(self, step):
        pass

    def add(self, step, scalars):
        self.run.log({"step": step, **scalars})

    def flush(self):
        pass

    def close(self):
        self.run.finish()


TARGETS = {"tensorboard": (TensorBoard, "tensorboard"), "wandb": (WandB, "wandb")}


def check_installed(target):
    import importlib.util
    package = TARGETS[target][1]
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--to {target}: the package {package} is not installed; run: .venv/bin/python -m pip install {package}")


class Watched:
    def __init__(self, folder, name, options):
        self.folder, self.name, self.options = folder, name, options
        self.follower, self.target = Follower(folder / "metrics.jsonl"), None

    def poll(self):
        again, rows = self.follower.rows()
        if not rows:
            return
        if self.target is None:
            make = TARGETS[self.options.to][0]
            Path(self.options.out).mkdir(parents=True, exist_ok=True)
            self.target = make(self.options.out, self.name, config_of(self.folder))
        if again:  # a restart has cut the file, or continued it under a new name: all of it is sent again
            self.target.begin(0)
        for row in rows:
            self.target.add(row["step"], scalars_of(row))
        self.target.flush()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def parse():
    parser = argparse.ArgumentParser(prog="watch.py", description=__doc__, epilog=EXAMPLES, add_help=False, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise UserError(message)

    parser.error = fail
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder; it may not be there yet")
    parser.add_argument("--to", required=True, choices=sorted(TARGETS), help="where to")
    parser.add_argument("--out", metavar="FOLDER", help="default: runs/tensorboard or runs/wandb")
    parser.add_argument("--once", action="store_true", help="send what is there, and stop")
    parser.add_argument("--pid", type=int, metavar="N", help="stop when this process has ended")
    parser.add_argument("--check", action="store_true", help="only say whether the target is installed")
    parser.add_argument("--help", action="help", help="show this and stop")
    options = parser.parse_args()
    options.out = options.out or f"runs/{options.to}"
    check_installed(options.to)
    if options.once:
        for run in options.runs:
            if not (Path(run) / "metrics.jsonl").is_file():
                raise UserError(f"{run}: has no metrics.jsonl; give a run's folder")
    return options


def watch():
    options = parse()
    if options.check:
        return
    os.nice(10)
    folders = [Path(run) for run in options.runs]
    watched = [Watched(folder, name.replace("/", "_"), options) for folder, name in zip(folders, names_of(folders))]
    try:
        while True:
            ended = options.once or (options.pid is not None and not alive(options.pid))
            for run in watched:
                run.poll()
            if ended:
                break
            time.sleep(float(os.environ.get("WATCH_SECONDS", "2")))
    finally:
        for run in watched:
            if run.target:
                run.target.close()


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        watch()
    except UserError as error:
        print(f"watch.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"watch.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
