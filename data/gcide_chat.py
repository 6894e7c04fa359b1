#!/usr/bin/env python3
"""Conversations made from a dictionary: "define X" and the first definition of X, for fine-tuning (docs/finetuning.md).

    data/gcide_chat.py          (Debian: dict-gcide)

Writes data/corpus/gcide_chat.jsonl, which data/prepare.py --chat takes, and data/corpus/gcide_held_out.txt: the questions
after some words that are in none of the conversations, a line each. An answer is the part of speech, a colon, and one
sentence:

    {"messages": [{"role": "user", "content": "define abacus"},
                  {"role": "assistant", "content": "noun: A table or tray strewn with sand, ..."}]}
"""

import argparse
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from corpus import gcide
from user_error import UserError, allow_any_file_name, describe, naming

PARTS = {"n": "noun", "v": "verb", "v. t": "verb", "v. i": "verb", "a": "adjective", "adj": "adjective", "adv": "adverb"}
# headword: part of speech, perhaps forms in brackets, subject in parentheses and a number, and the definition
ENTRY = re.compile(r"([A-Za-z][a-z]+)[,:] (%s)\. (?:\[[^\]]*\] )*(?:\([^)]*\) )*(?:1\. )?(?:\([^)]*\) )*([A-Z][^\n]*)"
                   % "|".join(re.escape(part) for part in sorted(PARTS, key=len, reverse=True)))
SENTENCE = re.compile(r"[^.;]{15,160}?[.;]")


def conversations():
    """(word, answer) of each word whose first entry has a definition of one sentence of plain words."""
    seen = set()
    for text in gcide():
        entry = ENTRY.match(text)
        sentence = entry and SENTENCE.match(entry[3])
        if not sentence or entry[1].lower() in seen or re.search(r"[\[\]<>|]", sentence[0]):
            continue
        seen.add(entry[1].lower())
        yield entry[1].lower(), f"{PARTS[entry[2]]}: {sentence[0][:-1].rstrip()}."


def held_out(words, count):
    """So many words, chosen by a hash of each."""
    return set(sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())[:count])


def write(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="\n")
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main():
    allow_any_file_name()
    folder = Path(__file__).parent / "corpus"
    parser = argparse.ArgumentParser(prog="gcide_chat.py", description=__doc__, add_help=False, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=folder, metavar="FOLDER", help="where the two files go (default: "
                                                                                    "data/corpus)")
    parser.add_argument("--held-out", type=int, default=100, metavar="N", help="words that are only asked for (default: 100)")
    parser.add_argument("--help", action="help", help="show this and stop")
    parser.error = lambda message: sys.exit((print(f"gcide_chat.py: {message}", file=sys.stderr), 2)[1])
    options = parser.parse_args()
    if options.held_out < 0:
        parser.error(f"--held-out {options.held_out}: must be at least 0")
    try:
        entries = dict(conversations())
        asked = held_out(entries, options.held_out)
        write(options.out / "gcide_chat.jsonl", (json.dumps({"messages": [
            {"role": "user", "content": f"define {word}"}, {"role": "assistant", "content": answer}]})
            for word, answer in entries.items() if word not in asked))
        write(options.out / "gcide_held_out.txt", (f"define {word}" for word in sorted(asked)))
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"gcide_chat.py: {describe(error)}", file=sys.stderr)
        return 1
    print(f"{os.path.relpath(options.out)}: gcide_chat.jsonl, {len(entries) - len(asked):,} conversations; "
          f"gcide_held_out.txt, {len(asked):,} questions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
