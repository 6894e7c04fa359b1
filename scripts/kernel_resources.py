#!/usr/bin/env python3
"""Registers, stack and shared memory of every CUDA kernel: docs/kernel-resources.md from the objects that nvcc wrote.

  scripts/kernel_resources.py OBJECTS_DIR NVCC [--out FILE]     make kernel-resources
  scripts/kernel_resources.py OBJECTS_DIR NVCC --check FILE     fails where a kernel's stack has grown
  scripts/kernel_resources.py OBJECTS_DIR NVCC --waits          fails where a kernel of Hopper does not begin with
                                                                wait_for_previous() (kernels/cuda/cuda.cuh)

Asks cuobjdump, of the toolkit, of the PATH, or of the wheel nvidia-cuda-cuobjdump."""

import argparse
import glob
import re
import shutil
import subprocess
import sys
from pathlib import Path

HEAD = """# Registers and memory of every kernel

Written by `make kernel-resources`, with {compiler}; not measured on a GPU. For each architecture: registers of a thread,
bytes of its stack, bytes of a block's static shared memory (1,024 of them are the system's on sm_90). A stack holds
registers that were spilled, and arrays that are indexed at run time; it should be 0 or small. `tests/cuda/test_kernel_resources.py`
fails where one has grown.

"""
ROW = re.compile(r"^\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) ")


def find_cuobjdump(nvcc):
    beside = Path(nvcc).with_name("cuobjdump")
    wheels = glob.glob(".venv/lib/python3*/site-packages/nvidia/cu*/bin/cuobjdump")
    return str(beside) if beside.exists() else shutil.which("cuobjdump") or (wheels[0] if wheels else None)


def reads_machine_code(cuobjdump):
    return shutil.which("nvdisasm") or Path(cuobjdump).with_name("nvdisasm").exists()


def compiler_of(nvcc):
    text = subprocess.run([nvcc, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return "nvcc " + re.search(r"V([\d.]+)", text)[1]


def short(name):
    """void f<__nv_bfloat16, 8>(...) -> f<bf16, 8>"""
    name = name.replace("(anonymous namespace)::", "").replace("__nv_bfloat16", "bf16")
    name = re.sub(r"\((?:[a-z_]+|unsigned int)\)(?=\d)", "", name)  # (act_type)0 among template arguments
    depth = 0
    for i, c in enumerate(name):  # the parameters begin at the first parenthesis outside of template arguments
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            name = name[:i]
            break
    return re.sub(r"^void ", "", name).strip()


def resources(cuobjdump, objects):
    """{(source, kernel): {arch: (registers, stack, shared)}}"""
    found = {}
    for path in sorted(Path(objects).glob("kernels/cuda/**/*.o")):
        done = subprocess.run([cuobjdump, "--dump-resource-usage", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
        if "does not contain device code" in done.stdout:
            continue  # host code alone
        if done.returncode != 0:
            sys.exit(f"kernel_resources: {done.stdout.strip()}")
        text = done.stdout
        text = subprocess.run(["c++filt"], input=text, stdout=subprocess.PIPE, text=True, check=True).stdout
        source = path.relative_to(Path(objects) / "kernels/cuda").with_suffix(".cu").as_posix()
        arch = kernel = None
        for line in text.splitlines():
            if line.startswith("arch = "):
                arch = line.split()[2]
            elif line.startswith(" Function "):
                kernel = short(line[len(" Function "):].rstrip(":"))
            elif kernel and (match := ROW.match(line)):
                found.setdefault((source, kernel), {})[arch] = tuple(map(int, match.groups()))
                kernel = None
    return found


INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w*)", re.M)
GLOBAL_MEMORY = {"LDG", "STG", "LD", "ST", "ATOM", "ATOMG", "RED", "REDG", "LDGSTS", "UBLKPF", "UBLKCP", "UTMALDG", "CCTL"}


def waits(machine_code):
    """(kernels, names of those that access memory before they wait for the kernel ahead), from `cuobjdump -sass`."""
    kernels = re.split(r"^\s*Function : ", machine_code, flags=re.M)[1:]
    early = []
    for text in kernels:
        for operation in INSTRUCTION.findall(text):
            if operation == "ACQBULK":
                break
            if operation in GLOBAL_MEMORY:
                early.append(text.split("\n")[0].strip())
                break
        else:
            early.append(text.split("\n")[0].strip())
    return len(kernels), early


def check_waits(cuobjdump, objects):
    count, early = 0, []
    for path in sorted(Path(objects).glob("kernels/cuda/**/*.o")):
        done = subprocess.run([cuobjdump, "-sass", "-arch", "sm_90", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              text=True)
        if done.returncode != 0 and "does not contain device code" not in done.stdout:
            sys.exit(f"kernel_resources: {path}: {done.stdout.strip()}")
        kernels, names = waits(done.stdout)
        count += kernels
        early += [f"{path.name}: {name} does not begin with wait_for_previous()" for name in names]
    if count == 0:
        sys.exit(f"kernel_resources: no kernels for sm_90 in {objects}")
    print("\n".join(early) or f"{count} kernels, all wait for the one ahead first")
    return 1 if early else 0


def table(found):
    archs = sorted({arch for each in found.values() for arch in each})
    lines = ["| file | kernel | " + " | ".join(f"{arch}: registers | stack | shared" for arch in archs) + " |",
             "|---" * (2 + 3 * len(archs)) + "|"]
    for (source, kernel), each in sorted(found.items()):
        cells = [str(x) for arch in archs for x in each.get(arch, ("–",) * 3)]
        lines.append(f"| {source} | `{kernel}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def recorded(text):
    """The compiler, and the table as resources() returns it."""
    compiler = re.search(r"with (nvcc [\d.]+)", text)[1]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| ")]
    archs = [cell.split(":")[0] for cell in rows[0][2::3]]
    found = {}
    for row in rows[1:]:
        numbers = row[2:]
        found[(row[0], row[1].strip("`"))] = {
            arch: tuple(map(int, numbers[3 * i:3 * i + 3])) for i, arch in enumerate(archs) if numbers[3 * i] != "–"}
    return compiler, found


def grown(before, now):
    """A line for each kernel whose stack is larger than recorded; a kernel that is not recorded should have none."""
    for (source, kernel), each in sorted(now.items()):
        for arch, (_, stack, _) in each.items():
            was = before.get((source, kernel), {}).get(arch, (0, 0, 0))[1]
            if stack > was:
                yield f"{source}: {kernel} on {arch} has a stack of {stack} bytes, where {was} are recorded"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("objects")
    parser.add_argument("nvcc")
    parser.add_argument("--out")
    parser.add_argument("--check")
    parser.add_argument("--waits", action="store_true")
    args = parser.parse_args()
    cuobjdump = find_cuobjdump(args.nvcc)
    if not cuobjdump:
        sys.exit("kernel_resources: no cuobjdump beside nvcc or in the PATH; run: make deps")
    if args.waits:
        if not reads_machine_code(cuobjdump):
            sys.exit(f"kernel_resources: no nvdisasm beside {cuobjdump} or in the PATH; run: make deps")
        sys.exit(check_waits(cuobjdump, args.objects))
    found = resources(cuobjdump, args.objects)
    if not found:
        sys.exit(f"kernel_resources: no kernels in {args.objects}; make cuda-objects builds them")
    if args.check:
        compiler, before = recorded(Path(args.check).read_text())
        if compiler != compiler_of(args.nvcc):
            return print(f"not compared: recorded with {compiler}, built with {compiler_of(args.nvcc)}")
        lines = list(grown(before, found))
        print("\n".join(lines) or f"{len(found)} kernels, none with more stack than recorded")
        sys.exit(1 if lines else 0)
    text = HEAD.format(compiler=compiler_of(args.nvcc)) + table(found)
    if args.out:
        Path(args.out).write_text(text)
    else:
        print(text, end="")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:
        sys.exit(f"kernel_resources: {error}")
    except OSError as error:
        sys.exit(f"kernel_resources: {error.filename}: {error.strerror}")
