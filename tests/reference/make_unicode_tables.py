#!/usr/bin/env python3
"""Makes data/tokenizer_unicode_tables.def: where the Unicode data of PCRE2 and utf8proc, of whatever version is
installed, differs from what the tokenizers library was built with.

    pip install tokenizers unicodedata2 && python tests/reference/make_unicode_tables.py

Everything is read off the library itself, by trying every code point. unicodedata2, which has the newest
Unicode, tells which code points later versions of PCRE2 and utf8proc will know and the library does not.
"""
import pathlib
import unicodedata as old  # Python 3.11 has Unicode 14, as PCRE2 10.40 to 10.42
import unicodedata2 as new

from tokenizers import Regex, normalizers, pre_tokenizers

OUT = pathlib.Path(__file__).resolve().parents[2] / "data" / "tokenizer_unicode_tables.def"
CATEGORIES = "Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp Cc Cf Co Cn".split()
SCRIPTS = "Han Hiragana Katakana Hangul Latin Cyrillic Greek Arabic Hebrew Thai Devanagari".split()  # of tokenizer_regex.c
ALL = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def members(pattern):
    text = "".join(map(chr, ALL))
    return {ord(c) for piece, _ in pre_tokenizers.Split(Regex(pattern), "removed", True).pre_tokenize_str(text)
            for c in piece}


def by_name(names):
    return {c: name for name in names for c in members(rf"\p{{{name}}}")}


def size(code):
    return len(chr(code).encode())


def substitutes():
    """(first, last, substitute): code points that the library puts into another category than some PCRE2 may, and
    one of the library's category (and script, if patterns can name it) that has always been there."""
    category, script = by_name(CATEGORIES), by_name(SCRIPTS)
    settled = [c for c in ALL if category[c] == old.category(chr(c)) == new.category(chr(c)) and c >= 0x80]
    spare = {}
    for c in settled:
        spare.setdefault((size(c), category[c], script.get(c)), c)
    for length, noncharacter in ((2, 0x378), (3, 0xFDD0), (4, 0x1FFFE)):  # never or not yet assigned
        assert category[noncharacter] == new.category(chr(noncharacter)) == "Cn"
        spare[length, "Cn", None] = noncharacter
    ranges = []
    for c in sorted(set(ALL) - set(settled) - set(range(0x80))):
        key = size(c), category[c], script.get(c)
        # Of a script whose older members lack this category, any of the category will do.
        substitute = spare.get(key) or spare[size(c), category[c], None]
        if ranges and ranges[-1][1] == c - 1 and ranges[-1][2] == substitute:
            ranges[-1][1] = c
        else:
            ranges.append([c, c, substitute])
    return ranges


def inert():
    """Code points with properties that matter to normalization and that the library, whose tables are older, does
    not know: it leaves them alone, and nothing is moved or composed across them."""
    forms = {"NFC": normalizers.NFC(), "NFD": normalizers.NFD(), "NFKC": normalizers.NFKC(), "NFKD": normalizers.NFKD()}
    found = set()
    for c in ALL:
        for text in (chr(c), f"a\u0315{chr(c)}\u0334", f"a\u0334{chr(c)}\u0315"):
            if any(form.normalize_str(text) != new.normalize(name, text) for name, form in forms.items()):
                found.add(c)
    for c in ALL:  # compositions that the library lacks: the parts, too, stay apart
        parts = new.decomposition(chr(c))
        if parts and not parts.startswith("<"):
            parts = [int(part, 16) for part in parts.split()]
            text = "".join(map(chr, parts))
            if forms["NFC"].normalize_str(text) != new.normalize("NFC", text):
                found.add(c)
                found.add(max(parts))
    return as_ranges(found)


def as_ranges(codes):
    ranges = []
    for c in sorted(codes):
        if ranges and ranges[-1][1] == c - 1:
            ranges[-1][1] = c
        else:
            ranges.append([c, c])
    return ranges


def lower():
    """(first, last, distance): lower-case forms that Unicode 14 does not have; those after it came apart by a constant."""
    form = normalizers.Lowercase()
    ranges = []
    for c in ALL:
        text = form.normalize_str(chr(c))
        if text == chr(c).lower() or len(text) != 1:
            continue
        distance = ord(text) - c
        if ranges and ranges[-1][1] == c - 1 and ranges[-1][2] == distance:
            ranges[-1][1] = c
        else:
            ranges.append([c, c, distance])
    return ranges


def table(kind, name, comment, rows, show):
    return (f"/* {comment} */\nstatic const struct {kind} {name}[] = {{\n"
            + "\n".join("    {" + ", ".join(show(row)) + "}," for row in rows) + "\n};\n")


def blocks(ranges):
    """A bit for each 256 code points: are there any of the ranges? Word by word, and row by row."""
    words = [0] * (0x110000 >> 13)
    for first, last, _ in ranges + [[0x180E, 0x180E, 0]]:
        for block in range(first >> 8, (last >> 8) + 1):
            words[block >> 5] |= 1 << (block & 31)
    return ("/* a bit for each 256 code points that have a substitute among them */\n"
            "static const uint32_t substitute_blocks[] = {\n"
            + "".join("    " + " ".join(f"{word:#x}," for word in words[i:i + 8]) + "\n" for i in range(0, len(words), 8)) + "};\n")


def main():
    hexes = lambda row: [f"{value:#x}" for value in row]
    ranges = substitutes()
    OUT.write_text(
        "/* Made by tests/reference/make_unicode_tables.py; included by tokenizer_unicode.c. */\n\n// clang-format off\n"
        + table("substitute", "substitutes", "first, last, what a regular expression sees instead", ranges, hexes) + "\n"
        + blocks(ranges) + "\n"
        + table("range", "inert_ranges", "first, last: left alone by normalization", inert(), hexes) + "\n"
        + table("lower_range", "lower_ranges", "first, last, distance to the lower-case form", lower(),
                lambda row: [f"{row[0]:#x}", f"{row[1]:#x}", str(row[2])]))


if __name__ == "__main__":
    main()
