"""A few unit tests and a training run built for aarch64, under qemu. All of them: make test-aarch64, which also unpacks
the libraries that this one looks for."""

import shutil
import subprocess
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("aarch64-linux-gnu-gcc", "qemu-aarch64")
QUICK = ("test_config", "test_text", "test_files", "test_flops", "test_profile", "train_iha")


class Aarch64(unittest.TestCase):
    def test_quick_ones(self):
        missing = [tool for tool in TOOLS if not shutil.which(tool)]
        if missing:
            self.skipTest(f"{' and '.join(missing)} not installed")
        if not (ROOT / "build/distro/aarch64/unpacked").exists():
            self.skipTest("no aarch64 libraries; make test-aarch64 unpacks them")
        done = subprocess.run(["tests/aarch64/run.sh", *QUICK], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, timeout=1200)
        self.assertEqual(done.returncode, 0, done.stdout)
        self.assertRegex(done.stdout.splitlines()[-1], r"^[1-9]\d* passed, 0 failed$")


if __name__ == "__main__":
    unittest.main()
