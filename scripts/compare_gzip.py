#!/usr/bin/env python3
"""Bits per byte of a byte model on held-out text, next to those of gzip -9.

    compare_gzip.py "val_loss <nats> <tokens>" VAL_SHARD...

The first argument is the last line of `train_iha eval`.
"""

import gzip
import math
import sys
from array import array


def held_out_bytes(paths):
    """The text of byte shards. 256, which ends a document, becomes a line feed."""
    text = bytearray()
    for path in paths:
        with open(path, "rb") as f:
            f.seek(1024)
            ids = array("H")
            ids.frombytes(f.read())
        text += bytes(10 if i == 256 else i for i in ids)
    return bytes(text)


def main():
    _, nats, tokens = sys.argv[1].split()
    text = held_out_bytes(sys.argv[2:])
    model = float(nats) / math.log(2)
    packed = 8 * len(gzip.compress(text, 9)) / len(text)
    print(f"val_loss {nats} nats a byte over {int(tokens):,} bytes")
    print(f"  this model  {model:.3f} bits per byte")
    print(f"  gzip -9     {packed:.3f} bits per byte on the same text")


if __name__ == "__main__":
    main()
