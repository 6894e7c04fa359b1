"""Which files may include which, and that header guards are made of paths.

Includes are followed through every header of the repository, whatever the preprocessor would skip: a rule then holds
for every build.
"""

import re
import unittest
from collections import Counter
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*(["<][^">\n]+)[">]', re.MULTILINE)
GUARD = re.compile(r"^#ifndef (\w+)\n#define (\w+)", re.MULTILINE)
IMPORT = re.compile(r"^[ \t]*(?:from|import)[ \t].*\btest_\w+.*", re.MULTILINE)
DEVICE_LIBRARIES = re.compile(r"(cuda|cublas|cudnn|nccl|mpi|omp\.|oneapi/|dnnl|cblas|openblas|nvtx)", re.IGNORECASE)
# What data/ may use of kernels/; the ranks share the checking of data.
GENERAL = {"kernels/at_start.h", "kernels/error.h", "kernels/hash.h", "kernels/clock.h", "kernels/comm.h",
           "kernels/limits.h", "kernels/tensor.h"}
ESTIMATE = {"kernels/estimate/estimate.h", "kernels/estimate/hardware.h"}  # what model/info/ may use of it


def listed(*suffixes):
    found = [path for folder in ("kernels", "model", "data", "tests") for path in (ROOT / folder).rglob("*")]
    return sorted(str(path.relative_to(ROOT)) for path in found if path.suffix in suffixes)


SOURCES = [*listed(".c", ".h", ".def", ".cc", ".cpp", ".cu", ".cuh"), "train_iha.cu"]
FAKE_HEADERS = "tests/cuda/emulator/include/"  # named as the toolkit's


@lru_cache(maxsize=None)
def includes(name):
    """What a file includes by itself: paths from the root, or "<header.h" of the system."""
    found = INCLUDE.findall((ROOT / name).read_text())
    return [path[1:] if path[0] == '"' else path for path in found]


@lru_cache(maxsize=None)
def reached(name):
    """Everything a file includes, directly or not, with the chain that leads there."""
    chains, queue = {}, [(name, (name,))]
    while queue:
        at, chain = queue.pop(0)
        for path in includes(at):
            if path not in chains:
                chains[path] = (*chain, path)
                if path in SOURCES:
                    queue.append((path, chains[path]))
    return chains


def within(folder):
    return [name for name in SOURCES if name.startswith(folder)]


def breaches(names, forbidden):
    """The chains from these files to an include that is forbidden."""
    return [" -> ".join(chain) for name in names for path, chain in reached(name).items() if forbidden(path)]


class Includes(unittest.TestCase):
    def expect_none(self, found):
        if found:
            self.fail("\n" + "\n".join(found))

    def test_quoted_includes_are_paths_from_the_root(self):
        self.expect_none([f"{name} includes {path}" for name in SOURCES if not name.startswith("tests/faults/")
                          for path in includes(name) if path[0] != "<" and path not in SOURCES])

    def test_kernels_know_neither_model_nor_data(self):
        self.expect_none(breaches(within("kernels/"), lambda path: path.startswith(("model/", "data/", "tests/"))))

    def test_model_includes_no_device_library(self):
        self.expect_none(breaches([*within("model/"), "train_iha.cu"],
                                  lambda path: path[0] == "<" and DEVICE_LIBRARIES.match(path[1:])))

    def test_model_includes_only_the_interfaces_of_kernels(self):
        inside = ("kernels/cpu/", "kernels/cuda/", "kernels/comm/", "data/", "tests/")
        self.expect_none(breaches(within("model/"), lambda path: path.startswith(inside)))
        self.expect_none([f"{name} includes {path}" for name in within("model/") for path in includes(name)
                          if path.startswith("kernels/estimate/")
                          and not (name.startswith("model/info/") and path in ESTIMATE)
                          and (name, path) != ("model/config/command_line.c", "kernels/estimate/hardware.h")])

    def test_data_uses_of_kernels_what_is_general(self):
        self.expect_none(breaches(within("data/"), lambda path: path[0] != "<" and path not in GENERAL
                                  and not path.startswith("data/")))

    def test_backends_do_not_include_each_other(self):
        backends = ["kernels/cpu/", "kernels/cuda/", "kernels/estimate/"]
        for mine in backends:
            others = tuple(other for other in backends if other != mine)
            self.expect_none(breaches(within(mine), lambda path: path.startswith(others)))

    def test_no_circle_of_files_crosses_folders(self):
        """A file is NAME.c with its NAME.h; a circle within one folder would be allowed."""
        unit = {name: name.rsplit(".", 1)[0] for name in SOURCES}
        uses = {}
        for name in [*within("kernels/"), *within("model/"), *within("data/"), "train_iha.cu"]:
            uses.setdefault(unit[name], set()).update(unit[path] for path in includes(name) if path in unit)

        def reachable(start):
            seen, queue = set(), [start]
            while queue:
                new = uses.get(queue.pop(), set()) - seen
                seen |= new
                queue += new
            return seen

        folder = {name: name.rpartition("/")[0] for name in uses}
        self.expect_none([f"{a} and {b} include each other" for a in uses for b in reachable(a)
                          if a < b and b in uses and folder[a] != folder[b] and a in reachable(b)])

    def test_no_test_includes_or_imports_another_test(self):
        found = [f"{name} includes {path}" for name in within("tests/") for path in includes(name)
                 if re.search(r"/(test|fuzz)_\w+\.\w+$", path)]
        for name in listed(".py"):
            found += [f"{name}: {line.strip()}" for line in IMPORT.findall((ROOT / name).read_text())]
        self.expect_none(found)

    def test_guards_are_made_of_paths(self):
        headers = [name for name in SOURCES if name.endswith((".h", ".cuh")) and not name.startswith(FAKE_HEADERS)]
        guards = {name: GUARD.search((ROOT / name).read_text()) for name in headers}
        wanted = {name: "IHA_" + re.sub(r"\W", "_", name).upper() for name in headers}
        self.expect_none([f"{name}: the guard is not {wanted[name]}" for name, guard in guards.items()
                          if not guard or guard.groups() != (wanted[name], wanted[name])])
        self.expect_none([guard for guard, count in Counter(wanted.values()).items() if count > 1])


if __name__ == "__main__":
    unittest.main()
