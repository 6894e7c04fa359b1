"""Where prepare.py cuts a long document into pieces that are tokenized one by one, so that their tokens are those of the
whole text."""

import itertools
import re
import unicodedata

CONTEXT = 1024  # bytes before a cut that are tokenized to check it
AFTER = 512     # bytes behind it
TAIL = 16       # last tokens before a cut that must not depend on where the context begins
LIKELY = 4      # places of one kind that are tried
CHARACTERS = 24

# Best first: between two lower-case words, after a line, before a blank, after an ideographic full stop or comma.
PLACES = [re.compile(pattern) for pattern in
          (rb"[a-z](?= [a-z])", rb"\n(?=[^\s])", rb"[^\s](?=[ \t])", rb"\xe3\x80[\x81\x82]|\xef\xbc[\x81\x8c\x9f]")]


def is_inside_character(buffer, place):
    return buffer[place] & 0xC0 == 0x80


def joins_character_before(data):
    """Does a UTF-8 text begin with a mark, a jamo or a joiner, which normalizers compose with what precedes it?"""
    text = data.decode("utf-8", "ignore")[:1]
    return text != "" and (unicodedata.category(text) in ("Mn", "Mc", "Me", "Cf") or "\u1160" <= text <= "\u11ff")


def last_character(buffer, start, end):
    """The end of the last whole character before `end`."""
    place = end
    while place - 1 > start and (is_inside_character(buffer, place) or joins_character_before(buffer[place:place + 4])):
        place -= 1
    return place if place - 1 > start else end


def likely_places(buffer, low, high):
    """Places in [low, high] where a tokenizer may begin a new word, or failing that a new token."""
    for pattern in PLACES:
        found = [low + match.end() for match in pattern.finditer(buffer[low:high + 2])]
        yield from reversed([place for place in found[-LIKELY:] if place <= high])
    characters = (place for place in range(high, low - 1, -1) if not is_inside_character(buffer, place))
    yield from itertools.islice(characters, CHARACTERS)


class CutCheck:
    """Tells whether a tokenizer gives a text, cut at a place, the tokens of the whole: by tokenizing what is around it,
    whole and cut, from several beginnings on, which must agree."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def beginnings(self, buffer, start, cut):
        """`start` itself when it is near, otherwise three neighbouring characters."""
        if cut - start <= CONTEXT:
            return [start]
        characters = (i for i in range(cut - CONTEXT, cut) if not is_inside_character(buffer, i))
        return list(itertools.islice(characters, 3))

    def __call__(self, buffer, start, cut, end, is_continued):
        """buffer[start:end]: a document, or what goes on with one (is_continued) and has not been cut up yet."""
        stop = min(end, cut + AFTER)
        while cut < stop < len(buffer) and is_inside_character(buffer, stop):
            stop -= 1
        beginnings = self.beginnings(buffer, start, cut)
        spans = [(begin, to) for begin in beginnings for to in (cut, stop)] + [(cut, stop)]
        texts = [buffer[begin:to] for begin, to in spans]
        if self.tokenizer.wants_str:
            texts = [text.decode(errors="replace") for text in texts]
        *rows, right = map(list, self.tokenizer.encode(texts, [begin != start or is_continued for begin, _ in spans]))
        lefts, wholes = rows[0::2], rows[1::2]
        return (all(left + right == whole for left, whole in zip(lefts, wholes))
                and len({tuple(left[-TAIL:]) for left in lefts}) == 1 and bool(beginnings))


def find_cut(buffer, start, low, high, end, is_continued, is_cut):
    """A place in [low, high] to cut buffer[start:end]. is_cut: a CutCheck; None: between any two characters. None when
    there is none."""
    if is_cut is None:
        return last_character(buffer, start, high)
    return next((place for place in likely_places(buffer, low, high)
                 if is_cut(buffer, start, place, end, is_continued)), None)
