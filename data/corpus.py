#!/usr/bin/env python3
"""English text: from distribution packages, without a download, or token shards from the Hugging Face Hub.

    data/corpus.py bible     King James Bible, 4 MB   (Debian: bible-kjv bible-kjv-text)
    data/corpus.py gcide     a dictionary, 29 MB      (Debian: dict-gcide)

These write data/corpus/NAME.txt: plain ASCII, one paragraph a line, a blank line between documents (a chapter,
an entry), so that data/prepare.py takes it with `--document-separator blank-lines`. Nothing is installed:
a missing package is named, with exit code 2.

    .venv/bin/python data/corpus.py fineweb-edu --tokens 10e9           or fineweb, tinystories, tinyshakespeare
    .venv/bin/python data/corpus.py NAME/ON_THE_HUB --tokens 100M --tokenizer bytes

These download a data set, tokenize it meanwhile, and write shards with N tokens in all to data/NAME, and the lines
for a configuration. The same command continues a download that was stopped.
"""

import argparse
import gzip
import os
import re
import subprocess
import sys
from pathlib import Path

from user_error import UserError, allow_any_file_name, describe, naming

GCIDE = Path("/usr/share/dictd/gcide.dict.dz")


# --------------------------------------------------------------------------------------------- bible

VERSE = re.compile(r"(\d?[A-Za-z]+\d+):\d+ (.*)")


def bible():
    """One verse a line, as the King James Bible is set; references go, chapters are documents."""
    try:
        run = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, cwd="/")
    except FileNotFoundError:
        raise UserError("bible: not installed; apt-get install bible-kjv bible-kjv-text") from None
    chapters = {}
    for line in run.stdout.splitlines():
        match = VERSE.fullmatch(line)
        if match:
            chapters.setdefault(match[1], []).append(" ".join(match[2].split()))
    verses = sum(map(len, chapters.values()))
    if len(chapters) != 1189 or verses != 31102:  # what every complete King James Bible has
        raise UserError(f"bible: found {len(chapters)} of 1189 chapters and {verses} of 31102 verses; "
                        "apt-get install --reinstall bible-kjv bible-kjv-text")
    return ("\n".join(chapter) for chapter in chapters.values())


# --------------------------------------------------------------------------------------------- gcide

# Where an entry came from, after nearly every paragraph: [1913 Webster], [WordNet 1.5 +PJC], ...
SOURCE = r"\[[^\[\]]*(?:1913\s+Webster|Webster\s+1913|WordNet|PJC|Century\s+Dict)[^\[\]]*\]"
UNBALANCED_SOURCE = re.compile(r"\s*\[?\bWordNet 1\.5\]?$")
SOURCE_LINE = re.compile(rf"\s*{SOURCE}(?:\s\S+)?\s*")  # some carry the next headword's sort key
# Headword respelled between backslashes, and its pronunciation; not a subject label such as (Zool.)
RESPELLED = re.compile(r"\s*\\[^\\]*\\(?:\s*\((?![A-Z][^()]*\.\))[^()]*\))?\s*")
STRESS = re.compile(r"""(?<=[A-Za-z])["`*^]+(?=[A-Za-z-])""")  # un*con"scion*a*bly
PLURAL_SOUND = re.compile(r"\s\(-[^()\s]+\)")
LETTERS = {"imac": "i", "aum": "a", "asl": "a", "add": "a", "udd": "u", "usl": "u", "eth": "th",
           "deg": " deg.", "sect": "sect. ", "root": "root ", "frac12": " 1/2", "frac14": " 1/4",
           "frac34": " 3/4", "pound": "L", "Crev": "C", "crev": "c"}
NAMED_LETTER = re.compile(r"\[(%s)\]" % "|".join(LETTERS))
# ['e] [`e] ["o] [=a] [a^] [ae]: an accent before or after one or two letters, or a ligature
MARKED_LETTER = re.compile(r"""\[(?:[-'`"=~.,^*/:+]([A-Za-z]{1,2})|([A-Za-z]{1,2})[-'`"=~.,^*/:+]|([AaOo][Ee]))\]""")
BYTES = {0x92: "'", 0xB9: "'", 0xE7: "c"}  # the file's only three bytes outside ASCII


def after_headword(following):
    """What stands between a headword and the character that follows it."""
    return ": " if following.isalnum() else " " if following in ("(", "[", "&") else ""


def paragraph(lines):
    """A paragraph's hard-wrapped lines as one line of plain text."""
    text = " ".join(" ".join(lines).split())
    text = re.sub(rf"\s*{SOURCE}", "", text)
    text = UNBALANCED_SOURCE.sub("", text)
    text = NAMED_LETTER.sub(lambda match: LETTERS[match[1]], text)
    text = MARKED_LETTER.sub(lambda match: match[1] or match[2] or match[3], text)
    text = RESPELLED.sub(lambda match: after_headword(text[match.end():match.end() + 1]), text)
    text = STRESS.sub("", PLURAL_SOUND.sub("", text))
    return " ".join(text.replace("{", "").replace("}", "").split())


def gcide_entries(lines):
    """Lists of paragraphs (lists of lines). An entry starts in column 0, with its headword respelled."""
    entry = None
    for line in lines:
        wrapped = entry and sum(part.count("\\") for part in entry[-1]) % 2  # inside a long respelling
        if line[:1].strip() and "\\" in line and not wrapped:
            if entry:
                yield entry
            entry = [[]]
        if entry is None or SOURCE_LINE.fullmatch(line):
            continue  # before the first entry: the database's own notices
        if line.strip():
            entry[-1].append(line)
        elif entry[-1]:
            entry.append([])
    if entry:
        yield entry


def gcide():
    """One paragraph a line: headword and definition, then senses, quotations, synonyms."""
    if not GCIDE.exists():
        raise UserError(f"gcide: {GCIDE} is missing; apt-get install dict-gcide")
    with gzip.open(GCIDE) as file:
        lines = file.read().decode("latin-1").translate(BYTES).splitlines()
    for entry in gcide_entries(lines):
        text = "\n".join(filter(None, map(paragraph, entry)))
        if text:
            yield text


# ---------------------------------------------------------------------------------------------- main

CORPORA = {"bible": bible, "gcide": gcide}


def write(documents, path):
    """All or nothing: a reader never sees half a corpus."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another corpus.py may write the same file
    count = 0
    try:
        with naming(path), open(partial, "w", encoding="ascii", newline="\n") as file:
            for document in documents:
                file.write("\n" * bool(count) + document + "\n")
                count += 1
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return count


# name: (data set on the Hub, its revision, files of the text)
HUB_NAMES = {
    "fineweb": ("HuggingFaceFW/fineweb", None, r"sample/(10|100)BT/.*\.parquet"),
    "fineweb-edu": ("HuggingFaceFW/fineweb-edu", None, r"sample/(10|100)BT/.*\.parquet"),
    "tinystories": ("roneneldan/TinyStories", None, r"data/train-.*\.parquet"),
    "tinyshakespeare": ("karpathy/tiny_shakespeare", "refs/convert/parquet", r"default/train/.*\.parquet"),
}


def token_count(text, fail):
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKMBG]?)|(\d+(?:\.\d+)?e\d{1,2})", text or "")
    if not match:
        fail(f"--tokens {text}: a number of tokens, such as 10M or 1.5B" if text else "--tokens N is missing: how many to take")
    units = {"": 1, "k": 1e3, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9}
    count = int(float(match[3])) if match[3] else int(float(match[1]) * units[match[2]])
    if count < 1000:
        fail(f"--tokens {text}: must be at least 1000")
    return count


def from_hub(options, fail):
    if options.name not in HUB_NAMES and not re.fullmatch(r"[\w.-]+/[\w.-]+", options.name):
        import difflib
        near = difflib.get_close_matches(options.name, [*CORPORA, *HUB_NAMES], 1)
        known = ", ".join([*CORPORA, *HUB_NAMES])
        fail(f"{options.name}: " + (f"did you mean {near[0]}?" if near else f"none of {known}; a data set on the Hub is called "
                                    "OWNER/NAME"))
    options.tokens = token_count(options.tokens, fail)
    if not 0 <= options.val_fraction < 1:
        fail(f"--val-fraction {options.val_fraction}: must be at least 0 and below 1")
    if not 1 <= options.shard_tokens <= 2_000_000_000:
        fail(f"--shard-tokens {options.shard_tokens}: must be 1 to 2,000,000,000")
    options.workers = options.workers or (1 if options.tokenizer == "bytes" else len(os.sched_getaffinity(0)))
    options.out = options.out or Path(os.path.relpath(Path(__file__).parent / re.sub(r"\W", "_", options.name.split("/")[-1])))
    try:
        if options.files:
            re.compile(options.files)
        from hub import prepare_from_hub
        prepare_from_hub(options, *HUB_NAMES.get(options.name, (options.name,)))
    except re.error as error:
        fail(f"--files {options.files}: {error}")
    except ImportError as error:
        fail(f"{error.name} is not installed; run: make deps, then .venv/bin/python data/corpus.py ...")
    except UserError as error:
        fail(str(error))
    except OSError as error:
        print(f"corpus.py: {' '.join(describe(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("corpus.py: stopped; the same command continues the download", file=sys.stderr)
        return 130
    return 0


def main():
    allow_any_file_name()
    parser = argparse.ArgumentParser(description=__doc__, add_help=False, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="one of these, or a data set on the Hub")
    parser.add_argument("--out", type=Path, help="file to write (default: data/corpus/NAME.txt); of the Hub: folder of "
                                                 "the shards (default: data/NAME)")
    hub = parser.add_argument_group("for data sets on the Hub")
    hub.add_argument("--tokens", metavar="N", help="tokens in all shards together: 1000000, 10M, 1.5B")
    hub.add_argument("--tokenizer", default="gpt2", metavar="bytes|gpt2|llama3|FILE|FOLDER", help="as in prepare.py (default: gpt2)")
    hub.add_argument("--field", default="text", metavar="NAME", help="column or field with the text (default: text)")
    hub.add_argument("--files", metavar="REGEX", help="paths of the files to use")
    hub.add_argument("--val-fraction", type=float, default=0.005, metavar="X", help="share of the documents for "
                                                                                    "validation (default: 0.005)")
    hub.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="tokens in a file (default: 100,000,000)")
    hub.add_argument("--workers", type=int, metavar="N", help="tokenizing processes (default: one per core)")
    hub.add_argument("--keep-downloads", action="store_true", help="leave what was downloaded in OUT/downloads")
    hub.add_argument("--overwrite", action="store_true", help="replace the shards that OUT holds")
    parser.add_argument("--help", action="help", help="show this and stop")
    parser.error = lambda message: sys.exit((print(f"corpus.py: {message}", file=sys.stderr), 2)[1])
    options = parser.parse_args()
    if options.name not in CORPORA:
        return from_hub(options, parser.error)
    if options.tokens is not None:
        parser.error(f"--tokens is for data sets on the Hub; {options.name} is written whole")
    path = options.out or Path(__file__).parent / "corpus" / f"{options.name}.txt"
    try:
        count = write(CORPORA[options.name](), path)
    except UserError as error:
        parser.error(str(error))
    except OSError as error:
        print(f"corpus.py: {describe(error)}", file=sys.stderr)
        return 1
    print(f"{os.path.relpath(path)}: {path.stat().st_size:,} bytes, {count:,} documents")
    return 0


if __name__ == "__main__":
    sys.exit(main())
