"""What README.md and docs/ say is so: their commands run, their links lead somewhere, the files and functions they name
exist, and the tables of configuration.md are those of the program.

    make && python -m unittest tests.cli.test_docs

Commands are the fenced blocks marked `sh`. Those of one document run in order, in a folder of their own that looks like
the repository; there ./train_iha adds overrides that make every training run tiny, and `make` only checks that its
targets exist (make -n), since this test itself is part of `make test`. A block that cannot run here has a comment in the
line before it that gives one of REASONS:

    <!-- not tried: needs a GPU -->

A `text` block after the comment <!-- output --> is what the commands before it print: its lines must come in that order
in their output; … stands for what is left out, at the end of a line or in a line of its own.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import unittest
from pathlib import Path

from tests.lib.tiny import write_shard

ROOT = Path(__file__).resolve().parent.parent.parent
BINARY = str(Path(os.environ.get("TRAIN_IHA", ROOT / "train_iha")).resolve())
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TIMEOUT = 300  # seconds for one block; most take less than two, but the machine may be busy

REASONS = ("needs a GPU", "needs a cluster", "needs the network", "takes too long", "part of make test", "needs PyTorch")
LANGUAGES = ("sh", "text", "ini", "python")
COMMANDS = ("./train_iha", "make", "scripts/", "data/", ".venv/", "mpirun", "srun", "sbatch", "torchrun", "$ ")
README_LINES = 130

# 8 steps, so that --profile 5 has its three before them.
SMALL = ("train.steps=8 train.warmup_steps=0 train.seq_len=32 train.micro_batch=2 train.batch_tokens=128 "
         "model.hidden_size=32 model.intermediate_size=64 run.eval_batches=2 run.sample_every=0 system.threads=1")
SMALL_TASK = ("train.epochs=0.002 train.micro_batch=2 model.hidden_size=32 model.intermediate_size=64 "
              "run.eval_batches=2 system.threads=1")  # sequences as long as in the task's shards
CONVERSATIONS = """\
mkdir -p data/corpus
for word in a b c d e f g h; do
    echo "{\\"prompt\\": \\"define $word\\", \\"completion\\": \\"noun: A letter.\\"}"
done >data/corpus/gcide_chat.jsonl
echo "define x" >data/corpus/gcide_held_out.txt
"""
PORT = "29500"  # in the documents; here a free one


class Block:
    """A fenced block: its language, its text, the line it begins on, and the comment in the line before it."""

    def __init__(self, language, line, comment):
        self.language, self.line, self.comment, self.text = language, line, comment, ""


def blocks_of(document):
    blocks, block, before = [], None, ""
    for number, line in enumerate(document.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            if block:
                blocks.append(block)
                block = None
            else:
                comment = re.fullmatch(r"\s*<!-- (.*) -->\s*", before)
                block = Block(line.strip()[3:], number, comment[1] if comment else "")
        elif block:
            block.text += line + "\n"
        before = line
    assert not block, f"{document}:{block.line}: this block has no end"
    return blocks


def prose_of(document):
    """The text outside fenced blocks."""
    return re.sub(r"^```.*?^```", "", document.read_text(), flags=re.M | re.S)


def anchors_of(document):
    """What GitHub makes of its headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(document), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def write_program(path, text):
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)


def make_folder(folder):
    """What the documents' commands find: the repository's scripts and configurations, a small corpus, a finished run."""
    for name in ("configs", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    (folder / "tests").mkdir()
    shutil.copytree(ROOT / "tests/reference", folder / "tests/reference")
    (folder / "data").mkdir()
    for script in (ROOT / "data").glob("*.py"):
        shutil.copy(script, folder / "data")
    (folder / ".venv").symlink_to(ROOT / ".venv")
    write_program(folder / "train_iha", f"""\
case "$*" in
"train configs/synthetic/"*) set -- "$@" {SMALL_TASK} ;;
"train "*) set -- "$@" {SMALL} ;;
esac
exec "{BINARY}" "$@"
""")
    (folder / "bin").mkdir()
    write_program(folder / "bin/make", f'unset MAKEFLAGS MAKELEVEL\n'
                                       f'exec "{shutil.which("make")}" -C "{ROOT}" -n "$@" >/dev/null\n')
    text = (ROOT / "LICENSE").read_bytes()
    # The corpus is cut, or comes from elsewhere where the package that data/corpus.py reads is not installed.
    (folder / "data/corpus.py").rename(folder / "data/corpus_whole.py")
    make_corpus = f'cp "{ROOT}/LICENSE"' if not shutil.which("bible") else 'data/corpus_whole.py bible --out'
    write_program(folder / "data/corpus.py", f"mkdir -p data/corpus && {make_corpus} data/corpus/bible.txt\n"
                                             f"truncate -s '<100000' data/corpus/bible.txt\n")
    # So do the conversations, which data/gcide_chat.py makes of the whole dictionary.
    (folder / "data/gcide_chat.py").unlink()
    write_program(folder / "data/gcide_chat.py", CONVERSATIONS)
    (folder / "data/bible").mkdir()
    write_shard(folder / "data/bible/train_000000.bin", [*text, 256] * 4)
    write_shard(folder / "data/bible/val_000000.bin", [*text[:400]])
    (folder / "book.txt").write_bytes(text)


class Documents(unittest.TestCase):
    def setUp(self):
        self.folder = Path(tempfile.mkdtemp(prefix="docs-"))
        self.addCleanup(shutil.rmtree, self.folder, ignore_errors=True)

    # ---- commands ----

    def run_block(self, document, block):
        """Run it as a user would, stopping at the first failure; returns what it printed."""
        inherited = {k: v for k, v in os.environ.items() if k != "TRAIN_IHA"}  # the folder's train_iha, with small runs
        environment = {**inherited, "PATH": f"{self.folder}/bin:{os.environ['PATH']}", "OMP_WAIT_POLICY": "passive",
                       "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                       "OMPI_MCA_rmaps_base_oversubscribe": "1"}
        script = block.text.replace(PORT, free_port())
        where = f"{document.name}:{block.line}"
        p = subprocess.Popen(["bash", "-euo", "pipefail", "-c", script], cwd=self.folder, env=environment, text=True,
                             errors="replace", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, start_new_session=True)
        try:
            printed = p.communicate(timeout=TIMEOUT)[0]
        except subprocess.TimeoutExpired:
            os.killpg(p.pid, signal.SIGKILL)  # with what it started
            self.fail(f"{where}: not done after {TIMEOUT} s:\n{script}\n{p.communicate()[0]}")
        self.assertEqual(p.returncode, 0, f"{where} fails:\n{script}\n{printed}")
        for run in re.findall(r"run\.dir=(\S+)", script):  # of commands in the background, too
            self.assertTrue(list((self.folder / run).glob("step_*")), f"{where}: no checkpoint in {run}:\n{printed}")
        return printed

    def check_output(self, document, block, printed):
        """The lines of a text block come in this order in what was printed."""
        lines, at = printed.splitlines(), 0
        for wanted in block.text.splitlines():
            if wanted.strip() in ("", "…"):
                continue
            start = wanted[:-1].rstrip() if wanted.endswith("…") else None
            while at < len(lines) and not (lines[at].startswith(start) if start else lines[at].rstrip() == wanted.rstrip()):
                at += 1
            self.assertLess(at, len(lines), f"{document.name}:{block.line}: not printed (here):\n{wanted}\n\n{printed}")
            at += 1

    def try_commands(self, document):
        blocks = blocks_of(document)
        tried = [block for block in blocks if block.language == "sh" and not block.comment.startswith("not tried: ")]
        if not tried:
            return
        make_folder(self.folder)
        subprocess.run(["./train_iha", "train", "configs/quickstart.ini", "run.keep=0"], cwd=self.folder, check=True,
                       capture_output=True, timeout=TIMEOUT)
        (self.folder / "runs/quickstart/step_00000600").symlink_to("step_00000008")  # as a whole run names it
        printed = ""
        for block in blocks:
            if block in tried:
                printed = self.run_block(document, block)
            elif block.comment == "output":
                self.check_output(document, block, printed)

    def test_blocks_say_what_they_are(self):
        for document in DOCUMENTS:
            for block in blocks_of(document):
                where = f"{document.name}:{block.line}"
                self.assertIn(block.language, LANGUAGES, f"{where}: ```sh for commands, ```text for anything else")
                if block.language == "sh":
                    marks = ["", *(f"not tried: {reason}" for reason in REASONS)]
                    self.assertIn(block.comment, marks, f"{where}: this comment before a block of commands")
                else:
                    for line in block.text.splitlines():
                        self.assertFalse(line.startswith(COMMANDS) and block.language == "text" and
                                         "layout" not in block.comment, f"{where}: a command? {line}")

    # ---- names ----

    def test_links_lead_somewhere(self):
        for document in DOCUMENTS:
            for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(document)):
                if link.startswith(("http://", "https://")):
                    continue
                path, _, anchor = link.partition("#")
                target = (document.parent / path).resolve() if path else document
                self.assertTrue(target.exists(), f"{document.name}: {link}: no such file")
                if anchor:
                    self.assertIn(anchor, anchors_of(target), f"{document.name}: {link}: no such heading")

    def test_every_document_is_linked_from_the_readme(self):
        readme = (ROOT / "README.md").read_text()
        for document in DOCUMENTS[1:]:
            self.assertTrue(f"(docs/{document.name})" in readme, document.name)

    def test_files_that_are_named_exist(self):
        """Paths in backticks, from the root or from tests/; data/NAME/ is made by commands."""
        folders = {path.name for top in (ROOT, ROOT / "tests") for path in top.iterdir() if path.is_dir()}
        for document in DOCUMENTS:
            for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", document.read_text()):
                first, last = name.split("/")[0], name.split("/")[-1]
                if first not in folders - {"build", "runs"} or "NAME" in name or (first == "data" and "." not in last):
                    continue
                found = (ROOT / name).exists() or (ROOT / "tests" / name).exists()
                self.assertTrue(found, f"{document.name} names {name}")

    def test_functions_that_are_named_exist(self):
        folders = [top for top in ROOT.iterdir() if top.is_dir() and top.name[0] != "." and
                   top.name not in ("build", "runs", "tests")]
        files = [*ROOT.glob("*.cu"), *(path for folder in folders for path in folder.rglob("*"))]
        sources = "".join(path.read_text() for path in files if path.suffix in (".c", ".cu", ".cuh", ".cpp", ".h"))
        known = set(re.findall(r"\b(\w+)\(", sources))
        for document in DOCUMENTS:
            for name in re.findall(r"(?<![.\w])(\w+)\(\)", document.read_text()):
                self.assertTrue(name in known, f"{document.name} names {name}()")

    def test_the_layout_is_the_repositorys(self):
        layout = [block for block in blocks_of(ROOT / "README.md") if block.comment == "layout"]
        self.assertEqual(len(layout), 1)
        listed = {line.split()[0].rstrip("/") for line in layout[0].text.splitlines() if line and not line[0].isspace()}
        for name in listed:
            self.assertTrue((ROOT / name).exists(), name)
        folders = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "."}
        self.assertLessEqual(folders - {"build", "runs"}, listed)

    # ---- sizes, and what is generated ----

    def test_the_readme_is_short(self):
        self.assertLessEqual(len((ROOT / "README.md").read_text().splitlines()), README_LINES)

    def test_the_tables_of_keys_are_current(self):
        text = (ROOT / "docs/configuration.md").read_text()
        marker = re.search(r"^<!-- Generated.* -->\n", text, re.M)
        tables = subprocess.run([BINARY, "--help=markdown"], capture_output=True, text=True, check=True).stdout
        self.assertTrue(text[marker.end():] == tables, "docs/configuration.md is not current; run: make docs")


def add_test_of_commands(document):
    name = re.sub(r"\W", "_", document.stem.lower())
    setattr(Documents, f"test_commands_of_{name}", lambda self: self.try_commands(document))


for path in DOCUMENTS:
    add_test_of_commands(path)

if __name__ == "__main__":
    unittest.main()
