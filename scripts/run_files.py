"""What a run directory says about a run: metrics.jsonl, starts.jsonl, samples.txt, profile.json and the newest
checkpoint. Read by report.py, watch.py, plot_loss.py and reproduce/; files that are missing, and lines that are cut off,
are left out."""

import json
import math
from pathlib import Path

from errors import UserError


def number(value):
    """A finite float, or None: diverged runs contain NaN, null or "inf"."""
    try:
        value = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return value if math.isfinite(value) else None


def rows_of(path):
    """The JSON objects of a file of lines. A file that cannot be read is an error, a line that is no object is left
    out."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(row, dict):
                    yield row
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def step_of(row):
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2 ** 53 else None


class Run:
    """A run: `steps` and `evals` and `tasks`, the lines of metrics.jsonl in the order of their steps."""

    def __init__(self, path):
        path = Path(path)
        self.folder = path if path.is_dir() else path.parent
        self.file = path / "metrics.jsonl" if path.is_dir() else path
        self.steps, self.evals, self.tasks = [], [], []
        for row in rows_of(self.file):
            self.add(row)
        if not self.steps and not self.evals and not self.tasks:
            raise UserError(f"{self.file}: has no line of a training step or an evaluation")
        self.starts, self.ends = [], []
        if (self.folder / "starts.jsonl").is_file():
            for row in rows_of(self.folder / "starts.jsonl"):
                {"start": self.starts, "end": self.ends}.get(row.get("event"), []).append(row)
        self.samples = read_samples(self.folder / "samples.txt")
        self.profile = read_profile(self.folder / "profile.json")
        self.config = self.read_config()

    def add(self, row):
        if step_of(row) is None:
            return
        if "task" in row:
            self.tasks.append(row)
        elif "val_loss" in row:
            self.evals.append(row)
        elif "loss" in row:
            while self.steps and self.steps[-1]["step"] >= row["step"]:  # a restart's lines replace older ones
                self.steps.pop()
            self.steps.append(row)

    def read_config(self):
        """Every key of the configuration: of the last start, or of the newest checkpoint."""
        for start in reversed(self.starts):
            if isinstance(start.get("config"), dict):
                return {str(key): str(value) for key, value in start["config"].items()}
        for folder in sorted(self.folder.glob("step_????????"), reverse=True):
            try:
                config = json.loads((folder / "trainer.json").read_text())["config"]
                return {str(key): str(value) for key, value in config.items()}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
        return {}

    def seconds(self):
        """Seconds of training after each step, without evaluations and saving: the sum of tokens over tokens a second."""
        total, before, out = 0.0, None, []
        for row in self.steps:
            tokens, speed = number(row.get("tokens")), number(row.get("tokens_per_second"))
            if tokens is not None and speed:
                # A file that does not begin with step 1 lacks what came before.
                total += (tokens - (tokens / row["step"] * (row["step"] - 1) if before is None else before)) / speed
                before = tokens
            out.append(total)
        return out


def read_samples(path):
    """[(step, text)] of samples.txt, whose samples begin with a line "---- step N"."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    samples = []
    for part in ("\n" + text).split("\n---- step ")[1:]:
        head, _, body = part.partition("\n")
        if head.strip().isdigit():
            samples.append((int(head), body.rstrip("\n")))
    return samples


def read_profile(path):
    """Self time by operation of a timeline that train --profile wrote: [(name, seconds, calls)], longest first."""
    try:
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
        ranges = [(float(e["ts"]), float(e["dur"]), str(e["name"])) for e in events]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    totals, stack = {}, []  # stack: [end, name] of the ranges that contain the next one

    def name_of(text):
        name, _, index = text.rpartition(" ")
        return name if index.isdigit() and name else text

    for begin, duration, text in sorted(ranges, key=lambda r: (r[0], -r[1])):
        while stack and begin >= stack[-1][0] - 1e-3:
            stack.pop()
        name = name_of(text)
        if stack:
            totals[stack[-1][1]][0] -= duration
        entry = totals.setdefault(name, [0.0, 0])
        entry[0] += duration
        entry[1] += 1
        stack.append([begin + duration, name])
    return sorted(((n, s / 1e6, c) for n, (s, c) in totals.items()), key=lambda row: -row[1])


def names_of(folders):
    """Each run's folder, with as many parents as make the names differ."""
    names = []
    for depth in range(1, 12):
        names = ["/".join(folder.resolve().parts[-depth:]) for folder in folders]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i + 1})" for i, name in enumerate(names)]
