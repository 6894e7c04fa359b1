#!/usr/bin/env python3
"""How the program is built: warnings of a compiler that this code was not tried with; what make refuses.

    python -m unittest tests.cli.test_build
"""

import os
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

from tests.lib.runs import ROOT

DISTRO = ROOT / "tests" / "distro" / "run.sh"


class Build(unittest.TestCase):
    def setUp(self):
        self.tmp = Path(tempfile.mkdtemp(prefix="build-"))
        self.addCleanup(shutil.rmtree, self.tmp, ignore_errors=True)

    def compile(self, *variables):
        """One source file, by a compiler with a warning that this code gives everywhere."""
        target = self.tmp / "kernels" / "error.o"
        command = ["make", "--no-print-directory", f"BUILD={self.tmp}", "CC=cc -Wtraditional", *variables, target]
        environment = {k: x for k, x in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "WERROR")}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        self.assertIn("-Wtraditional", done.stderr.replace("-Werror=traditional", "-Wtraditional"))
        return done.returncode, target.exists()

    def test_a_warning_is_no_error_for_users(self):
        self.assertEqual(self.compile("WERROR=0"), (0, True))
        makefile = (ROOT / "Makefile").read_text()
        self.assertIn("\nWERROR ?= 0\n", makefile)

    def test_a_warning_is_an_error_in_ci(self):
        self.assertEqual(self.compile("WERROR=1"), (2, False))
        self.assertIn("WERROR=1", (ROOT / ".ci" / "run").read_text())

    def refused(self, *args, **environment):
        done = subprocess.run([DISTRO, *args], env={**os.environ, **environment}, capture_output=True, text=True)
        self.assertEqual((done.returncode, done.stdout), (3, ""), done.stderr)  # make ends with 2
        self.assertEqual(len(done.stderr.splitlines()), 1, done.stderr)
        self.assertTrue(done.stderr.startswith("test-distro: "), done.stderr)
        return done.stderr

    def test_another_distribution_is_refused_in_one_line(self):
        programs = self.tmp / "bin"
        programs.mkdir()
        for name in ("bash", "dirname"):
            (programs / name).symlink_to(shutil.which(name))
        fake = programs / "id"
        fake.write_text("#!/bin/sh\necho $FAKE_ID\n")
        fake.chmod(0o755)
        self.assertIn("SUITE=trixie", self.refused())
        self.assertIn("SUITE=trixie", self.refused("../trixie"))
        self.assertIn("root", self.refused("trixie", PATH=str(programs), FAKE_ID="1000"))
        self.assertIn("debootstrap", self.refused("trixie", PATH=str(programs), FAKE_ID="0"))


if __name__ == "__main__":
    unittest.main()
