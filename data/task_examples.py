"""The synthetic tasks of tasks.py: how one example of each is drawn, and what its labels are.

An example is (tokens, labels), two lists of the same length. A label is the id to predict at that position, or
NOT_COUNTED. `binary`, `ternary`, `cpm3` and `polynomial` follow the paper (arXiv 2602.21371, App. B and D); `multikey`
is the multi-key needle of RULER (arXiv 2404.06654).
"""

import numpy as np

NOT_COUNTED, PADDING = -1, -2  # labels; the same as in data/shard_file.h


def drawn_below(rng, bound, count):
    """`count` ids in [0, bound), as a list."""
    return rng.integers(0, bound, count).tolist()


# ---------------------------------------------------------------------------------- composition


class Composition:
    """A random boolean m x m matrix R, row by row; at every position, the bit of the product of `order` factors R:
    (R o R)_ij = 1 iff R_ik and R_kj for some k."""

    causal, separator, vocab_size, splits = False, 2, 3, (40000, 5000, 5000)

    def __init__(self, order, sizes, density):
        self.order, self.sizes, self.density = order, sizes, density

    @property
    def seq_len(self):
        return self.sizes[1] ** 2

    def example(self, rng):
        m = int(rng.integers(self.sizes[0], self.sizes[1] + 1))
        matrix = (rng.random((m, m)) < self.density).astype(np.int64)
        product = matrix
        for _ in range(self.order - 1):
            product = (product @ matrix > 0).astype(np.int64)
        return matrix.ravel().tolist(), product.ravel().tolist()


# ---------------------------------------------------------------------------------- sums modulo M


class CountMatches:
    """CPM-3: N ids x below M; at position i, the number of pairs (j, l) with x_i + G x_j + x_l = 0 modulo M. The order
    of the pair matters, since G is not 1."""

    causal, splits = False, (40000, 5000, 5000)

    def __init__(self, length, modulus, factor):
        self.seq_len, self.modulus, self.factor = length, modulus, factor
        self.separator = max(modulus, length * length + 1)
        self.vocab_size = self.separator + 1

    def example(self, rng):
        x = rng.integers(0, self.modulus, self.seq_len)
        first = np.bincount(self.factor * x % self.modulus, minlength=self.modulus)
        last = np.bincount(x, minlength=self.modulus)
        # pairs[r]: how many pairs sum to r; a position needs those that sum to -x_i.
        pairs = sum(first[r] * np.roll(last, r) for r in range(self.modulus))
        return x.tolist(), pairs[-x % self.modulus].tolist()


class PolynomialFilter:
    """A filter of the given order over a ring of N ids x below M: y = (c_0 + c_1 A + ... + c_K-1 A^(K-1)) x modulo M,
    with A the cyclic shift by one place and coefficients drawn once, from the seed. The paper's filters act on real
    vectors; here they act on ids, so that the output is a label."""

    causal, splits = False, (40000, 5000, 5000)

    def __init__(self, length, modulus, order, seed):
        self.seq_len, self.modulus, self.separator, self.vocab_size = length, modulus, modulus, modulus + 1
        self.coefficients = np.random.default_rng([seed, 1]).integers(1, modulus, order)

    def example(self, rng):
        x = rng.integers(0, self.modulus, self.seq_len)
        y = sum(c * np.roll(x, power) for power, c in enumerate(self.coefficients)) % self.modulus
        return x.tolist(), y.tolist()


# ------------------------------------------------------------------------------------- multi-key


def with_answer(prompt, answer, separator):
    """Tokens of a prompt and its answer, of which only the answer's tokens count, each predicted at the position before
    it."""
    labels = [NOT_COUNTED] * (len(prompt) - 1) + answer + [NOT_COUNTED] * 2
    return prompt + answer + [separator], labels


class MultiKeyIds:
    """`pairs` keys, each followed by a value of `value_tokens` ids, at random places among filler ids, in `length`
    tokens; then a query mark and one of the keys, whose value is to be predicted. With `needles` there is no filler:
    as many pairs as fit."""

    causal, splits = True, (20000, 500, 500)
    QUERY, KEYS, VALUES, FILLERS = 0, 256, 64, 64  # the query mark, and how many ids of each kind

    def __init__(self, length, pairs, needles, value_tokens):
        self.seq_len, self.value_tokens = length, value_tokens
        room = length - (3 + value_tokens)  # mark, key, value, separator
        self.pairs = min(room // (1 + value_tokens), self.KEYS) if needles else pairs
        self.filler = room - self.pairs * (1 + value_tokens)
        if self.filler < 0 or self.pairs < 1 or self.pairs > self.KEYS:
            raise ValueError(f"{pairs} pairs of 1 + {value_tokens} tokens do not fit --length {length}: "
                             f"give 1 to {min(max(room, 0) // (1 + value_tokens), self.KEYS)}")
        self.first_value = 1 + self.KEYS
        self.first_filler = self.first_value + self.VALUES
        self.separator = self.first_filler + self.FILLERS
        self.vocab_size = self.separator + 1
        self.needles = needles

    def example(self, rng):
        keys = (1 + rng.permutation(self.KEYS)[:self.pairs]).tolist()
        values = (self.first_value + rng.integers(0, self.VALUES, (self.pairs, self.value_tokens))).tolist()
        fill = 0 if self.needles else self.filler
        # Before which filler token each pair stands.
        places = np.sort(rng.integers(0, fill + 1, self.pairs))
        filler = (self.first_filler + rng.integers(0, self.FILLERS, fill)).tolist()
        tokens, at = [], 0
        for key, value, place in zip(keys, values, places):
            tokens += filler[at:place] + [key] + value
            at = place
        asked = int(rng.integers(self.pairs))
        return with_answer(tokens + filler[at:] + [self.QUERY, keys[asked]], values[asked], self.separator)


CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
FILLER = ("The river is wide here. ", "Snow fell all night. ", "He closed the door and went home. ", "A bird sang. ",
          "The road leads over the hill. ", "Nobody answered. ", "It was late in the year. ", "They waited for the boat. ")


class MultiKeyBytes:
    """The same in words: sentences that give numbers to keys, among filler sentences (of a text, if one is given) or,
    with `needles`, among as many of their kind as fit; then a question. Bytes, and 256 at the end."""

    causal, separator, vocab_size, splits = True, 256, 257, (20000, 500, 500)

    def __init__(self, length, pairs, needles, digits, text=None):
        self.seq_len, self.pairs, self.needles, self.digits = length, pairs, needles, digits
        self.filler = FILLER if text is None else tuple(sentences_of(text))
        shortest = sum(map(len, self.question("x" * 8))) + digits + 1
        needle = len(self.needle("x" * 8, "0" * digits))
        self.room = length - shortest
        if needles:
            self.pairs = self.room // needle
        if self.pairs < 1 or self.pairs * needle > self.room:
            raise ValueError(f"{pairs} pairs do not fit --length {length}: the question takes {shortest} bytes, a pair "
                             f"{needle}")
        self.filler_room = 0 if needles else self.room - self.pairs * needle
        if self.filler_room and not self.filler:
            raise ValueError("the text has no sentence of at most 200 bytes")

    @staticmethod
    def needle(key, value):
        return f"One of the special magic numbers for {key} is: {value}. "

    @staticmethod
    def question(key):
        return f"What is the special magic number for {key}? ", f"The special magic number for {key} is: "

    @staticmethod
    def word(rng):
        """Eight letters, alternately consonants and vowels."""
        return "".join(CONSONANTS[a] + VOWELS[b] for a, b in zip(rng.integers(0, len(CONSONANTS), 4),
                                                                  rng.integers(0, len(VOWELS), 4)))

    def example(self, rng):
        keys = []
        while len(keys) < self.pairs:
            word = self.word(rng)
            if word not in keys:
                keys.append(word)
        values = ["".join(map(str, drawn_below(rng, 10, self.digits))) for _ in keys]
        sentences, left = [], self.filler_room
        while left:
            sentence = self.filler[int(rng.integers(len(self.filler)))]
            if len(sentence) > left:
                break
            sentences.append(sentence)
            left -= len(sentence)
        for key, value in zip(keys, values):
            sentences.insert(int(rng.integers(len(sentences) + 1)), self.needle(key, value))
        asked = int(rng.integers(self.pairs))
        prompt = "".join(sentences) + "".join(self.question(keys[asked]))
        return with_answer(list(prompt.encode("ascii")), list(values[asked].encode("ascii")), self.separator)


def sentences_of(text):
    """Its sentences of at most 200 ASCII characters, each with a blank after it. A sentence ends with a full stop."""
    for sentence in " ".join(text.encode("ascii", "ignore").decode().split()).split(". "):
        if 1 < len(sentence) <= 200:
            yield sentence.rstrip(".") + ". "
