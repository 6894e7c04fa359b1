"""Make the CUDA libraries that PyTorch's wheel names and that are not installed: stub_cuda.py SITE_PACKAGES.

PyPI's PyTorch for x86-64 links CUDA libraries of 4 GB and does not load without them, although nothing on a CPU calls
them. Each one made here has every function that PyTorch imports from it, with its version; all return 1, an error.
"""

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

packages = Path(sys.argv[1])
folder = packages / "torch" / "lib"
libraries = sorted(folder.glob("*.so"))


def output(*command):
    return subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout


def is_installed(name):
    return (folder / name).exists() or any((packages / "nvidia").rglob(name))


needed, file_of_version, functions = set(), {}, defaultdict(set)
for library in libraries:
    needed.update(re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-dW", library)))
    file = None
    for line in output("readelf", "-VW", library).splitlines():
        if found := re.search(r"File: (\S+)", line):
            file = found[1]
        elif found := re.search(r"Name: (\S+)\s+Flags", line):
            file_of_version[found[1]] = file
    for name in re.findall(r" U (\S+)", output("nm", "-D", "--undefined-only", library)):
        name, _, version = name.partition("@")
        functions[version.lstrip("@")].add(name)

missing = sorted(name for name in needed if re.match(r"lib(cu|nccl|nv)", name) and not is_installed(name))
unversioned = {name for name in functions[""] if re.match(r"(cu[a-zA-Z]|nccl|nvrtc|nvshmem|nvJitLink)", name)}
for name in missing:
    versions = [version for version, file in file_of_version.items() if file == name]
    own = {function for version in versions for function in functions[version]}
    source, script = folder / "stub.c", folder / "stub.map"
    source.write_text("int unavailable(void) { return 1; }\n" + "".join(
        f'int {function}(void) __attribute__((alias("unavailable")));\n' for function in sorted(own | unversioned)))
    script.write_text("".join(
        f"{version} {{ global: {' '.join(f'{function};' for function in sorted(functions[version]))} }};\n"
        for version in versions))
    subprocess.run([os.environ.get("CC", "cc"), "-w", "-shared", "-fPIC", f"-Wl,-soname,{name}", source, "-o", folder / name,
                    *([f"-Wl,--version-script={script}"] if versions else [])], check=True)
