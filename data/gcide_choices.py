#!/usr/bin/env python3
"""Which definition belongs to a word: choices made from a dictionary, and a text to train on without these words' entries.

    data/gcide_choices.py          (Debian: dict-gcide)

Writes data/corpus/gcide_choices.jsonl, which data/prepare.py --choices takes, and data/corpus/gcide_words.txt, an entry a
line of all other words. An item has the definitions of four words of the same part of speech that are not in the text:

    {"context": "abacus, noun:", "endings": ["A table or tray strewn with sand, ...", ...], "label": 2}
"""

import argparse
import collections
import json
import os
import random
import sys
from pathlib import Path

from gcide_chat import conversations, held_out, write
from user_error import UserError, allow_any_file_name, describe

ENDINGS = 4


def items(entries, asked):
    """An item for each word that is asked for; the other endings are those of other such words."""
    draw = random.Random(1)
    by_part = collections.defaultdict(list)
    for word in sorted(asked):
        part, _, definition = entries[word].partition(": ")
        by_part[part].append((word, definition))
    for part, words in sorted(by_part.items()):
        for word, definition in words:
            others = sorted({other for _, other in words} - {definition})
            if len(others) < ENDINGS - 1:
                continue
            endings = draw.sample(others, ENDINGS - 1)
            label = draw.randrange(ENDINGS)
            endings.insert(label, definition)
            yield {"context": f"{word}, {part}:", "endings": endings, "label": label}


def main():
    allow_any_file_name()
    folder = Path(__file__).parent / "corpus"
    parser = argparse.ArgumentParser(prog="gcide_choices.py", description=__doc__, add_help=False, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=folder, metavar="FOLDER",
                        help="where the two files go (default: data/corpus)")
    parser.add_argument("--items", type=int, default=1000, metavar="N", help="words that are asked for (default: 1000)")
    parser.add_argument("--help", action="help", help="show this and stop")
    parser.error = lambda message: sys.exit((print(f"gcide_choices.py: {message}", file=sys.stderr), 2)[1])
    options = parser.parse_args()
    if options.items < 1:
        parser.error(f"--items {options.items}: must be at least 1")
    try:
        entries = dict(conversations())
        asked = held_out(entries, options.items)
        made = list(items(entries, asked))
        write(options.out / "gcide_choices.jsonl", map(json.dumps, made))
        write(options.out / "gcide_words.txt", (f"{word}, {answer}" for word, answer in entries.items() if word not in asked))
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"gcide_choices.py: {describe(error)}", file=sys.stderr)
        return 1
    print(f"{os.path.relpath(options.out)}: gcide_choices.jsonl, {len(made):,} items; gcide_words.txt, "
          f"{len(entries) - len(asked):,} entries")
    return 0


if __name__ == "__main__":
    sys.exit(main())
