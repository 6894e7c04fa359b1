"""No kernel's stack has grown beyond what docs/kernel-resources.md records, and all wait for the one ahead of them."""

import importlib.util
import os
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "kernel_resources.py"
RECORD = ROOT / "docs" / "kernel-resources.md"
OBJECTS = ROOT / os.environ.get("BUILD", "build/release") / "cuda"


def nvcc():
    """The one that the objects were built with; its path begins what make wrote beside them."""
    try:
        return (OBJECTS / "compiled-with").read_text().split()[0]
    except (OSError, IndexError):
        return shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"


NVCC = nvcc()

spec = importlib.util.spec_from_file_location("kernel_resources", SCRIPT)
kernel_resources = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernel_resources)


def up_to_date(source):
    built = OBJECTS / source.relative_to(ROOT).with_suffix(".o")
    return built.exists() and built.stat().st_mtime >= source.stat().st_mtime


class KernelResources(unittest.TestCase):
    def run_script(self, *arguments):
        if not Path(NVCC).exists():
            self.skipTest("no nvcc")
        if not kernel_resources.find_cuobjdump(NVCC):
            self.skipTest("no cuobjdump")
        if not all(map(up_to_date, (ROOT / "kernels" / "cuda").rglob("*.cu"))):
            self.skipTest("built without CUDA")
        command = [sys.executable, SCRIPT, OBJECTS, NVCC, *arguments]
        return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    def test_waits(self):
        cuobjdump = kernel_resources.find_cuobjdump(NVCC)
        if cuobjdump and not kernel_resources.reads_machine_code(cuobjdump):
            self.skipTest("no nvdisasm")
        result = self.run_script("--waits")
        self.assertEqual(result.returncode, 0, result.stdout)

    def test_a_missing_wait_is_found(self):
        def kernel(name, *operations):
            return f"\t\tFunction : {name}\n" + "".join(
                f"        /*{i:04x}*/                   {text} ;     /* 0x0 */\n" for i, text in enumerate(operations))

        load, wait, parameter, end = "@!P0 LDG.E R2, [R2.64]", "ACQBULK", "LDC R1, c[0x0][0x28]", "EXIT"
        code = (kernel("right", parameter, wait, load, end) + kernel("early", parameter, load, wait, end)
                + kernel("never", parameter, end) + kernel("guarded", parameter, "@P1 STG.E [R2.64], R5", wait))
        self.assertEqual(kernel_resources.waits(code), (4, ["early", "never", "guarded"]))

    def test_stacks(self):
        result = self.run_script("--check", RECORD)
        if result.stdout.startswith("not compared"):
            self.skipTest(result.stdout.strip())
        self.assertEqual(result.returncode, 0, result.stdout + "make kernel-resources, if it has to be")

    def test_growth_is_found(self):
        before = {("a.cu", "f<bf16, 8>"): {"sm_80": (40, 0, 16), "sm_90": (32, 8, 1024)}, ("b.cu", "g"): {"sm_90": (9, 24, 0)}}
        grown = kernel_resources.grown
        self.assertEqual(list(grown(before, before)), [])
        less = {("a.cu", "f<bf16, 8>"): {"sm_80": (90, 0, 99), "sm_90": (32, 0, 1024)}, ("c.cu", "new"): {"sm_90": (9, 0, 0)}}
        self.assertEqual(list(grown(before, less)), [])
        more = {("a.cu", "f<bf16, 8>"): {"sm_80": (40, 8, 16), "sm_90": (32, 8, 1024)}, ("c.cu", "new"): {"sm_90": (9, 16, 0)}}
        self.assertEqual([line.split(" bytes")[0] for line in grown(before, more)],
                         ["a.cu: f<bf16, 8> on sm_80 has a stack of 8", "c.cu: new on sm_90 has a stack of 16"])

    def test_the_table_is_read_back(self):
        found = {("a.cu", "f<bf16, 8>"): {"sm_80": (40, 0, 16), "sm_90": (32, 8, 1024)}, ("b.cu", "g"): {"sm_90": (9, 24, 0)}}
        text = kernel_resources.HEAD.format(compiler="nvcc 1.2.3") + kernel_resources.table(found)
        self.assertEqual(kernel_resources.recorded(text), ("nvcc 1.2.3", found))
        compiler, recorded = kernel_resources.recorded(RECORD.read_text())
        self.assertRegex(compiler, r"^nvcc [\d.]+$")
        self.assertGreater(len(recorded), 100)

    def test_names(self):
        for name, want in (("void f<__nv_bfloat16, (act_type)0, 8>(__nv_bfloat16 const*, long)", "f<bf16, 0, 8>"),
                           ("g(float*, int)", "g"), ("void (anonymous namespace)::h<true>(int)", "h<true>")):
            self.assertEqual(kernel_resources.short(name), want)


if __name__ == "__main__":
    unittest.main()
