#!/usr/bin/env python3
"""Text to token shards that train_iha reads (llm.c's format).

Reads text, JSON and parquet as a stream, from files or pipes, compressed or not; tokenizes in --workers
processes; and writes OUT/train_000000.bin, ..., OUT/val_000000.bin, dataset.json (see write_dataset) and, for
every tokenizer but `bytes`, the tokenizer.json that sampling and `train_iha generate` need. The same input,
tokenizer and seed give the same files, whatever the number of workers. Nothing appears under its final name
before everything is written.

With --chat it reads conversations instead, as JSON lines with "messages" (each a "role" and a "content"), or "prompt" and
"completion"; renders them by a chat template, and writes labels beside the shards, so that only answers count.

With --choices it reads a context, several endings and the index of the right one (HellaSwag's form), and writes a
NAME.choices file for eval.tasks.

How it flows: readers yield (text, ends_document) pieces -> documents get their split -> batches of about a
megabyte -> workers return token arrays -> one writer per split.
"""

import argparse
import hashlib
import json
import os
import re
import signal
import sys
from pathlib import Path

try:
    import numpy  # noqa: F401  what follows needs it
except ImportError:
    sys.exit("prepare.py: numpy is not installed; run: make deps, then .venv/bin/python data/prepare.py ...")

from chat_template import BUILT_IN
from prepare_chat import ChatPreparation, LabelledWriter
from prepare_choices import ChoicesPreparation
from prepare_inputs import Input, format_by_name
from prepare_output import Writer, locked, remove_temporary
from prepare_readers import separator_regex
from prepare_text import Preparation
from prepare_tokenizers import NAMED, load_tokenizer
from user_error import UserError, allow_any_file_name, describe, naming, one_line

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # --workers is the one knob

EXAMPLES = """\
examples:
  data/corpus.py bible
  data/prepare.py --tokenizer bytes --document-separator blank-lines --out data/bible data/corpus/bible.txt
  data/prepare.py --tokenizer gpt2 --field content --workers 8 --out data/web web-*.jsonl
  data/prepare.py --tokenizer tokenizer.model --pattern llama3 --out data/wiki wiki-*.parquet
  data/prepare.py --tokenizer my/tokenizer.json --out data/books books/*.txt.gz
  data/prepare.py --tokenizer bytes --document-separator '<|endoftext|>' --out data/stories stories.txt
  data/prepare.py --tokenizer my/tokenizer.json --chat --seq-len 1024 --out data/talks talks.jsonl.gz
  data/prepare.py --tokenizer gpt2 --choices --out data/choices hellaswag.jsonl
  curl -s https://host/web.jsonl.zst | data/prepare.py --tokenizer gpt2 --out data/web -
"""


def existing_shards(folder, kind=".bin"):
    return [path for split in ("train", "val") for path in folder.glob(f"{split}_[0-9]*{kind}")]


def parse(arguments):
    parser = argparse.ArgumentParser(
        prog="prepare.py", description=__doc__.split("\n\n")[0] + "\n\n" + __doc__.split("\n\n")[1], epilog=EXAMPLES,
        add_help=False, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def fail(message):
        raise UserError(message)

    parser.error = fail
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT",
        help="text, JSON (an object per line, an array, or objects one after another) or parquet; a pipe, or - "
             "for standard input; text and JSON also compressed by gzip, zstd, bzip2 or xz")
    add("--tokenizer", required=True, metavar="bytes|gpt2|llama3|FILE|FOLDER",
        help="FILE: a Hugging Face tokenizer.json, Mistral's tekken.json, or a tiktoken rank file (.tiktoken, "
             "Llama 3's tokenizer.model); FOLDER: a Hugging Face model's")
    add("--out", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    add("--pattern", metavar="NAME|REGEX",
        help=f"how a rank file's encoding cuts words (default: by its size, if known): {', '.join(NAMED)}, or "
             "a regular expression of its own")
    add("--format", choices=("auto", "text", "jsonl", "parquet"), default="auto",
        help="of the inputs (default: by their first bytes and their names); jsonl: any of the JSON layouts; "
             "text: every byte as it is")
    add("--field", default="text", metavar="NAME",
        help="JSON field or parquet column (default: text). It must be there and hold strings; null is a blank "
             "document, and blank documents are left out")
    add("--document-separator", metavar="TEXT",
        help="what parts the documents of a text, and is dropped: blank-lines, lines, a text taken literally, "
             "or regex:PATTERN (default: an input is one document)")
    add("--separator", type=int, metavar="ID",
        help="token that ends a document (default: the eos_token of a tokenizer_config.json beside the "
             "tokenizer, or its token with a known name: <|endoftext|>, </s>, ...)")
    add("--chat", action="store_true",
        help='JSON lines are conversations: {"messages": [{"role": ..., "content": ...}, ...]}, or "prompt" and '
             '"completion". Only the turns of "assistant" count, end marker included')
    add("--chat-template", metavar=f"{'|'.join(BUILT_IN)}|FILE",
        help="with --chat: a built-in template, or a Jinja file (default: the one that the tokenizer brings; bytes: bytes)")
    add("--choices", action="store_true",
        help='JSON lines are {"context": TEXT, "endings": [TEXT, ...], "label": INDEX}; each input becomes a file for '
             "eval.tasks")
    add("--seq-len", type=int, metavar="N", help="with --chat: leave out conversations of more tokens (default: none)")
    add("--val-fraction", type=float, default=0.05, metavar="X",
        help="share of the documents for validation, chosen by a hash of seed and index; of a single whole "
             "text, its last part; 0: none (default: 0.05)")
    add("--seed", type=int, default=1, metavar="N", help="of the split (default: 1)")
    add("--shard-tokens", type=int, default=100_000_000, metavar="N",
        help="tokens in a file (default: 100,000,000)")
    add("--workers", type=int, metavar="N", help="tokenizing processes (default: one per core; bytes: 1)")
    add("--overwrite", action="store_true", help="replace the shards that FOLDER holds")
    add("--help", action="help", help="show this and stop")
    options = parser.parse_args(arguments)
    check(options)
    return options


def check_input(path):
    if path == "-":
        return
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give its files, for example {path.rstrip('/')}/*.txt")
    if Input(path).size == 0:
        raise UserError(f"{path}: empty")


def may_be_text(path, asked):
    source = Input(path)
    if source.read_once:  # it must not be opened yet
        return (format_by_name(path) if asked == "auto" else asked) in (None, "text")
    source.open().close()
    return source.format(asked) == "text"


def check(options):
    for name, value in vars(options).items():
        if value == []:  # what argparse makes of the value "--"
            raise UserError(f"--{name.replace('_', '-')}: '--' cannot be given as a value; a separator may be written regex:--")
    if not 0 <= options.val_fraction < 1:
        raise UserError(f"--val-fraction {options.val_fraction}: must be at least 0 and below 1")
    if not 1 <= options.shard_tokens <= 2_000_000_000:  # the header's count is an int32; a short shard may join
        raise UserError(f"--shard-tokens {options.shard_tokens}: must be 1 to 2,000,000,000")
    if options.workers is None:
        options.workers = 1 if options.tokenizer == "bytes" else len(os.sched_getaffinity(0))
    if options.workers < 1:
        raise UserError(f"--workers {options.workers}: must be at least 1")
    if options.separator is not None and not 0 <= options.separator < 2**31:
        raise UserError(f"--separator {options.separator}: not a token id")
    if re.search("[\0-\x1f\x7f]", str(options.out)):
        raise UserError(f"--out {options.out}: a line break or control character in the name, which no "
                        "configuration can hold")
    if os.path.exists(options.out) and not os.path.isdir(options.out):
        raise UserError(f"--out {options.out}: is no folder")
    if options.choices and (options.chat or options.field != "text" or options.document_separator is not None):
        raise UserError("--choices cannot be combined with --chat, --field or --document-separator")
    if not options.chat and (options.chat_template is not None or options.seq_len is not None):
        raise UserError(f"{'--chat-template' if options.chat_template is not None else '--seq-len'} belongs to --chat")
    if options.chat and (options.field != "text" or options.document_separator is not None):
        raise UserError(f"{'--field' if options.field != 'text' else '--document-separator'} is for text, not for --chat")
    if options.seq_len is not None and options.seq_len < 2:
        raise UserError(f"--seq-len {options.seq_len}: must be at least 2")
    if options.inputs.count("-") > 1:
        raise UserError("-: standard input can only be read once")
    for path in options.inputs:
        check_input(path)
    options.separator_text = options.document_separator
    if options.document_separator is not None:
        if not any(may_be_text(path, options.format) for path in options.inputs):
            raise UserError("--document-separator is for text files; a JSON object or parquet row is a "
                            "document")
        options.document_separator = separator_regex(options.document_separator)
    check_no_shards(options)


def copy_end_ids(path, folder):
    """generation_config.json from beside the tokenizer, whose end ids generation stops at; without one there is none."""
    source, target = Path(path).parent / "generation_config.json", folder / "generation_config.json"
    if os.path.isfile(path) and source.exists():  # a name such as gpt2 is no path
        if source.resolve() != target.resolve():
            target.write_bytes(source.read_bytes())
    else:
        target.unlink(missing_ok=True)


def write_tokenizer(tokenizer, folder):
    tokenizer.json_path = None
    if tokenizer.json is not None:
        tokenizer.json_path = folder / "tokenizer.json"
        partial = folder / "tokenizer.json.tmp"
        partial.write_text(tokenizer.json, encoding="utf-8", newline="")
        os.replace(partial, tokenizer.json_path)
        copy_end_ids(tokenizer.path, folder)


def write_dataset(run, folder, writers):
    """dataset.json: what made these shards. tokenizer_sha256 is that of tokenizer.json, null for bytes;
    separator the id that ends a document; bytes the UTF-8 bytes of text in a shard."""
    tokenizer, path = run.tokenizer, run.tokenizer.json_path
    shards = {writer.name(i).name: {"tokens": count, "bytes": length} for writer in writers.values()
              for i, (count, length) in enumerate(zip(writer.counts, writer.bytes))}
    content = {"tokenizer": path.name if path else "bytes",
               "tokenizer_sha256": hashlib.sha256(tokenizer.json.encode()).hexdigest() if path else None,
               "vocab_size": run.vocab_size, "separator": run.separator, "shards": shards}
    partial = folder / "dataset.json.tmp"
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", newline="\n")
    os.replace(partial, folder / "dataset.json")


def check_no_shards(options):
    if not options.overwrite and existing_shards(options.out):
        raise UserError(f"{options.out}: already holds shards; give another --out, or --overwrite")


def prepare(arguments):
    options = parse(arguments)
    tokenizer = load_tokenizer(options.tokenizer, options.pattern)
    kind = ChatPreparation if options.chat else ChoicesPreparation if options.choices else Preparation
    run = kind(options, tokenizer)
    with locked(options.out):
        if options.choices:
            return run, write_choices(run, options)
        check_no_shards(options)  # another run may just have ended
        return run, write(run, options.out)


def write_choices(run, options):
    """The files of choices, with the dataset.json that says which tokenizer made them. They have a folder of their own."""
    folder = options.out
    if existing_shards(folder):
        raise UserError(f"{folder}: holds shards, and choices need a folder of their own; give another --out")
    taken = [path.name for path in folder.glob("*.choices")]
    if taken and not options.overwrite:
        raise UserError(f"{folder}: already holds {sorted(taken)[0]}; give another --out, or --overwrite")
    remove_temporary(folder)
    written = run.write(folder)
    for name in set(taken) - written:  # not before: bad input leaves what there was
        (folder / name).unlink()
    with naming(folder / "tokenizer.json"):
        write_tokenizer(run.tokenizer, folder)
    with naming(folder / "dataset.json"):
        write_dataset(run, folder, {})
    return {}


def write_chat(run, folder):
    """chat.json: see chat_pieces.py."""
    path = run.tokenizer.json_path
    partial = folder / "chat.json.tmp"
    partial.write_text(run.chat_json(hashlib.sha256(run.tokenizer.json.encode()).hexdigest() if path else None),
                       encoding="utf-8", newline="\n")
    os.replace(partial, folder / "chat.json")


def write(run, folder):
    remove_temporary(folder)
    writers = {split: (LabelledWriter if run.options.chat else Writer)(folder, split, run.dtype, run.options.shard_tokens)
               for split in ("train", "val")}
    try:
        run.run(writers)
        for writer in writers.values():
            writer.finish()
        # dataset.json is away while shards are replaced: old ones are never beside the description of new ones; nor
        # are old labels beside new shards.
        for old in [folder / "dataset.json", folder / "chat.json", *existing_shards(folder, ".labels")]:
            old.unlink(missing_ok=True)
        written = set().union(*(writer.commit() for writer in writers.values()))
        for old in existing_shards(folder):
            if old not in written:
                old.unlink()
        with naming(folder / "tokenizer.json"):
            write_tokenizer(run.tokenizer, folder)
        with naming(folder / "chat.json"):
            if run.options.chat:
                write_chat(run, folder)
        with naming(folder / "dataset.json"):
            write_dataset(run, folder, writers)
    except BaseException:
        for writer in writers.values():
            writer.discard()
        remove_temporary(folder)
        raise
    return writers


def report(run, writers):
    """The summary; the shards are there whatever becomes of it."""
    if sys.stdout is not None:
        try:
            run.report(writers)
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter tries again
            why = f"{error.strerror}; the shards are written"
            raise OSError(error.errno, why, "standard output") from None
    run.warn()


def main():
    if sys.stderr is None:  # closed by the shell
        sys.stderr = open(os.devnull, "w")
    allow_any_file_name()
    try:
        report(*prepare(sys.argv[1:]))
    except UserError as error:
        print(f"prepare.py: {one_line(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of the summary has closed the pipe; the shards are written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"prepare.py: {one_line(describe(error))}", file=sys.stderr)
        return 1
    except MemoryError:
        print("prepare.py: out of memory; try fewer --workers", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare.py: stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


def terminate(number, frame):
    """SIGTERM and SIGHUP remove the temporary files as well."""
    sys.exit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, terminate)
    sys.exit(main())
