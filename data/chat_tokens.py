"""A rendered conversation as ids: those that the tokenizers library gives for the whole text, but for special tokens that a
message spells out, which stay text.

Between two special tokens stands a text, which the library tokenizes on its own. What it makes of it depends on where it
stands: at the very beginning some tokenizers put a space in front, behind a special token they may not; and special tokens
may take the spaces beside them (lstrip, rstrip).

Within such a text an answer may begin. There the model begins too, having been fed what precedes it as a text of its own,
so these ids must stand in front of the answer's. Where the whole text has them there, it is tokenized as a whole; where it
has not, since a token would reach over the cut, both sides are tokenized apart.
"""

from chat_template import MARKS
from prepare_tokenizers import BEGINS, CONTINUES, FOLLOWS
from user_error import UserError

# What the library takes for spaces beside a token: Unicode's White_Space.
SPACES = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200b))) + "\u2028\u2029\u202f\u205f\u3000"


def special_tokens(tokenizer):
    """{id: AddedToken} of the special tokens of a tokenizer.json."""
    return {id: token for id, token in tokenizer.tokenizer.get_added_tokens_decoder().items() if token.special and token.content}


class Segment:
    """A text between two special tokens, the first of which is `after`. cuts: (where it ends, whether it counts) of its
    parts, in order; none is empty."""

    def __init__(self, place, after=None):
        self.place, self.after, self.text, self.cuts = place, after, "", []

    def add(self, text, counts):
        if text:
            self.text += text
            if self.cuts and self.cuts[-1][1] == counts:
                self.cuts.pop()
            self.cuts.append((len(self.text), counts))

    def strip_front(self):
        taken = len(self.text) - len(self.text.lstrip(SPACES))
        self.text = self.text[taken:]
        self.cuts = [(end - taken, counts) for end, counts in self.cuts if end > taken]

    def strip_back(self):
        """Of the last part only: what precedes it is fed before anybody knows that only spaces follow."""
        if self.cuts:
            begin = self.cuts[-2][0] if len(self.cuts) > 1 else 0
            kept = begin + len(self.text[begin:].rstrip(SPACES))
            self.text, counts = self.text[:kept], self.cuts.pop()[1]
            if kept > begin:
                self.cuts.append((kept, counts))

    def beginnings(self):
        """The text up to each cut, the whole last."""
        return [(self.text[:end], self.place) for end, _ in self.cuts]

    def pieces(self):
        begins = [0] + [end for end, _ in self.cuts]
        return [(self.text[begin:end], CONTINUES if begin else self.place) for begin, (end, _) in zip(begins, self.cuts)]


class PartsEncoder:
    """Makes ids of the parts of conversations; of a Bytes or a HuggingFace."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        tokens = special_tokens(tokenizer) if tokenizer.json is not None else {}
        self.strips_before = {id for id, token in tokens.items() if token.lstrip}
        self.strips_after = {id for id, token in tokens.items() if token.rstrip}

    def segments(self, parts):
        """The ids (with whether they count) and Segments of [(items, counts)], in order."""
        found, current = [], Segment(BEGINS)
        for items, counts in parts:
            for item in items:
                if isinstance(item, str):
                    current.add(item, counts)
                    continue
                if item in self.strips_before:
                    current.strip_back()
                found += [current, (item, counts)]
                current = Segment(FOLLOWS, item)
        found.append(current)
        for segment in found:
            if isinstance(segment, Segment) and segment.after in self.strips_after:
                segment.strip_front()
        return [item for item in found if not isinstance(item, Segment) or item.cuts]

    def encode(self, requests):
        """[(text, place)] to ids."""
        return [[int(id) for id in ids] for ids in self.tokenizer.encode_at(requests)]

    def __call__(self, parts):
        """[(items, counts)] to (ids, whether each counts)."""
        found = self.segments(parts)
        segments = [item for item in found if isinstance(item, Segment)]
        wholes = iter(self.encode([request for segment in segments for request in segment.beginnings()]))
        rows = [[next(wholes) for _ in segment.cuts] for segment in segments]
        apart = [k for k, row in enumerate(rows) if any(row[-1][:len(ids)] != ids for ids in row)]
        pieces = iter(self.encode([request for k in apart for request in segments[k].pieces()]))
        for k, segment in enumerate(segments):
            if k in apart:
                rows[k] = [next(pieces) for _ in segment.cuts]
            else:
                begins = [0] + [len(ids) for ids in rows[k]]
                rows[k] = [rows[k][-1][begin:end] for begin, end in zip(begins, begins[1:])]
        rows, ids, counted = iter(rows), [], []
        for item in found:
            pairs = zip(next(rows), (counts for _, counts in item.cuts)) if isinstance(item, Segment) else [([item[0]], item[1])]
            for more, counts in pairs:
                ids += more
                counted += [counts] * len(more)
        return ids, counted


def check_library_agrees(tokenizer, marks, texts):
    """Rendered conversations must be the ids that the library gives for them. A special token that it does not find where
    it stands in the text makes a difference, as does one that it finds inside another."""
    if tokenizer.json is None:
        return
    encode = PartsEncoder(tokenizer)
    written = [token for id, token in special_tokens(tokenizer).items() if any(token.content in text for text in texts)]
    spaces = [token.content for token in tokenizer.tokenizer.get_added_tokens_decoder().values()
              if not token.special and token.content and not token.content.strip(SPACES)]
    stripping = [token.content for token in written if token.lstrip or token.rstrip]
    if spaces and stripping:
        raise UserError(f"--chat: the special token {stripping[0]} of this tokenizer takes spaces beside it, and others of its "
                        f"added tokens are spaces, {spaces[0]!r}; set its lstrip and rstrip to false in tokenizer.json")
    for text in texts:
        if encode([(marks.split(text, MARKS[0]), False)])[0] == tokenizer.encode_whole(text):
            continue
        cause = next((f"whose special token {token.content} is \"normalized\" or \"single_word\"; set both to false there"
                      for token in written if token.normalized or token.single_word),
                     "and says not why; give another --chat-template")
        raise UserError(f"--chat: the tokenizers library reads the rendered conversation otherwise than {tokenizer.path} has "
                        f"special tokens, {cause}")
