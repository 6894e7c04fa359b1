"""Choices as prepare.py --choices prepares them: a context, several endings and the index of the right one, as JSON lines
in HellaSwag's form, become a NAME.choices file a NAME.jsonl (data/choices.h describes it)."""

import os
import re

import numpy as np

from prepare_inputs import Input
from prepare_output import ini_path
from prepare_readers import jsonl_rows
from user_error import UserError, naming

MAGIC, VERSION = 20261130, 1
MOST_ENDINGS = 64


def text_of(row, names, where):
    for name in names:
        if isinstance(row.get(name), str):
            return row[name]
    raise UserError(f"{where}: has no \"{names[0]}\" that is text" + (f" (nor \"{names[1]}\")" if len(names) > 1 else ""))


def choice(row, where):
    """(context, endings, label), each ending with the space between it and the context."""
    if not isinstance(row, dict):
        raise UserError(f'{where}: not an object with "context", "endings" and "label"')
    context = text_of(row, ("context", "ctx"), where)
    endings, label = row.get("endings"), row.get("label")
    if not isinstance(endings, list) or not all(isinstance(ending, str) for ending in endings):
        raise UserError(f'{where}: "endings" must be a list of texts')
    if not 2 <= len(endings) <= MOST_ENDINGS:
        raise UserError(f"{where}: {len(endings)} endings; there must be 2 to {MOST_ENDINGS}")
    for i, ending in enumerate(endings):
        if not ending.strip():
            raise UserError(f"{where}: ending {i} is empty")
    if isinstance(label, str) and re.fullmatch(r"\d{1,9}", label):  # as in HellaSwag's own files
        label = int(label)
    if isinstance(label, float) and label.is_integer():  # as numbers of JSON come
        label = int(label)
    if not isinstance(label, int) or isinstance(label, bool):
        raise UserError(f'{where}: "label" must be the index of the right ending')
    if not 0 <= label < len(endings):
        raise UserError(f"{where}: label {label} is out of range: there are {len(endings)} endings, the first is 0")
    apart = "" if not context or context[-1:].isspace() else " "
    return context, [ending if ending[:1].isspace() else apart + ending for ending in endings], label


class ChoicesPreparation:
    """One run of prepare.py --choices."""

    def __init__(self, options, tokenizer):
        self.options, self.tokenizer = options, tokenizer
        self.separator = options.separator if options.separator is not None else tokenizer.end_of_text
        if self.separator is None:
            raise UserError(f"{options.tokenizer}: no end-of-text token known in its vocabulary; say which id ends a "
                            "document: --separator ID")
        self.vocab_size = max(tokenizer.vocab_size, self.separator + 1)
        self.inputs = [Input(path, options.out) for path in options.inputs]
        self.files = {}  # name: (items, endings, longest in tokens)
        names = [self.name(source) for source in self.inputs]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise UserError(f"{self.inputs[i].name}: another input is named {name} too, and so would its file be")

    @staticmethod
    def name(source):
        stem = os.path.basename(source.name) if source.name != "-" else "choices"
        return re.sub(r"\W+", "_", stem.split(".")[0]) or "choices"

    def encode(self, context, endings):
        """The ids of the context, and of each ending behind it."""
        rows = [] if not context else [np.asarray(self.tokenizer.encode([context], [False])[0], dtype=np.int32)]
        context_ids = rows[0] if rows else np.empty(0, np.int32)
        encoded = self.tokenizer.encode(endings, [bool(context)] * len(endings))
        return context_ids, [np.asarray(ids, dtype=np.int32) for ids in encoded]

    def words(self, source):
        parts, items, count, longest = [], 0, 0, 0
        with source.open() as stream:
            if source.format(self.options.format) != "jsonl":
                raise UserError(f"{source.name}: --choices reads JSON lines")
            for where, row in jsonl_rows(stream, source):
                context, endings, label = choice(row, where)
                head, tails = self.encode(context, endings)
                parts += [np.array([label, len(endings), len(head)], dtype=np.int32), head]
                for ending, ids in zip(endings, tails):
                    if not len(ids):
                        raise UserError(f"{where}: the tokenizer makes no token of an ending")
                    parts += [np.array([len(ids), len(ending.strip())], dtype=np.int32), ids]
                items, count = items + 1, count + len(endings)
                longest = max(longest, len(head) + max(map(len, tails)))
        if not items:
            raise UserError(f"{source.name}: no item in it")
        header = np.zeros(256, dtype=np.int32)
        header[:4] = MAGIC, VERSION, items, self.separator
        self.files[self.name(source)] = (items, count, longest)
        return np.concatenate([header, *parts]).astype("<i4").tobytes()

    def write(self, folder):
        """All files, under temporary names until the last one is written; returns their names."""
        made = []
        try:
            for source in self.inputs:
                path = folder / f"{self.name(source)}.choices"
                content = self.words(source)
                with naming(path):
                    made.append((path.with_name(path.name + ".tmp"), path))
                    made[-1][0].write_bytes(content)
            for partial, path in made:
                os.replace(partial, path)
            return {path.name for _, path in made}
        finally:
            for partial, _ in made:
                partial.unlink(missing_ok=True)

    def report(self, _):
        folder = self.options.out
        for name, (items, count, longest) in self.files.items():
            print(f"{name + '.choices':<24}{items:,} items, {count:,} endings, at most {longest:,} tokens")
        print(f"\n[eval]\ntasks = {ini_path(folder) or folder}/*.choices")

    def warn(self):
        pass
