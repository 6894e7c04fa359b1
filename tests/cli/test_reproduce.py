"""`make reproduce`: its runs, resumed after a kill, its learning-rate sweep, its budgets, and what it writes."""

import csv
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import unittest

from tests.lib.folder_case import FolderCase
from tests.lib.runs import BINARY, ENVIRONMENT, ROOT, TIMEOUT, documents, lines_of, losses, tiny, write_shard

MAIN = ROOT / "scripts" / "reproduce" / "main.py"
EXPERIMENTS = """
import sys
sys.path.insert(0, {scripts!r})
import experiments as e

EXPERIMENTS = {{"lm": e.Experiment(
    name="lm", title="Small models", config={config!r}, data={{{data!r}: ()}}, figure="val_loss", seeds=2,
    variants={{"global": e.Variant("Global", e.MHA), "iha_p2": e.Variant("IHA P = 2", e.iha(2), seeds=1)}},
    overrides=("train.steps={steps}", "run.eval_every=3"), flops_of="global", learning_rates=(1e-5, 1e-2),
    paper={{"iha_p2": "better"}})}}
"""

LENGTHS = """
import sys
sys.path.insert(0, {scripts!r})
import experiments as e

EXPERIMENTS = {{"keys": e.Experiment(
    name="keys", title="By length", config={config!r}, data={{{data!r}: ()}}, figure="val_loss", seeds=2,
    variants={{"mha": e.Variant("MHA", e.MHA)}},
    overrides=("train.steps={steps}", "run.eval_every=2", "data.train=1 {data}/train_*.bin, 1 {data}/val_*.bin"),
    test={data!r} + "/test_{{length}}.bin", lengths=(8, 16))}}
"""

CONTINUED = """
import sys
sys.path.insert(0, {scripts!r})
import experiments as e

EXPERIMENTS = {{"up": e.Experiment(
    name="up", title="Continued", config={config!r}, data={{{data!r}: ()}}, figure="val_loss", seeds=2,
    start=("train.schedule=constant", "model.layer_pattern=mha_global", "model.position_embedding=learned"),
    variants={{"mha": e.Variant("MHA", ("train.lr=1e-3", *e.MHA)), "longer": e.Variant("Longer", e.MHA, flops_of="iha"),
               "iha": e.Variant("IHA", e.iha(2))}},
    overrides=("train.steps={steps}", "run.eval_every=2", "model.position_embedding=learned"))}}
"""


class Reproduce(FolderCase):
    def setUp(self):
        super().setUp()
        data = self.folder / "shards"
        data.mkdir()
        write_shard(data / "train_0.bin", documents(400, seed=1))
        write_shard(data / "val_0.bin", documents(40, seed=2))
        self.config = self.write("tiny.ini", tiny(data))
        self.data = data
        self.runs, self.docs = self.folder / "runs", self.folder / "docs"

    def command(self, steps, *arguments, text=EXPERIMENTS):
        file = self.write("own.py", text.format(scripts=str(MAIN.parent), config=str(self.config),
                                                data=str(self.data), steps=steps))
        return [sys.executable, str(MAIN), "--experiments", str(file), "--out", str(self.runs), "--docs",
                str(self.docs), *arguments]

    def reproduce(self, steps, *arguments, code=0, text=EXPERIMENTS):
        done = subprocess.run(self.command(steps, *arguments, text=text), env={**ENVIRONMENT, "TRAIN_IHA": BINARY}, text=True,
                              capture_output=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, code, done.stderr)
        return done

    def results(self, name="lm"):
        return {str(path.parent.relative_to(self.runs / "full" / name)): json.loads(path.read_text())
                for path in self.runs.rglob("result.json")}

    def test_other_settings_begin_anew(self):
        """The folder holds a run that has ended, with settings that have since changed."""
        self.reproduce(3, "--seeds", "1")
        self.reproduce(3, "--seeds", "1", text=EXPERIMENTS.replace("run.eval_every=3", "run.eval_every=3\", \"train.weight_decay=0.5"))
        for name, result in self.results().items():
            self.assertIn("train.weight_decay=0.5", result["overrides"], name)
            config = json.loads(next((self.runs / "full" / "lm" / name).glob("step_*/trainer.json")).read_text())
            self.assertNotIn("already finished", (self.runs / "full" / "lm" / name / "log.txt").read_text(), name)
            self.assertEqual(config["step"], result["steps"], name)

    def test_other_settings_of_the_start_begin_anew(self):
        self.reproduce(3, "--seeds", "1", text=CONTINUED)
        before = self.results("up")
        self.reproduce(3, "--seeds", "1", text=CONTINUED.replace("train.schedule=constant", "train.schedule=constant\", \"train.lr=5e-3"))
        after = self.results("up")
        self.assertEqual(sorted(before), sorted(after))
        for name in after:
            self.assertNotEqual(before[name]["final"], after[name]["final"], name)

    def test_whole(self):
        done = self.reproduce(9)
        results = self.results()
        sweeps = [f"{variant}/sweep/lr{rate}/seed1000" for variant in ("global", "iha_p2") for rate in ("1e-05", "0.01")]
        compared = ["global/flops/seed1", "global/flops/seed2", "iha_p2/flops/seed1", "iha_p2/time/seed1"]
        self.assertEqual(sorted(results), sorted(sweeps + compared))

        def flops(pattern):
            text = subprocess.run([BINARY, "info", self.config, f"model.layer_pattern={pattern}"], capture_output=True,
                                  text=True, check=True).stdout
            return float(re.search(r"^FLOPs per token .*: ([\d.]+)k$", text, re.M)[1])

        self.assertEqual(results["global/flops/seed1"]["steps"], 9)
        self.assertEqual(results["iha_p2/flops/seed1"]["steps"], round(9 * flops("mha_global") / flops("iha_global")))
        self.assertTrue(all(results[name]["steps"] == 3 for name in sweeps))
        # a rate of 1e-5 learns nothing in three steps, so the other is the best
        for name in compared:
            self.assertIn("train.lr=0.01", results[name]["command"])
        page = (self.docs / "results.md").read_text()
        table = re.findall(r"^\| (Global|IHA P = 2) \| (\S+) \| ([\d.]+) \| (\S+) \| (\d)", page, re.M)
        mean = sum(results[f"global/flops/seed{seed}"]["final"]["val_loss"] for seed in (1, 2)) / 2
        self.assertEqual([row[:2] + row[4:] for row in table[:2]], [("Global", "–", "2"), ("IHA P = 2", "better", "1")])
        self.assertEqual(table[0][2], f"{mean:.4f}")
        self.assertEqual(table[1][3], "–")
        for name in re.findall(r"\((\w+\.(?:png|csv))\)", page):
            self.assertTrue((self.docs / name).exists(), name)
        with open(self.docs / "lm_flops_tokens.csv") as file:
            rows = list(csv.DictReader(file))
        lines = lines_of(self.runs / "full" / "lm" / "global" / "flops" / "seed2" / "metrics.jsonl")
        self.assertEqual([float(row["val_loss"]) for row in rows if (row["variant"], row["seed"]) == ("global", "2")],
                         [float(f"{line['val_loss']:.6g}") for line in lines if "val_loss" in line])
        # all is there: nothing is trained again
        before = {path: path.stat().st_mtime_ns for path in self.runs.rglob("metrics.jsonl")}
        self.reproduce(9)
        self.assertEqual({path: path.stat().st_mtime_ns for path in self.runs.rglob("metrics.jsonl")}, before)
        self.assertIn("lm global at equal FLOPs seed 2: val_loss", done.stderr)

    def test_recorded(self):
        """Committed results count as done, unless the experiment has changed."""
        arguments = ["--seeds", "1"]
        self.reproduce(9, *arguments)
        page = (self.docs / "results.md").read_text()
        shutil.rmtree(self.runs)
        done = self.reproduce(9, *arguments, "--recorded")
        self.assertEqual(done.stderr, "")
        self.assertEqual((self.docs / "results.md").read_text(), page)
        self.assertEqual(list(self.runs.rglob("metrics.jsonl")), [])
        elsewhere = EXPERIMENTS.replace("run.eval_every=3", "run.eval_every=3\", \"system.device=cpu")
        self.reproduce(9, *arguments, "--recorded", text=elsewhere)  # where it is computed makes no other run of it
        self.assertEqual(list(self.runs.rglob("metrics.jsonl")), [])
        self.reproduce(9, *arguments)  # without it everything is trained again
        self.assertEqual(len(self.results()), 4 + 3)
        shutil.rmtree(self.runs)
        self.reproduce(12, *arguments, "--recorded")
        self.assertEqual(len(self.results()), 4 + 3)
        # what this command does not train stays recorded
        record = self.docs / "results" / "lm.json"
        self.reproduce(12, "--seeds", "2", "--recorded")
        before = json.loads(record.read_text())
        self.assertIn("global/flops/seed2", before["runs"])
        shutil.rmtree(self.runs)
        self.reproduce(12, *arguments, "--recorded", "--figures")
        self.assertEqual(json.loads(record.read_text()), before)
        record.write_text("<<<<<<<")
        self.assertIn("not a record of results", self.reproduce(12, "--recorded", code=2).stderr)

    def test_continued(self):
        """Every variant of a seed begins with the weights of that seed's first half, and sees other sequences."""
        self.reproduce(6, text=CONTINUED)
        results = self.results("up")
        variants = ("mha", "longer", "iha")
        self.assertEqual(sorted(results), sorted([f"start/seed{seed}" for seed in (1, 2)] +
                                                 [f"{name}/plain/seed{seed}" for name in variants for seed in (1, 2)]))
        for seed in (1, 2):
            start = self.runs / "full" / "up" / "start" / f"seed{seed}"
            self.assertIn(f"train.seed={seed} ", results[f"start/seed{seed}"]["command"])
            for name in variants:
                command = results[f"{name}/plain/seed{seed}"]["command"]
                self.assertIn(f"train.seed={500 + seed} train.init_from={start} ", command)
            log = (self.runs / "full" / "up" / "iha" / "plain" / f"seed{seed}" / "log.txt").read_text()
            self.assertIn("function preserved", log)
            losses_of_one_batch = re.search(r"^loss of one batch: (\S+) by the checkpoint's model, (\S+) by this", log, re.M).groups()
            self.assertAlmostEqual(*map(float, losses_of_one_batch), delta=1e-6)
        self.assertGreater(results["longer/plain/seed1"]["steps"], 6)
        self.assertEqual(results["iha/plain/seed1"]["steps"], 6)
        page = (self.docs / "results.md").read_text()
        less = [results[f"iha/plain/seed{seed}"]["final"]["val_loss"] - results[f"mha/plain/seed{seed}"]["final"]["val_loss"]
                for seed in (1, 2)]
        self.assertIn(f"- IHA: {sum(less) / 2:+.4f} ± ", page)
        with open(self.docs / "up.csv") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual({row["variant"] for row in rows}, {"start", *variants})
        self.assertEqual(min(int(row["tokens"]) for row in rows if row["variant"] == "iha"), (6 + 2) * 128)
        self.assertTrue((self.docs / "up.png").exists())
        # of what is recorded nothing is trained; a variant that is not there needs the first half's checkpoint
        shutil.rmtree(self.runs)
        self.assertEqual(self.reproduce(6, "--recorded", text=CONTINUED).stderr, "")
        self.assertEqual((self.docs / "results.md").read_text(), page)
        self.reproduce(6, "--recorded", "--seeds", "1", text=CONTINUED.replace("e.iha(2)", "e.iha(3)"))
        self.assertEqual(sorted(self.results("up")), ["iha/plain/seed1", "longer/plain/seed1", "start/seed1"])

    def test_lengths(self):
        """Test sets of several lengths: a table and a point in the figure for each. Trained on a mixture of data, after which
        "done:" is not the last line."""
        for length in (8, 16):
            write_shard(self.data / f"test_{length}.bin", documents(40, seed=length))
        self.reproduce(4, text=LENGTHS)
        results = self.results("keys")
        page = (self.docs / "results.md").read_text()
        with open(self.docs / "keys_by_length.csv") as file:
            rows = list(csv.DictReader(file))
        self.assertEqual([row["length"] for row in rows], ["8", "8", "16", "16"])
        for length in (8, 16):
            found = []
            for seed in (1, 2):
                best = self.runs / "full" / "keys" / "mha" / "plain" / f"seed{seed}" / "best"
                done = subprocess.run([BINARY, "eval", best, f"train.seq_len={length}", f"data.val={self.data}/test_{length}.bin"], env=ENVIRONMENT, text=True,
                                      capture_output=True, check=True, timeout=TIMEOUT)
                found.append(float(done.stdout.split()[-2]))
                result = results[f"mha/plain/seed{seed}"]
                self.assertEqual(result["test_by_length"][str(length)]["val_loss"], found[-1])
            self.assertEqual([row["val_loss"] for row in rows if row["length"] == str(length)], [f"{each:.6g}" for each in found])
            self.assertIn(f"| {sum(found) / 2:.4f} |", page.split(f"test set of {length} tokens")[1].split("\n\n")[0])

    def test_interrupted(self):
        """Stopped and started again, a run ends with the losses of one that was not."""
        steps, only = 400, ["--seeds", "1", "--jobs", "1", "--quick"]
        folder = self.runs / "quick" / "lm" / "global" / "flops" / "seed1"
        metrics = folder / "metrics.jsonl"
        with subprocess.Popen(self.command(steps, *only), env={**ENVIRONMENT, "TRAIN_IHA": BINARY},
                              stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + TIMEOUT
            while not (metrics.exists() and metrics.read_text().count("\n") > 20) and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            self.assertEqual(process.wait(TIMEOUT), 130)
            self.assertIn("the same command continues them", process.stderr.read())
        self.assertEqual(list(self.runs.rglob("result.json")), [])
        stopped_at = int(next(folder.glob("step_*")).name[5:])
        self.assertTrue(10 <= stopped_at < steps, stopped_at)
        self.reproduce(steps, *only)
        result = json.loads((folder / "result.json").read_text())
        self.assertEqual(result["steps"], steps)
        alone = shlex.split(result["command"].replace(str(folder), str(self.folder / "alone")))
        subprocess.run(alone, env=ENVIRONMENT, capture_output=True, check=True, timeout=TIMEOUT)
        self.assertEqual(losses(folder).tolist(), losses(self.folder / "alone").tolist())

    def test_page_shows_all_experiments(self):
        """Also those, and the seeds, that a command does not train."""
        both = EXPERIMENTS.replace('EXPERIMENTS = {{', 'EXPERIMENTS = {{"other": e.Experiment(name="other", title="Another one", '
                                   'config={config!r}, data={{{data!r}: ()}}, figure="val_loss", seeds=1, '
                                   'variants={{"mha": e.Variant("MHA", e.MHA)}}, overrides=("train.steps={steps}", "run.eval_every=2")), ')
        self.reproduce(4, "--quick", text=both)
        page = (self.docs / "quick" / "results.md").read_text()
        self.assertIn("Another one", page)
        self.reproduce(4, "--quick", "--only", "lm", text=both)
        self.assertEqual((self.docs / "quick" / "results.md").read_text(), page)

    def test_every_experiment_can_be_planned(self):
        """The published ones, whole and quick, before anything has been run; and those of optimizers.py."""
        plan = f"""
import sys
sys.path.insert(0, {str(MAIN.parent)!r})
from main import EXPERIMENTS, parse
from runs import Plan
from optimizers import EXPERIMENTS as OPTIMIZERS
for arguments in ([], ["--quick"]):
    for experiment in [*EXPERIMENTS.values(), *OPTIMIZERS.values()]:
        runs, unknown = Plan(experiment, parse(["--out", {str(self.runs)!r}, *arguments])).all_runs()
        print(experiment.name, len(runs) + unknown)
"""
        done = subprocess.run([sys.executable, "-c", plan], env={**ENVIRONMENT, "TRAIN_IHA": BINARY}, cwd=ROOT, text=True,
                              capture_output=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 0, done.stderr)
        counts = {}
        for line in done.stdout.splitlines():
            name, count = line.split()
            counts.setdefault(name, []).append(int(count))
        # Whole: runs of the sweep, and of each seed and budget; quick: a run of each variant that takes part.
        self.assertEqual(counts["binary"], [6 * 3 + 2, 6])
        self.assertEqual(counts["lm"], [7 * 4 + 2 * 7 * 4, 7])
        self.assertEqual(counts["multikey"], [3 * 3, 3])
        self.assertEqual(counts["upcycling"], [4 + 6 * 4, 1 + 6])
        self.assertEqual(counts["4m"][1], 2)

    def test_every_experiment_begins(self):
        """The published ones: their data is made, with few examples, and every variant trains a step on it."""
        begin = f"""
import dataclasses, json, sys
sys.path.insert(0, {str(MAIN.parent)!r})
from main import EXPERIMENTS, make_data
from runs import last_of_each_key
for experiment in EXPERIMENTS.values():
    few = {{folder: ({str(ROOT)!r} + "/" + command[0], *command[1:], "--train", "100", "--val", "50", "--test", "50")
           for folder, command in experiment.data.items() if "data/tasks.py" in command}}
    make_data(dataclasses.replace(experiment, data=few))
    for variant in experiment.variants.values():
        print(json.dumps([experiment.config, *last_of_each_key(*experiment.overrides, *variant.overrides)]))
"""
        (self.folder / "data").mkdir()
        (self.folder / "data" / "bible").symlink_to(self.data)
        (self.folder / "configs").symlink_to(ROOT / "configs")
        done = subprocess.run([sys.executable, "-c", begin], env={**ENVIRONMENT, "TRAIN_IHA": BINARY}, cwd=self.folder,
                              text=True, capture_output=True, timeout=TIMEOUT)
        self.assertEqual(done.returncode, 0, done.stderr)
        one = ["train.epochs=none", "train.patience=0", "train.steps=1", "train.warmup_steps=0", "run.eval_batches=1"]
        for number, line in enumerate(done.stdout.splitlines()):
            config, *overrides = json.loads(line)
            step = subprocess.run([BINARY, "train", config, *overrides, *one, f"run.dir=begun{number}"], env=ENVIRONMENT,
                                  cwd=self.folder, text=True, capture_output=True, timeout=TIMEOUT)
            self.assertEqual(step.returncode, 0, f"{overrides}: {step.stderr}")

    def test_bad_input(self):
        for arguments, words in ((["--only", "lm,nothing"], "there is no experiment 'nothing'"),
                                 (["--seeds", "-1"], "must be 1 or more"),
                                 (["--experiments", str(self.folder / "none.py")], "none.py")):
            done = self.reproduce(9, *arguments, code=2)
            self.assertIn(words, done.stderr)
            self.assertEqual(len(done.stderr.splitlines()), 1)
        self.config.write_text(self.config.read_text().replace("hidden_size = 16", "hidden_size = x"))
        self.assertIn("hidden_size", self.reproduce(9, code=2).stderr)

    def test_failing_run(self):
        """A run that fails is named, and the others go on."""
        (self.data / "val_0.bin").unlink()
        done = self.reproduce(9, "--quick", "--jobs", "1", code=1)
        self.assertEqual(len(re.findall(r"failed, exit code 2: .*val_\*\.bin", done.stderr)), 2)


if __name__ == "__main__":
    unittest.main()
