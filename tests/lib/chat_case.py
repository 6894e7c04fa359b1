"""A test that prepares conversations with data/prepare.py --chat, and what it expects of them."""

import contextlib
import importlib.util
import io
import json
import sys
import unittest
from pathlib import Path
from unittest import mock

import numpy as np

from tests.lib.folder_case import FolderCase

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "data"))

HAS_PACKAGES = all(importlib.util.find_spec(name) for name in ("jinja2", "tokenizers"))
if HAS_PACKAGES:
    import jinja2
    import jinja2.sandbox

    import prepare
    from tests.reference.make_chat_cases import bpe_tokenizer


def reference_template(source, **names):
    """As Transformers builds it, but for {% generation %}, which is dropped."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                               extensions=["jinja2.ext.loopcontrols"])

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(source.replace("{% generation %}", "").replace("{% endgeneration %}", ""))
    return lambda messages, prompt=False: template.render(messages=messages, add_generation_prompt=prompt, **names)


def read(path, dtype):
    header = np.fromfile(path, "<i4", 256)
    values = np.fromfile(path, dtype, offset=1024)
    assert header[2] == len(values) and not header[3:].any(), path
    return header[:2].tolist(), values.tolist()


@unittest.skipUnless(HAS_PACKAGES, "needs jinja2 and tokenizers")
class Case(FolderCase):
    read = staticmethod(read)

    def rows(self, rows, name="rows.jsonl"):
        return self.write(name, "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))

    def tokenizer(self, template=None, config=None, **options):
        path = self.write("tokenizer/tokenizer.json", bpe_tokenizer(**options))
        config = {"eos_token": "<|endoftext|>"} if config is None else config
        self.write("tokenizer/tokenizer_config.json", config | ({"chat_template": template} if template else {}))
        return path

    def run_prepare(self, *arguments, chat=True):
        """(exit code, stdout, stderr)"""
        out, err = io.StringIO(), io.StringIO()
        arguments = (["--chat"] if chat else []) + ["--out", str(self.out), *map(str, arguments)]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                mock.patch.object(sys, "argv", ["prepare.py", *arguments]):
            code = prepare.main()
        return code, out.getvalue(), err.getvalue()

    def prepare(self, *arguments, code=0, chat=True):
        """(stdout, stderr)"""
        returned, out, err = self.run_prepare(*arguments, chat=chat)
        self.assertEqual(returned, code, err)
        return out, err

    def refused(self, text, *arguments, **options):
        err = self.prepare("--val-fraction", 0, *arguments, code=2, **options)[1]
        self.assertEqual(err.count("\n"), 1, err)
        self.assertIn(text, err)
        self.assertFalse(list(self.out.glob("*")) if self.out.exists() else [])

    def shard(self, split="train", dtype="<u2"):
        """(tokens, labels)"""
        magic, tokens = read(self.out / f"{split}_000000.bin", dtype)
        labels_magic, labels = read(self.out / f"{split}_000000.labels", "<i4")
        self.assertEqual((magic, labels_magic), ([20240520, 1], [20261129, 1]))
        return tokens, labels

    def conversations(self, separator, split="train"):
        """[(tokens, labels)] without the separators, whose labels do not count."""
        tokens, labels = self.shard(split)
        self.assertEqual(tokens[-1], separator)
        found, begin = [], 0
        for i, token in enumerate(tokens):
            if token == separator:
                self.assertEqual(labels[i], -1)
                found.append((tokens[begin:i], labels[begin:i]))
                begin = i + 1
        return found

    def counted(self, tokens, labels):
        """Runs of tokens that are predicted; each label is the next token."""
        runs, last = [], None
        for i, label in enumerate(labels):
            if label >= 0:
                self.assertEqual(label, tokens[i + 1])
                if last != i - 1:
                    runs.append([])
                runs[-1].append(label)
                last = i
        return runs
