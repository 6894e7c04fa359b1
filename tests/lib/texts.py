"""Texts for tokenizers."""

import random


def texts(count, seed):
    """Short ones, of ASCII, control characters and characters of two to four bytes; and two that are often forgotten."""
    draw = random.Random(seed)
    alphabet = "abc XYZ\n\t\0\x7f0129ßéΩж中😀\u200b\ufeff"
    return ["".join(draw.choices(alphabet, k=draw.randrange(40))) for _ in range(count)] + ["", "\r\n  a"]
