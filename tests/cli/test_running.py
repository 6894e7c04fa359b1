#!/usr/bin/env python3
"""Runs in surroundings as they are: signals, limits, files that change or may not be used, and the options of generate.

    make && python -m unittest tests.cli.test_running
"""

import glob
import json
import os
import resource
import signal
import subprocess
import time
import unittest
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.lib.runs import BINARY, CPU, ENVIRONMENT, TIMEOUT, Case, documents, lines_of, losses, start, step_dir, \
    steps_in, tree, without_timings
from tests.lib.tiny import write_shard

ENDLESS = ["train.steps=1000000000", "train.schedule=constant", "data.val=none"]
NOBODY = 65534


class Running(Case):
    def begin(self, *overrides, step=3, run_dir=None, **options):
        """A run without end that has done some steps."""
        run_dir = run_dir or self.new_dir()
        process = start("train", self.config, f"run.dir={run_dir}", *ENDLESS, *overrides, **options)
        self.addCleanup(self.end, process)
        self.reach(process, run_dir, step)
        return process, run_dir

    def reach(self, process, run_dir, step):
        metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + TIMEOUT
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
            if process.poll() is not None:
                self.fail(f"the run ended early: {process.stderr.read().decode()}")
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.005)

    def wait(self, process, code):
        """The lines of an error on stderr, without status lines."""
        err = process.communicate(timeout=TIMEOUT)[1].decode()
        self.assertEqual(process.returncode, code, err)
        return [line for line in err.splitlines() if line.startswith("train_iha: ")]

    def one_line(self, lines, *names):
        self.assertEqual(len(lines), 1, lines)
        for name in names:
            self.assertIn(str(name), lines[0])


# ---- signals -------------------------------------------------------------------------------------------------------

class Signals(Running):
    def begin_ignoring(self, *numbers):
        def ignore():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN if number in numbers else signal.SIG_DFL)
        return self.begin(preexec_fn=ignore)

    def test_hangup_saves(self):
        process, run_dir = self.begin_ignoring()
        process.send_signal(signal.SIGHUP)
        err = process.communicate(timeout=TIMEOUT)[1].decode()
        self.assertEqual(process.returncode, 0, err)
        self.assertIn("stopped by signal 1 after step", err)
        self.assertEqual(len(steps_in(run_dir)), 1)

    def test_limit_of_cpu_time(self):
        # The kernel sends SIGXCPU at the soft limit and then every second.
        process, run_dir = self.begin(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (1, 30)))
        err = process.communicate(timeout=TIMEOUT)[1].decode()
        self.assertEqual(process.returncode, 0, err)
        self.assertIn(f"stopped by signal {signal.SIGXCPU:d} after step", err)
        self.assertEqual(len(steps_in(run_dir)), 1)

    def test_repeated_cpu_signal_is_no_second_one(self):
        # The run blocks in writing the sample of step 4 to a pipe, and looks for signals after step 5.
        run_dir = self.new_dir()
        run_dir.mkdir()
        os.mkfifo(run_dir / "samples.txt")
        process, _ = self.begin("run.sample_every=4", step=4, run_dir=run_dir)
        time.sleep(0.5)  # from the line of step 4 to its sample
        for _ in range(2):
            process.send_signal(signal.SIGXCPU)
            time.sleep(1.1)
        self.assertIsNone(process.poll())
        with open(run_dir / "samples.txt", "rb") as samples:
            samples.read()
        self.assertEqual(self.wait(process, 0), [])
        self.assertEqual(steps_in(run_dir), [5])

    def test_what_was_ignored_at_start_stays_ignored(self):
        for ignored in ([signal.SIGHUP], [signal.SIGINT, signal.SIGQUIT], [signal.SIGTERM]):
            with self.subTest(ignored):
                process, run_dir = self.begin_ignoring(*ignored)
                for number in ignored:
                    process.send_signal(number)
                done = len(lines_of(run_dir / "metrics.jsonl"))
                self.reach(process, run_dir, done + 20)
                process.send_signal(signal.SIGUSR1)
                self.assertEqual(self.wait(process, 0), [])

    def test_in_a_script_with_an_ampersand(self):
        # A shell without job control lets such a command ignore SIGINT and SIGQUIT.
        run_dir = self.new_dir()
        script = f"'{BINARY}' train '{self.config}' run.dir='{run_dir}' {' '.join(ENDLESS)} 2>/dev/null & echo $!; wait"
        shell = subprocess.Popen(["bash", "-c", script], env=ENVIRONMENT, stdout=subprocess.PIPE,
                                 preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        self.addCleanup(self.end, shell)
        pid = int(shell.stdout.readline())
        self.addCleanup(lambda: Path(f"/proc/{pid}").exists() and os.kill(pid, signal.SIGKILL))
        self.reach(shell, run_dir, 3)
        os.kill(pid, signal.SIGINT)
        self.reach(shell, run_dir, len(lines_of(run_dir / "metrics.jsonl")) + 20)
        os.kill(pid, signal.SIGTERM)
        self.assertEqual(shell.wait(TIMEOUT), 0)
        self.assertEqual(len(steps_in(run_dir)), 1)


# ---- limits and disks ----------------------------------------------------------------------------------------------

def limit_files(size):
    """For preexec_fn: files may have at most `size` bytes, as by `ulimit -f`."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


class Limits(Running):
    def limited(self, *args, code=1, size=0, output=None):
        with open(output or self.tmp / "output", "wb") as out:
            done = subprocess.run([BINARY, *map(str, args)], env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=out,
                                  stderr=subprocess.PIPE, timeout=TIMEOUT, cwd=self.tmp, preexec_fn=limit_files(size))
        err = done.stderr.decode()
        self.assertEqual(done.returncode, code, err)
        return [line for line in err.splitlines() if line.startswith("train_iha: ")]

    def test_file_size_limit_in_training(self):
        saving = ["run.save_every=5", "train.schedule=constant"]
        reference = self.train(*saving)
        weights = (step_dir(reference, 20) / "model.safetensors").stat().st_size
        # starts.jsonl is the first file that grows to the one size, metrics.jsonl to the other.
        for name, size, steps in (("starts.jsonl", 1000, 20), ("metrics.jsonl", 6000, 60)):
            run_dir = self.new_dir()
            lines = self.limited("train", self.config, f"run.dir={run_dir}", f"train.steps={steps}", size=size)
            self.one_line(lines, run_dir / name, "File too large", "ulimit -f")
        # A later checkpoint does not fit.
        run_dir = self.train(*saving, "train.steps=5")
        lines = self.limited("train", self.config, f"run.dir={run_dir}", *saving, size=weights // 2)
        self.one_line(lines, "step_000000", "File too large", "ulimit -f")
        self.assertEqual(steps_in(run_dir), [5])
        self.assertEqual([p.name for p in run_dir.glob("*.tmp")], [])
        self.train(*saving, run_dir=run_dir)
        self.assertEqual(tree(step_dir(run_dir, 20))["model.safetensors"],
                         tree(step_dir(reference, 20))["model.safetensors"])

    def test_standard_output(self):
        run_dir = self.train("train.steps=2")
        for args in (["info", self.config], ["info", run_dir], ["eval", run_dir, *CPU],
                     ["generate", run_dir, "--prompt", "anna", "--tokens", "400"], ["--help"], ["info", "--help"]):
            with self.subTest(args):
                self.one_line(self.limited(*args), "standard output", "File too large", "ulimit -f")
                if os.path.exists("/dev/full"):
                    self.one_line(self.limited(*args, output="/dev/full"), "standard output", "No space left")

    def as_nobody(self, *args, code=2):
        """Run as a user without rights in this test's folders."""
        options = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.getuid() == 0 else {}
        done = subprocess.run([BINARY, *map(str, args)], env=ENVIRONMENT, capture_output=True, timeout=TIMEOUT,
                              cwd="/", stdin=subprocess.DEVNULL, **options)
        if done.returncode in (126, 127):
            self.skipTest("that user may not run the program")
        self.assertEqual(done.returncode, code, done.stderr)
        return done.stderr.decode().splitlines()

    def test_folders_without_permission(self):
        os.chmod(self.tmp, 0o755)
        for p in (self.data, self.tmp):
            self.addCleanup(os.chmod, p, 0o755)
        locked = self.new_dir()
        os.chmod(locked.parent, 0o755)
        locked.mkdir()
        os.chmod(locked, 0o555)
        self.one_line(self.as_nobody("train", self.config, f"run.dir={locked}/a"), locked, "Permission denied")
        self.one_line(self.as_nobody("train", self.config, f"run.dir={locked}"), locked, "Permission denied")
        os.chmod(self.data, 0o700 if os.getuid() == 0 else 0)
        lines = self.as_nobody("train", self.config, f"run.dir={locked}")
        self.one_line(lines, f"{self.data}: Permission denied")

    def test_odd_terminals(self):
        prompt = "café 日本".encode()
        expected = None
        for odd in ({}, {"LC_ALL": "C"}, {"LC_ALL": "xx_YY.nothing", "TERM": "dumb"}, {"TERM": "", "LANG": "C"}):
            env = {k: x for k, x in ENVIRONMENT.items() if k not in ("LC_ALL", "LANG", "TERM")} | odd
            run_dir = self.new_dir("ein ordner é")
            done = subprocess.run([BINARY, "train", self.config, f"run.dir={run_dir}", "train.steps=2"], env=env,
                                  capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
            self.assertEqual(done.returncode, 0, done.stderr)
            out = subprocess.run([BINARY, "generate", run_dir, "--prompt", prompt, "--tokens", "5"], env=env,
                                 capture_output=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
            self.assertTrue(out.stdout.startswith(prompt), out)
            expected = expected or out.stdout
            self.assertEqual(out.stdout, expected)

    def test_closed_standard_streams(self):
        # Files must not take the numbers of streams that are closed.
        run_dir = self.new_dir()
        done = subprocess.run(["bash", "-c", f"'{BINARY}' train '{self.config}' run.dir='{run_dir}' <&- 2>&-"],
                              env=ENVIRONMENT, timeout=TIMEOUT, stdout=subprocess.DEVNULL)
        self.assertEqual(done.returncode, 0)
        reference = self.train()
        self.assertEqual(*(without_timings(lines_of(r / "metrics.jsonl")) for r in (run_dir, reference)))
        self.assertEqual(*(sorted(tree(step_dir(r, 20))) for r in (run_dir, reference)))


# ---- data that changes ---------------------------------------------------------------------------------------------

class ChangedData(Running):
    def copy_data(self):
        data = self.new_dir("shards")
        data.mkdir()
        for p in self.data.glob("*.bin"):
            (data / p.name).write_bytes(p.read_bytes())
        return data

    def change(self, path, how):
        content = bytearray(path.read_bytes())
        if how == "truncated":
            os.truncate(path, len(content) // 3)
        elif how == "emptied":
            os.truncate(path, 0)
        elif how == "rewritten":
            write_shard(path, documents(100, 77))
        elif how == "ids":
            content[1024 + 1200:-1200] = b"\xff" * (len(content) - 1024 - 2400)
            with open(path, "r+b") as f:
                f.write(content)
        elif how == "wide":
            write_shard(path, documents(160, 1), wide=True)

    def test_while_training(self):
        for how in ("truncated", "emptied", "rewritten", "ids", "wide"):
            with self.subTest(how):
                data = self.copy_data()
                process, run_dir = self.begin(f"data.train={data}/train_*.bin", "run.save_every=1", step=8)
                self.change(data / "train_1.bin", how)
                self.one_line(self.wait(process, 1), data / "train_1.bin", "changed")
                # The last checkpoint is good: with the data back, the run goes on as if nothing had happened.
                last = steps_in(run_dir)[-1]
                more = [f"train.steps={last + 2}", "train.schedule=constant", "data.val=none"]
                self.train(*more, run_dir=run_dir)
                self.assertIn(f"resuming from {step_dir(run_dir, last)}", self.last.stderr.decode())
                self.assertTrue(np.isfinite(losses(run_dir)).all())
                straight = self.train(*more)
                self.assertEqual(*(without_timings(lines_of(r / "metrics.jsonl")) for r in (run_dir, straight)))

    def test_what_does_not_matter(self):
        data = self.copy_data()
        process, run_dir = self.begin(f"data.train={data}/train_*.bin")
        for p in data.glob("train_*.bin"):
            os.utime(p)
        self.reach(process, run_dir, len(lines_of(run_dir / "metrics.jsonl")) + 30)
        for p in data.glob("*.bin"):
            p.unlink()
        self.reach(process, run_dir, len(lines_of(run_dir / "metrics.jsonl")) + 30)
        process.send_signal(signal.SIGTERM)
        self.assertEqual(self.wait(process, 0), [])

    def test_validation_data(self):
        data = self.copy_data()
        process, run_dir = self.begin(f"data.val={data}/val_*.bin", "run.eval_every=1", "run.save_every=1")
        self.change(data / "val_0.bin", "truncated")
        self.one_line(self.wait(process, 1), data / "val_0.bin", "changed")
        self.assertTrue(steps_in(run_dir))


# ---- paths ---------------------------------------------------------------------------------------------------------

class Paths(Case):
    def test_quotes_and_home(self):
        home = self.new_dir("home [of] a*")
        data = home / "my data"
        data.mkdir(parents=True)
        for p in self.data.glob("*.bin"):
            (data / p.name).write_bytes(p.read_bytes())
        text = self.config.read_text().replace(f"train = {self.data}/", 'train = "~/my data/').replace(
            "train_*.bin", 'train_*.bin"')
        config = self.new_dir("quoted.ini")
        config.write_text(text)
        run_dir = home / "runs" / "a"
        done = subprocess.run([BINARY, "train", config, "run.dir=~/runs/a", "data.val='~/my data/val_*.bin'"],
                              env={**ENVIRONMENT, "HOME": str(home)}, capture_output=True, timeout=TIMEOUT, cwd=self.tmp)
        self.assertEqual(done.returncode, 0, done.stderr)
        recorded = json.loads((step_dir(run_dir, 20) / "trainer.json").read_text())["config"]
        self.assertEqual((recorded["data.train"], recorded["run.dir"]),
                         (f"{glob.escape(str(data))}/train_*.bin", str(run_dir)))
        self.run_cli("eval", run_dir, *CPU)

    def test_recorded_paths_are_relative_to_the_current_directory(self):
        run_dir = self.new_dir()
        self.run_cli("train", self.config, f"run.dir={run_dir}", "data.val=data/val_*.bin", "train.steps=2")
        self.run_cli("eval", run_dir, *CPU)
        elsewhere = self.new_dir("elsewhere")
        elsewhere.mkdir()
        checkpoint = step_dir(run_dir, 2)
        self.refused("eval", run_dir, cwd=elsewhere,
                     names=["'data/val_*.bin' relative to the current directory", elsewhere, checkpoint, "recorded"])
        line = self.refused("eval", run_dir, "data.val=x/*.bin", cwd=elsewhere, names=["'x/*.bin'", elsewhere])
        self.assertNotIn("recorded", line)


# ---- generate ------------------------------------------------------------------------------------------------------

class GenerateOptions(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.run_dir = cls.tmp / "trained"
        subprocess.run([BINARY, "train", cls.config, f"run.dir={cls.run_dir}", "train.steps=60"], check=True,
                       capture_output=True, timeout=TIMEOUT, env=ENVIRONMENT)

    def generate(self, *args, stdin=b"", run_dir=None, code=0):
        done = subprocess.run([BINARY, "generate", run_dir or self.run_dir, *map(str, args), *CPU], env=ENVIRONMENT,
                              input=stdin, capture_output=True, timeout=TIMEOUT, cwd=self.tmp)
        self.assertEqual(done.returncode, code, done.stderr)
        return done if code else done.stdout

    def test_prompt_from_a_file(self):
        for prompt in (b"anna sees", b"anna\nsees\n", "caf\u00e9 \u65e5".encode(), b""):
            file = self.tmp / "prompt.txt"
            file.write_bytes(prompt)
            expected = self.generate("--prompt", prompt.decode(), "--tokens", 20)
            self.assertEqual(self.generate("--prompt-file", file, "--tokens", 20), expected)
            self.assertEqual(self.generate("--prompt-file", "-", "--tokens", 20, stdin=prompt), expected)
            marked = b"\xef\xbb\xbf" + prompt  # a byte order mark is no text
            self.assertEqual(self.generate("--prompt-file", "-", "--tokens", 20, stdin=marked), expected)
            self.assertEqual(self.generate("--prompt-file", "/dev/stdin", "--tokens", 20, stdin=prompt), expected)
        self.assertTrue(self.generate("--prompt-file", "-", "--tokens", 5, stdin=b"a\0b").startswith(b"a\0b"))
        long = b"anna sees boris. " * 300
        self.assertTrue(self.generate("--prompt-file", "-", "--tokens", 1, stdin=long).startswith(long))
        done = subprocess.run([BINARY, "generate", self.run_dir, "--prompt-file", "-"], env=ENVIRONMENT, stderr=subprocess.PIPE,
                              timeout=TIMEOUT, preexec_fn=lambda: os.close(0))
        self.assertEqual(done.returncode, 2)
        self.assertIn(b"the standard input is closed", done.stderr)
        self.refused("generate", self.run_dir, "--prompt-file", self.tmp / "missing", names=["missing", "No such file"])
        self.refused("generate", self.run_dir, "--prompt-file", self.tmp, names=[self.tmp, "Is a directory"])
        self.refused("generate", self.run_dir, "--prompt-file", "-", "--prompt", "a", names=["both"])

    def test_ids_from_a_file(self):
        run_dir = self.new_dir()
        self.run_cli("train", self.config, f"run.dir={run_dir}", "train.steps=2", "data.tokenizer=none")
        out = self.generate("--prompt-file", "-", "--tokens", 3, stdin=b"7 8\n9\n", run_dir=run_dir)
        self.assertEqual(out.split()[:3], [b"7", b"8", b"9"])
        done = self.generate("--prompt-file", "-", stdin=b"7 x", run_dir=run_dir, code=2)
        self.assertIn(b"--prompt-file: the checkpoint has no tokenizer", done.stderr)
        done = self.generate("--prompt", "1", "--stop", "2", run_dir=run_dir, code=2)
        self.assertIn(b"--stop needs a tokenizer", done.stderr)

    def test_stop(self):
        args = ["--prompt", "anna", "--tokens", 100, "--temperature", 0]
        whole = self.generate(*args)[:-1]
        self.assertGreater(len(whole), 30)
        for begin in range(4, len(whole) - 6, 7):
            for length in (1, 3, 6):
                stop = whole[begin:begin + length]
                try:
                    stop.decode()
                except UnicodeDecodeError:
                    continue
                if b"\0" in stop:
                    continue
                first = whole.index(stop, 4)  # the prompt does not count
                self.assertEqual(self.generate(*args, "--stop", stop.decode()), whole[:first] + b"\n")
        self.assertEqual(self.generate(*args, "--stop", "not in the text"), whole + b"\n")
        # The end is the beginning of the stop.
        self.assertEqual(self.generate(*args, "--stop", (whole[-3:] + b"\x01").decode(errors="ignore") or "x"),
                         whole + b"\n")
        self.refused("generate", self.run_dir, "--stop", "", names=["--stop is empty"])

    def test_top_p(self):
        args = ["--prompt", "pa", "--tokens", 60, "--temperature", 1.5]
        greedy = self.generate(*args[:-1], 0)
        self.assertEqual(self.generate(*args, "--top-p", 0), greedy)
        self.assertEqual(self.generate(*args, "--top-p", 1e-6), greedy)
        self.assertEqual(self.generate(*args, "--top-p", 1), self.generate(*args))
        self.assertNotEqual(self.generate(*args, "--top-p", 0.5), self.generate(*args))
        for wrong in ("1.5", "-0.1", "nan", "x"):
            self.refused("generate", self.run_dir, "--top-p", wrong, names=["--top-p", wrong])

    def test_longer_than_the_model_was_trained_for(self):
        def warnings(*args):
            done = self.run_cli("generate", self.run_dir, *args, *CPU)
            lines = done.stderr.decode().splitlines()
            self.assertTrue(all(line.startswith("warning: ") for line in lines), lines)
            return lines

        self.assertEqual(warnings("--prompt", "anna", "--tokens", 28), [])
        lines = warnings("--prompt", "anna", "--tokens", 29)
        self.assertEqual(len(lines), 1)
        for part in ("4 tokens of prompt", "29", "max_position_embeddings = 32"):
            self.assertIn(part, lines[0])
        self.assertEqual(len(warnings("--prompt", "a" * 40, "--tokens", 0)), 1)


# ---- another vocabulary --------------------------------------------------------------------------------------------

class ResizedVocabulary(Case):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.sources = {}
        for tied in ("true", "false"):
            cls.sources[tied] = cls.tmp / f"source_{tied}"
            subprocess.run([BINARY, "train", cls.config, f"run.dir={cls.sources[tied]}",
                            f"model.tie_word_embeddings={tied}"], check=True, capture_output=True, timeout=TIMEOUT,
                           env=ENVIRONMENT)

    def resized(self, tied, vocab, *more):
        return self.train(f"model.tie_word_embeddings={tied}", f"model.vocab_size={vocab}", "train.steps=1", "train.lr=0",
                          f"train.init_from={self.sources[tied]}", "train.resize_vocab=true", *more)

    def weights(self, run_dir, step):
        return load_file(step_dir(run_dir, step) / "model.safetensors")

    def test_refused_without_the_key(self):
        for vocab, what in ((300, "mean"), (258, "mean"), (260, "mean")):
            run_dir = self.new_dir()
            self.refused("train", self.config, f"run.dir={run_dir}", f"model.vocab_size={vocab}",
                         f"train.init_from={self.sources['true']}",
                         names=["vocab_size 257", f"model.vocab_size is {vocab}", "train.resize_vocab = true", what])
        # The key alone changes nothing.
        run_dir = self.train("train.steps=1", "train.lr=0", f"train.init_from={self.sources['true']}",
                             "train.resize_vocab=true")
        self.assertEqual(tree(step_dir(run_dir, 1))["model.safetensors"],
                         tree(step_dir(self.sources["true"], 20))["model.safetensors"])

    def test_new_rows_are_the_mean(self):
        for tied in ("true", "false"):
            old = self.weights(self.sources[tied], 20)
            new = self.weights(self.resized(tied, 300), 1)
            line, = [x for x in self.last.stderr.decode().splitlines() if x.startswith("weights from ")]
            for part in (step_dir(self.sources[tied], 20), "vocab_size 257 is now 300", "43 new rows", "mean"):
                self.assertIn(str(part), line)
            self.assertEqual(set(old), set(new))
            self.assertEqual("lm_head.weight" in new, tied == "false")
            for name in old:
                rows = old[name].shape[0]
                np.testing.assert_array_equal(new[name][:rows], old[name])
                if name in ("embed.weight", "lm_head.weight"):
                    self.assertEqual(new[name].shape, (300, 16))
                    mean = old[name].astype(np.float64).mean(0).astype(np.float32)
                    np.testing.assert_allclose(new[name][rows:], np.tile(mean, (43, 1)), rtol=1e-6, atol=1e-9)

    def test_surplus_rows_are_left_out(self):
        data = self.new_dir("small")
        data.mkdir()
        write_shard(data / "train.bin", np.arange(2000) % 200)
        for tied in ("true", "false"):
            old = self.weights(self.sources[tied], 20)
            more = [f"data.train={data}/train.bin", "data.val=none", "data.tokenizer=none"]
            new = self.weights(self.resized(tied, 200, *more), 1)
            self.assertIn("the last 57 rows are left out", self.last.stderr.decode())
            for name in old:
                np.testing.assert_array_equal(new[name], old[name][:200] if "embed" in name or "head" in name
                                              else old[name])

    def moments(self, run_dir, step):
        """{name: {tensor: moment}} of the only optimizer file; the packed order is that of model.safetensors' list in
        the model: embeddings, layers, norm, head."""
        folder = step_dir(run_dir, step)
        flat, weights = load_file(folder / "optimizer-00000-of-00001.safetensors"), self.weights(run_dir, step)
        with open(folder / "model.safetensors", "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        order = sorted(weights, key=lambda name: header[name]["data_offsets"][0])
        found = {}
        for moment in ("exp_avg", "exp_avg_sq"):
            at, found[moment] = 0, {}
            for name in order:
                found[moment][name] = flat[moment][at:at + weights[name].size].reshape(weights[name].shape)
                at += weights[name].size
            self.assertEqual(at, flat[moment].size)
        return found

    def test_kept_moments(self):
        # At lr = 0 a step adds (1 - beta) of its gradient; the fresh run shows how much that is.
        for tied in ("true", "false"):
            old = self.moments(self.sources[tied], 20)
            fresh = self.moments(self.resized(tied, 300), 1)
            kept = self.moments(self.resized(tied, 300, "train.init_optimizer=keep"), 1)
            for moment, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.95)):
                for name, before in old[moment].items():
                    expected = fresh[moment][name].copy()
                    expected[:before.shape[0]] += np.float32(beta) * before
                    np.testing.assert_allclose(kept[moment][name], expected, rtol=1e-4, atol=1e-9)

    def test_without_init_from(self):
        self.train("train.resize_vocab=true", "train.steps=1")
        self.assertIn(b"warning: train.resize_vocab = true has no effect without train.init_from", self.last.stderr)

    def test_trains_and_resumes(self):
        more = ["model.vocab_size=400", "train.resize_vocab=true", f"train.init_from={self.sources['true']}"]
        run_dir = self.train(*more, "train.steps=4", "train.schedule=constant")
        self.assertLess(losses(run_dir)[0], 5)  # ln 257 = 5.5
        self.train(*more, "train.steps=6", "train.schedule=constant", run_dir=run_dir)
        straight = self.train(*more, "train.steps=6", "train.schedule=constant")
        self.assertEqual(*(without_timings(lines_of(r / "metrics.jsonl")) for r in (run_dir, straight)))
        self.refused("train", self.config, f"run.dir={run_dir}", *more, "train.resize_vocab=false",
                     names=["another run", "train.resize_vocab"])


if __name__ == "__main__":
    unittest.main()
