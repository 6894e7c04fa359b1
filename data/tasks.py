#!/usr/bin/env python3
"""Synthetic tasks as token shards with labels: the paper's compositions, CPM-3 and polynomial filters, and RULER's
multi-key retrieval.

Writes OUT/train_000000.bin, val_000000.bin and test_000000.bin with their .labels, and dataset.json. No example stands
in two splits, or twice in one. The same task, options and seed give the same files. What it prints last is the part of
a configuration that belongs to the data.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

try:
    import numpy as np
except ImportError:
    sys.exit("tasks.py: numpy is not installed; run: make deps, then .venv/bin/python data/tasks.py ...")

from prepare_output import LabelledWriter, Progress, ini_path, locked
from task_examples import (NOT_COUNTED, PADDING, Composition, CountMatches, MultiKeyBytes, MultiKeyIds,
                           PolynomialFilter)
from user_error import UserError, allow_any_file_name, describe, naming

SPLITS = ("train", "val", "test")
MAX_REPEATS = 10000  # examples in a row that were drawn before: the task has no more of them

EXAMPLES = """\
examples:
  .venv/bin/python data/tasks.py binary --out data/binary
  .venv/bin/python data/tasks.py ternary --out data/ternary --seed 2
  .venv/bin/python data/tasks.py cpm3 --length 16 --modulus 8 --factor 17 --out data/cpm3
  .venv/bin/python data/tasks.py polynomial --length 16 --modulus 5 --order 4 --out data/polynomial
  .venv/bin/python data/tasks.py multikey --length 512 --pairs 4 --out data/multikey_512
  .venv/bin/python data/tasks.py multikey --form ids --haystack needles --length 256 --out data/multikey_ids
"""

# ------------------------------------------------------------------------------------------ drawing


def is_wide(task):
    """Whether its ids need uint32."""
    return task.vocab_size > 1 << 16


def draw_splits(task, counts, seed):
    """{split: [(tokens, labels), ...]}, no example twice. Each split has a random stream of its own, so that its
    examples hardly depend on the sizes of the others."""
    seen, splits = set(), {}
    bytes_each = task.seq_len * (8 if is_wide(task) else 6)  # in the shard and its labels
    progress = Progress(sum(counts) * bytes_each)
    # The smaller splits first: a larger training set leaves them as they are.
    for number in (2, 1, 0):
        rng, examples, repeats = np.random.default_rng([seed, 0, number]), [], 0
        while len(examples) < counts[number]:
            tokens, labels = task.example(rng)
            tokens = np.asarray(tokens, "<u4")
            key = hashlib.sha256(tokens.tobytes()).digest()
            if key in seen:
                repeats += 1
                if repeats == MAX_REPEATS:
                    raise UserError(f"there are hardly more than {len(seen)} different examples, and {sum(counts)} are "
                                    "wanted: give smaller --train, --val and --test, or a larger task")
                continue
            repeats = 0
            seen.add(key)
            examples.append((tokens, np.asarray(labels, "<i4")))
            progress.show(len(seen) * bytes_each)
        splits[SPLITS[number]] = examples
    progress.show(len(seen) * bytes_each, last=True)
    return {split: splits[split] for split in SPLITS}


def packed(task, examples):
    """Tokens and labels of a shard: sequences of seq_len, padded on the right, and one token more, since a sequence
    needs a token after it."""
    size = len(examples) * task.seq_len + 1
    tokens, labels = np.full(size, task.separator, "<u4"), np.full(size, PADDING, "<i4")
    for i, (ids, targets) in enumerate(examples):
        at = slice(i * task.seq_len, i * task.seq_len + len(ids))
        tokens[at], labels[at] = ids, targets
    labels[-1] = NOT_COUNTED
    return tokens, labels


# ------------------------------------------------------------------------------------------ writing


def majority(labels):
    """The most frequent label among those that count, and its share."""
    ids, counts = np.unique(labels[labels >= 0], return_counts=True)
    return int(ids[counts.argmax()]), counts.max() / counts.sum()


def write(options, task, splits):
    folder = options.out
    description = {"tokenizer": "bytes", "tokenizer_sha256": None, "vocab_size": task.vocab_size,
                   "separator": task.separator, "task": options.task, "options": task_options(options),
                   "shards": {}}
    writers = []
    for split, examples in splits.items():
        tokens, labels = packed(task, examples)
        # One shard, so that its last token stands behind all sequences.
        writer = LabelledWriter(folder, split, "<u4" if is_wide(task) else "<u2", len(tokens))
        writers.append(writer)
        writer.write(tokens, labels, len(tokens))
        writer.finish()
        label, share = majority(labels)
        description["shards"][f"{split}_000000.bin"] = {
            "tokens": len(tokens), "bytes": len(tokens), "examples": len(examples),
            "targets": int((labels >= 0).sum()), "most_frequent_label": label,
            "share_of_most_frequent": round(float(share), 6)}
    (folder / "dataset.json").unlink(missing_ok=True)  # old shards are never beside the description of new ones
    for writer in writers:
        writer.commit()
    partial = folder / "dataset.json.tmp"
    with naming(folder / "dataset.json"):
        partial.write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder / "dataset.json")
    return description


def task_options(options):
    left_out = ("task", "out", "overwrite", "make")
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()
            if key not in left_out}


def report(options, task, description):
    for name, shard in description["shards"].items():
        print(f"{name}: {shard['examples']:,} examples, {shard['targets']:,} labels that count; "
              f"always {shard['most_frequent_label']} would be right for "
              f"{100 * shard['share_of_most_frequent']:.1f} %")
    folder = ini_path(options.out)
    print(f"\n[model]\nvocab_size = {task.vocab_size}\ncausal = {str(task.causal).lower()}\n\n[train]\n"
          f"seq_len = {task.seq_len}\n\n[data]\ntrain = {folder}/train_*.bin\nval = {folder}/val_*.bin\n"
          "segments = documents")


# --------------------------------------------------------------------------------------- arguments


def positive(text):
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def not_negative(text):
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def make_multikey(options):
    needles = options.haystack == "needles"
    if options.form == "ids":
        if options.text:
            raise UserError("--text is for --form bytes")
        return MultiKeyIds(options.length, options.pairs, needles, options.value_tokens or 1)
    try:
        text = options.text.read_text(encoding="utf-8", errors="replace") if options.text else None
    except OSError as error:
        raise UserError(describe(error)) from None
    return MultiKeyBytes(options.length, options.pairs, needles, options.value_tokens or 7, text)


def make_cpm3(options):
    if options.factor <= 2 * options.modulus:
        raise UserError(f"--factor {options.factor} must be more than twice --modulus {options.modulus}, as the task is "
                        "defined")
    return CountMatches(options.length, options.modulus, options.factor)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")

    def add(name, text, make):
        task = tasks.add_parser(name, help=text, description=text, allow_abbrev=False)
        task.set_defaults(make=make)
        task.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder for the shards")
        task.add_argument("--seed", type=not_negative, default=1)
        for split in SPLITS:
            task.add_argument(f"--{split}", type=positive, metavar="N", help=f"examples of the {split} split")
        task.add_argument("--overwrite", action="store_true", help="replace shards of an earlier run")
        return task

    add("binary", "R o R of a random boolean matrix with 6 to 10 rows",
        lambda options: Composition(2, (6, 10), 0.325))
    add("ternary", "R o R o R of a random boolean matrix with 5 to 8 rows",
        lambda options: Composition(3, (5, 8), 0.264))
    cpm3 = add("cpm3", "how many pairs (j, l) have x_i + G x_j + x_l = 0 modulo M", make_cpm3)
    cpm3.add_argument("--length", type=positive, default=16, metavar="N", help="tokens (16)")
    cpm3.add_argument("--modulus", type=positive, default=8, metavar="M", help="ids are below M (8)")
    cpm3.add_argument("--factor", type=positive, default=17, metavar="G", help="more than 2 M (17)")
    polynomial = add("polynomial", "a polynomial of the cyclic shift, with coefficients drawn from the seed",
                     lambda options: PolynomialFilter(options.length, options.modulus, options.order, options.seed))
    polynomial.add_argument("--length", type=positive, default=16, metavar="N", help="tokens (16)")
    polynomial.add_argument("--modulus", type=positive, default=5, metavar="M", help="ids are below M (5)")
    polynomial.add_argument("--order", type=positive, default=4, metavar="K", help="number of terms (4)")
    multikey = add("multikey", "the value of one of several keys hidden in a long text", make_multikey)
    multikey.add_argument("--form", choices=("bytes", "ids"), default="bytes")
    multikey.add_argument("--haystack", choices=("filler", "needles"), default="filler")
    multikey.add_argument("--length", type=positive, default=512, metavar="T", help="tokens of an example (512)")
    multikey.add_argument("--pairs", type=positive, default=4, metavar="K", help="pairs among filler (4)")
    multikey.add_argument("--value-tokens", type=positive, metavar="N", help="digits of a value (bytes: 7, ids: 1)")
    multikey.add_argument("--text", type=Path, metavar="FILE", help="filler sentences, instead of built-in ones")

    for each in [parser, *tasks.choices.values()]:
        each.error = lambda message: sys.exit((print(f"tasks.py: {message}; see --help", file=sys.stderr), 2)[1])
    return parser.parse_args(arguments)


def run(arguments):
    options = parse(arguments)
    try:
        task = options.make(options)
    except ValueError as error:
        raise UserError(str(error)) from None
    counts = [getattr(options, split) or count for split, count in zip(SPLITS, task.splits)]
    with locked(options.out):
        if not options.overwrite and any(options.out.glob("*.bin")):
            raise UserError(f"{options.out}: already holds shards; give another --out, or --overwrite")
        description = write(options, task, draw_splits(task, counts, options.seed))
    report(options, task, description)


def main():
    allow_any_file_name()
    try:
        run(sys.argv[1:])
    except UserError as error:
        print(f"tasks.py: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"tasks.py: {describe(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
