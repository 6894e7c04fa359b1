"""Trains what an experiment consists of: several runs at once, resumed after a kill, each result kept when it is there."""

import collections
import json
import math
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from run_files import rows_of  # noqa: E402
from errors import UserError  # noqa: E402

BINARY = os.environ.get("TRAIN_IHA", "./train_iha")
SWEEP_SEED = 1000  # of learning-rate sweeps: none of the seeds that are compared
SWEEP_SHARE = 1 / 3  # of the steps of a run that is compared
TIMED_STEPS, TIMED_ROUNDS = 24, 3  # of the runs that measure the time of a step; the first quarter does not count
CONTINUED_SEED = 500  # is added to the seed of a run that continues another, which would see the same sequences again


@dataclass(frozen=True)
class Run:
    experiment: object
    variant: str
    seed: int
    budget: str  # plain, flops, time; sweep
    overrides: tuple  # of the command, without run.dir
    folder: Path
    start: tuple = ()  # the overrides of the run that this one continues
    recorded: dict = field(default=None, compare=False)  # the committed result of a run with these overrides

    def settings(self):
        """What a folder or a result must have been made with to be this run's."""
        return {"config": self.experiment.config, "overrides": list(self.overrides), "start": list(self.start)}

    def command(self, threads):
        folder = self.folder.relative_to(Path.cwd()) if self.folder.is_relative_to(Path.cwd()) else self.folder
        return [BINARY, "train", self.experiment.config, *self.overrides, f"run.dir={folder}",
                f"system.threads={threads}"]

    def result(self):
        """What finish() wrote, or else the committed result; None while the run has not ended. A result of other
        settings, or one that is damaged, does not count."""
        try:
            result = json.loads((self.folder / "result.json").read_text())
        except (FileNotFoundError, ValueError):
            return self.recorded
        return result if same_settings(result, self.settings()) else self.recorded


class Plan:
    """The runs of one experiment. all_runs() gives those that can be named with the results that are there: a sweep
    comes before what uses its learning rate, the first budget before the one matched in time."""

    def __init__(self, experiment, options):
        self.experiment, self.quick = experiment, options.quick
        self.folder = options.out / ("quick" if options.quick else "full") / experiment.name
        self.names = [name for name in experiment.variants if not (options.quick and name in experiment.not_quick)]
        self.seeds = {}
        for name in self.names:
            most = experiment.variants[name].seeds or experiment.seeds
            self.seeds[name] = options.seeds or (1 if options.quick else most)
        self.common = (*experiment.overrides, *(experiment.quick if options.quick else ()))
        self.flops = {name: flops_per_token(experiment.config, self.overrides(name)) for name in self.names}
        self.recorded = Record(options, experiment) if options.recorded else None

    def overrides(self, name, *more):
        return last_of_each_key(*self.common, *self.experiment.variants[name].overrides, *more)

    def run(self, name, seed, budget, *more, start=()):
        rate = next((item.split("=")[1] for item in more if item.startswith("train.lr=")), "")
        parts = [name, budget] + ([f"lr{rate}"] if budget == "sweep" else []) + [f"seed{seed}"]
        overrides = self.overrides(name, f"train.seed={seed}", *more)
        return self.with_record(Run(self.experiment, name, seed, budget, overrides, self.folder.joinpath(*parts), tuple(start)))

    def with_record(self, run):
        recorded = self.recorded and self.recorded.result(str(run.folder.relative_to(self.folder)), run.settings())
        return replace(run, recorded=recorded)

    def steps(self):
        return int(next(item.split("=")[1] for item in reversed(self.common) if item.startswith("train.steps=")))

    def start(self, seed):
        """The run whose weights all variants of a seed continue with; None in experiments without one."""
        if not self.experiment.start:
            return None
        overrides = last_of_each_key(*self.common, *self.experiment.start, f"train.seed={seed}")
        run = self.with_record(Run(self.experiment, "start", seed, "plain", overrides, self.folder / "start" / f"seed{seed}"))
        # What continues it needs its checkpoint, which no record holds.
        needed = run.recorded and not all(self.continued(name, run).result() for name in self.names if seed <= self.seeds[name])
        return replace(run, recorded=None) if needed else run

    def continued(self, name, start):
        """The run of a variant that begins with the weights of `start`."""
        where = start.folder.relative_to(Path.cwd()) if start.folder.is_relative_to(Path.cwd()) else start.folder
        more = [f"train.init_from={where}", f"train.seed={start.seed + CONTINUED_SEED}"]
        reference = self.experiment.variants[name].flops_of
        if reference:
            more.append(f"train.steps={self.steps_of_equal_flops(name, reference)}")
        return self.run(name, start.seed, "plain", *more, start=start.overrides)

    def steps_of_equal_flops(self, name, reference):
        return max(1, round(self.steps() * self.flops[reference] / self.flops[name]))

    def sweep(self, name):
        name = self.experiment.variants[name].rate_of or name
        if self.quick or not self.learning_rates(name):
            return []
        steps = max(1, round(self.steps() * SWEEP_SHARE))
        return [self.run(name, SWEEP_SEED, "sweep", f"train.lr={rate:g}", f"train.steps={steps}")
                for rate in self.learning_rates(name)]

    def learning_rates(self, name):
        """Those that the sweep for a variant tries."""
        variant = self.experiment.variants[self.experiment.variants[name].rate_of or name]
        return variant.learning_rates or self.experiment.learning_rates

    def learning_rate(self, name):
        """The best of the sweep; None while it is not known, or without a sweep."""
        results = [run.result() for run in self.sweep(name)]
        if not results or not all(results):
            return None
        # The loss of a run that diverged is null.
        losses = [math.inf if result["final"]["val_loss"] is None else result["final"]["val_loss"] for result in results]
        return min(zip(losses, self.learning_rates(name)))[1]

    def budgets(self):
        if not self.experiment.flops_of:
            return ["plain"]
        return ["flops"] if self.quick else ["flops", "time"]

    def compared(self, name, seed, budget):
        """The run of a variant, seed and budget; None while what it depends on is not there."""
        start = self.start(seed)
        if start:
            return self.continued(name, start) if start.result() else None
        more = []
        if self.sweep(name):
            rate = self.learning_rate(name)
            if rate is None:
                return None
            more.append(f"train.lr={rate:g}")
        if budget == "flops":
            more.append(f"train.steps={self.steps_of_equal_flops(name, self.experiment.flops_of)}")
        elif budget == "time":
            seconds = self.step_seconds()
            if not seconds:
                return None
            if name == self.experiment.flops_of:
                return self.compared(name, seed, "flops")
            more.append(f"train.steps={max(1, round(self.steps() * seconds[self.experiment.flops_of] / seconds[name]))}")
        return self.run(name, seed, budget, *more)

    def step_seconds(self):
        """{variant: seconds of a step}, once measured; {} before."""
        try:
            seconds = json.loads((self.folder / "step_seconds.json").read_text())
        except (FileNotFoundError, ValueError):
            seconds = self.recorded.step_seconds if self.recorded else {}
        return seconds if set(self.names) <= seconds.keys() else {}

    def needs_timing(self):
        return "time" in self.budgets() and not self.step_seconds()

    def measure_steps(self, threads):
        """Times steps of every variant, one run at a time, the variants in turn; nothing else should run beside it.
        Takes the median of each variant's steps."""
        times = collections.defaultdict(list)
        for _ in range(TIMED_ROUNDS):
            for name in self.names:
                overrides = self.overrides(name, f"train.steps={TIMED_STEPS}", "train.warmup_steps=0", "run.eval_every=0")
                run = Run(self.experiment, name, 0, "timing", overrides, self.folder / "timing" / name)
                shutil.rmtree(run.folder, ignore_errors=True)
                done = subprocess.run(run.command(threads), capture_output=True, text=True)
                if done.returncode != 0:
                    raise OSError(0, (done.stderr.strip().splitlines() or ["failed"])[-1], str(run.folder))
                steps = [row for row in rows_of(run.folder / "metrics.jsonl") if "tokens_per_second" in row]
                times[name] += [row["tokens"] / row["step"] / row["tokens_per_second"] for row in steps[TIMED_STEPS // 4:]]
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "step_seconds.json", {name: statistics.median(each) for name, each in times.items()})

    def all_runs(self):
        """(runs that can be named now, number of those that cannot yet). One seed of every variant comes before the
        second of any, so that what there is after a while is a comparison."""
        runs, unknown = [], 0
        for name in self.names:
            runs += [run for run in self.sweep(name) if run not in runs]
        if self.experiment.start:
            runs += [self.start(seed) for seed in range(1, max(self.seeds.values()) + 1)]
        for budget in self.budgets():
            for seed in range(1, max(self.seeds.values()) + 1):
                for name in self.names:
                    if seed > self.seeds[name]:
                        continue
                    run = self.compared(name, seed, budget)
                    unknown += run is None
                    runs += [run] if run and run not in runs else []
        return runs, unknown


def trained(overrides):
    """Overrides without the device and without the folder of the first half, whose settings are compared beside them: where
    a run is computed does not make it another run."""
    return [item for item in overrides if not item.startswith(("system.device=", "train.init_from="))]


def same_settings(written, settings):
    """Whether what was written with a run or a result are these settings(). Results of before there were all keys lack some."""
    def value(key, content):
        return trained(content[key]) if isinstance(content[key], list) else content[key]

    return isinstance(written, dict) and all(key not in written or value(key, written) == value(key, settings) for key in settings)


def last_of_each_key(*overrides):
    """The last value given for a key is the one that counts."""
    return tuple(f"{key}={value}" for key, value in dict(item.split("=", 1) for item in overrides).items())


class Record:
    """Committed results of an experiment: docs/reproduction/results/NAME.json, a run in each line."""

    def __init__(self, options, experiment):
        self.path = record_folder(options) / f"{experiment.name}.json"
        try:
            content = json.loads(self.path.read_text())
            self.step_seconds, self.runs = content["step_seconds"], content["runs"]
        except FileNotFoundError:
            self.step_seconds, self.runs = {}, {}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self.path}: not a record of results; restore it, or remove it") from None

    def result(self, key, settings):
        """None also for a run that the experiment's present settings would make differently."""
        recorded = self.runs.get(key)
        return recorded if same_settings(recorded, settings) else None


def record_folder(options):
    return options.docs / "quick" / "results" if options.quick else options.docs / "results"


def write_record(plan, options):
    """The results of all runs that have ended, and those recorded before of runs that have not."""
    ended = {str(run.folder.relative_to(plan.folder)): run.result() for run in plan.all_runs()[0] if run.result()}
    if not ended:
        return
    before = Record(options, plan.experiment)
    before.path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(result)}" for key, result in (before.runs | ended).items())
    seconds = json.dumps(before.step_seconds | plan.step_seconds())
    write_text(before.path, f'{{"step_seconds": {seconds},\n"runs": {{\n{lines}\n}}}}\n')


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path, text):
    """Atomically."""
    partial = path.with_name(path.name + ".tmp")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def flops_per_token(config, overrides):
    """As `train_iha info` counts them for the first sequence length, forward and backward."""
    done = subprocess.run([BINARY, "info", config, *overrides], capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError((done.stderr.strip().splitlines() or [f"{BINARY} info {config} failed"])[-1])
    value, unit = re.search(r"^FLOPs per token .*: ([0-9.]+)([kMBT]?)$", done.stdout, re.M).groups()
    return float(value) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[unit]


def curve(run):
    """[[step, tokens, {val figures}]] of a run's evaluations; of two of a step the later."""
    tokens, points = {}, {}
    for line in rows_of(run.folder / "metrics.jsonl"):
        if "val_loss" in line:
            points[line["step"]] = {key: value for key, value in line.items() if key.startswith("val_")}
        elif "tokens" in line:
            tokens[line["step"]] = line["tokens"]
    return [[step, tokens.get(step, 0), points[step]] for step in sorted(points)]


def commit():
    """The version in git, with "-dirty" if it is changed outside docs/, where results are written; "unknown" where there is
    no git, or no repository."""
    try:
        done = subprocess.run(["git", "describe", "--always"], capture_output=True, text=True)
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", ".", ":!docs"], capture_output=True).returncode == 1
    except OSError:
        return "unknown"
    return done.stdout.strip() + ("-dirty" if changed else "") or "unknown"


def machine(gpus):
    if gpus:
        return gpus[0]
    name = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.split(":", 1)[1].strip()
            break
    return f"{name}, {len(os.sched_getaffinity(0))} processors"


def gpus():
    """Names of the GPUs, [] without any."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return []
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def evaluate(run, shards, threads, *more):
    """{figure: value} of the best checkpoint on other shards."""
    best = run.folder / "best" if (run.folder / "best").exists() else run.folder
    done = subprocess.run([BINARY, "eval", str(best), f"data.val={shards}", f"system.threads={threads}", *more],
                          capture_output=True, text=True)
    if done.returncode != 0:
        raise OSError(0, (done.stderr.strip().splitlines() or ["failed"])[-1], str(best))
    return {key: float(value) for key, value in
            (line.split()[:2] for line in done.stdout.splitlines() if line.startswith("val_"))}


def finish(run, threads, cards, version):
    """Record a run that has ended, atomically. version: commit() when it was started."""
    points = curve(run)
    newest = max(run.folder.glob("step_*/trainer.json"))
    trainer = json.loads(newest.read_text())
    figure = run.experiment.figure
    pick = min if figure == "val_loss" else max
    known = [values for _, _, values in points if values.get(figure) is not None]
    program, *arguments = run.command(threads)
    command = [program, *(argument.replace(f"{Path.cwd()}/", "") for argument in arguments)]
    result = {"steps": trainer["step"], "tokens": trainer["tokens"], "seconds": trainer["seconds"],
              "final": points[-1][2] if points else {},
              "best": pick(known, key=lambda values: values[figure]) if known else {},
              "curve": points, **run.settings(), "command": shlex.join(command), "commit": version,
              "machine": machine(cards)}
    if run.experiment.test and run.budget != "sweep":
        if run.experiment.lengths:
            result["test_by_length"] = {str(length): evaluate(run, run.experiment.test.format(length=length), threads,
                                                              f"train.seq_len={length}") for length in run.experiment.lengths}
        else:
            result["test"] = evaluate(run, run.experiment.test, threads)
    write_json(run.folder / "result.json", result)


class Scheduler:
    """Starts runs, as many at once as there are slots; a slot is a GPU, or a share of the processors."""

    def __init__(self, plans, options):
        self.plans, self.cards = plans, gpus()
        cores = len(os.sched_getaffinity(0))
        self.slots = options.jobs or len(self.cards) or cores
        self.threads = max(1, cores // self.slots)
        self.free = collections.deque(range(self.slots))
        self.running = {}  # process -> (run, slot, start, log file)
        self.failed, self.times = [], []
        self.terminal = sys.stderr.isatty()

    def start(self, run, slot):
        """Go on with what the folder holds of this run, or begin; what it holds of a run with other settings goes."""
        settings = run.folder / "settings.json"
        try:
            written = json.loads(settings.read_text())
            same = run.settings().keys() <= written.keys() and same_settings(written, run.settings())
        except (FileNotFoundError, ValueError, AttributeError):
            same = False
        if not same and run.folder.exists():
            self.say(f"{describe(run)}: {run.folder} holds a run with other settings; it is removed, and this one begins")
            shutil.rmtree(run.folder)
        run.folder.mkdir(parents=True, exist_ok=True)
        write_json(settings, run.settings())
        log = open(run.folder / "log.txt", "ab")
        environment = dict(os.environ)
        if self.cards:
            environment["CUDA_VISIBLE_DEVICES"] = str(slot % len(self.cards))
        process = subprocess.Popen(run.command(self.threads), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                   env=environment, start_new_session=True)
        self.running[process] = (run, slot, time.monotonic(), log, commit())

    def reap(self):
        """Whether any run has ended."""
        ended = False
        for process in [each for each in self.running if each.poll() is not None]:
            run, slot, start, log, version = self.running.pop(process)
            ended = True
            log.close()
            self.free.append(slot)
            lines = (run.folder / "log.txt").read_text(errors="replace").strip().splitlines()
            last = (lines or [""])[-1]
            # After "done:" there may be lines about the data. A run that a signal stopped has none.
            if process.returncode == 0 and any(line.startswith("done:") or ": already finished" in line for line in lines):
                try:
                    finish(run, self.threads, self.cards, version)
                except OSError as error:
                    self.failed.append(run)
                    self.say(f"{describe(run)}: cannot be evaluated: {error.filename}: {error.strerror}")
                    continue
                self.times.append(time.monotonic() - start)
                self.say(f"{describe(run)}: {summary(run)}")
            else:
                self.failed.append(run)
                self.say(f"{describe(run)}: failed, exit code {process.returncode}: {last} ({run.folder}/log.txt)")
        return ended

    def say(self, text):
        print(("\r\033[K" if self.terminal else "") + text, file=sys.stderr, flush=True)

    def status(self, waiting, unknown):
        if not self.terminal:
            return
        left = waiting + unknown + len(self.running)
        eta = ""
        if self.times:
            seconds = statistics.mean(self.times) * left / self.slots
            eta = f", about {int(seconds // 3600)}:{int(seconds % 3600 // 60):02d} h left"
        now = "; ".join(f"{describe(run)} {progress(run)}" for run, *_ in self.running.values())
        width = os.get_terminal_size(sys.stderr.fileno()).columns - 1
        print(f"\r\033[K{f'{left} runs to go{eta}: {now}'[:width]}", end="", file=sys.stderr, flush=True)

    def to_run(self):
        """(runs that can be started, number of those that cannot be named yet)"""
        busy = [run for run, *_ in self.running.values()]
        named = [plan.all_runs() for plan in self.plans]
        waiting = [run for runs, _ in named for run in runs
                   if run not in busy and run not in self.failed and run.result() is None]
        return waiting, sum(count for _, count in named)

    def run(self):
        """Until nothing is left to run. On a signal the runs save and end; the same command continues."""
        try:
            waiting, unknown = self.to_run()
            while True:
                if self.reap():  # a result may name further runs
                    waiting, unknown = self.to_run()
                while waiting and self.free:
                    self.start(waiting.pop(0), self.free.popleft())
                if not self.running:
                    untimed = [plan for plan in self.plans if plan.needs_timing()]
                    if not untimed or self.failed:
                        break
                    for plan in untimed:
                        self.say(f"{plan.experiment.name}: measuring the time of a step of each variant")
                        plan.measure_steps(self.threads)
                    waiting, unknown = self.to_run()
                self.status(len(waiting), unknown)
                self.wait()
        except BaseException:
            self.say("stopping: runs save their checkpoints; the same command continues them")
            for process in self.running:
                process.terminate()
            for process in self.running:
                process.wait()
            raise
        return self.failed

    def wait(self):
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and all(process.poll() is None for process in self.running):
            time.sleep(0.05)


def describe(run):
    rate = next((item for item in run.overrides if item.startswith("train.lr=")), "") if run.budget == "sweep" else ""
    kind = {"plain": "", "flops": " at equal FLOPs", "time": " at equal time", "sweep": f" sweep {rate[6:]}"}[run.budget]
    return f"{run.experiment.name} {run.variant}{kind} seed {run.seed}"


def progress(run):
    log = run.folder / "log.txt"
    steps = re.findall(rb"step (\d+/\d+)", log.read_bytes()[-2000:]) if log.exists() else []
    return steps[-1].decode() if steps else "starting"


def summary(run):
    result = run.result()
    figure = run.experiment.figure
    text = f"{figure} {result['best'].get(figure, math.nan):.4f}"
    if figure in result.get("test", {}):
        text += f", on the test set {result['test'][figure]:.4f}"
    for length, values in result.get("test_by_length", {}).items():
        text += f", {length} tokens {values[figure]:.4f}"
    return f"{text}; {result['steps']} steps in {result['seconds']:.0f} s"
