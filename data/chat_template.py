"""Chat templates: a conversation as the text that a model is trained on, and which parts of it are answers.

Templates are Jinja, and are rendered as Transformers renders them. Special tokens that a template writes become their
ids; in a message's content they stay text. To tell the two apart, content is marked before it is rendered (see Marks).
"""

import datetime
import functools
import json
import os
import re

from user_error import UserError

# The byte tokenizer has no special tokens. These three control characters, which hardly any text has, serve as such, and
# are dropped from the contents of messages.
BYTE_SPECIALS = {"\x01": 1, "\x02": 2, "\x03": 3}

BUILT_IN = {
    "bytes": "{% for message in messages %}\x01{{ message['role'] }}\x02{{ message['content'] }}\x03{% endfor %}"
             "{% if add_generation_prompt %}\x01assistant\x02{% endif %}",
    "chatml": "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
              "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama3": "<|begin_of_text|>{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
              "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
              "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
}
# The special tokens that these templates write.
NEEDED = {"bytes": [], "chatml": ["<|im_start|>", "<|im_end|>"],
          "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}

GENERATION_BEGIN, GENERATION_END = "\ufdee", "\ufdef"  # around {% generation %}; Unicode says that no text has them
MARKS = [chr(code) for code in range(0xFDD0, 0xFDEE)]   # nor these, of which one is chosen that indeed is not there


class TemplateFailed(Exception):
    """A conversation that the template does not render; the message says why."""


def now():
    """The time that templates are told. SOURCE_DATE_EPOCH sets it, so that a day later the same shards can be made."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH", "")
    return datetime.datetime.fromtimestamp(int(epoch), datetime.timezone.utc) if epoch.isdigit() else datetime.datetime.now()


def environment():
    try:
        import jinja2
        from jinja2 import nodes
        from jinja2.ext import Extension, LoopControlExtension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("--chat needs the package jinja2; run: make deps, or pip install jinja2") from None

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %}: what a template itself calls an answer."""
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("surround"), [], [], body).set_lineno(line)

        def surround(self, caller):
            return GENERATION_BEGIN + caller() + GENERATION_END

    def raise_exception(message):
        raise jinja2.exceptions.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, LoopControlExtension])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = lambda pattern: now().strftime(pattern)
    return made


class Template:
    """A chat template, and what it knows of its tokenizer. It pickles as its source."""

    def __init__(self, name, source, names):
        """name: for messages. names: {"bos_token": "<s>", ...}, which the template may write."""
        self.name, self.source, self.names = name, source, names
        self.compiled = self.compile()

    def __getstate__(self):
        return {"name": self.name, "source": self.source, "names": self.names}

    def __setstate__(self, state):
        self.__init__(**state)

    def compile(self):
        try:
            return environment().from_string(self.source)
        except UserError:
            raise
        except Exception as error:  # TemplateSyntaxError, and what a hostile template makes of the compiler
            line = getattr(error, "lineno", None)
            raise UserError(f"{self.name}: not a chat template" + (f", line {line}" if line else "")
                            + f": {error or type(error).__name__}") from None

    def render(self, messages, prompt=False, **others):
        """The text; with `prompt` up to where an answer begins."""
        try:
            given = {"tools": None, "documents": None} | self.names | others
            return self.compiled.render(messages=messages, add_generation_prompt=prompt, **given)
        except Exception as error:  # templates raise what they like
            raise TemplateFailed(str(error) or type(error).__name__) from None


    @functools.cached_property
    def ignores_prompt(self):
        """Is the text the same with and without `prompt`? Then what follows the last turn may be the next one's beginning."""
        messages = [{"role": "user", "content": "a"}]
        try:
            return self.render(messages) == self.render(messages, prompt=True)
        except TemplateFailed:
            return False


def without_tags(text):
    return text.replace(GENERATION_BEGIN, "").replace(GENERATION_END, "")


# ------------------------------------------------------------------------------------- special tokens


class Marks:
    """Special tokens: found where a template wrote them, hidden where a message has them as text."""

    def __init__(self, ids, dropped=""):
        """ids: {name: id}. dropped: characters that no content keeps."""
        self.ids = ids
        names = sorted(filter(None, ids), key=len, reverse=True)  # longest first, as one may begin another
        self.any = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self.dropped = {ord(character): None for character in dropped}

    def hide(self, value, mark):
        """The strings of a JSON value with their special tokens out of the template's sight. Lone surrogates, which JSON
        can write and UTF-8 cannot, become question marks."""
        if isinstance(value, dict):
            return {name: self.hide(item, mark) for name, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, mark) for item in value]
        if not isinstance(value, str):
            return value
        text = value.translate(self.dropped)
        if not text.isascii():
            text = text.encode(errors="replace").decode()
        return self.any.sub(lambda found: mark + found[0][0] + mark + found[0][1:], text)

    @staticmethod
    def free(text):
        """A mark that does not stand in the text."""
        return next((mark for mark in MARKS if mark not in text), None)

    def find(self, text, mark, start=0):
        """The special tokens of a rendered text. The mark precedes those of one character that were hidden."""
        return (found for found in self.any.finditer(text, start) if text[found.start() - 1:found.start()] != mark)

    def split(self, text, mark):
        """A rendered text as a list of ids and texts."""
        items, done = [], 0
        for found in self.find(text, mark):
            items += [text[done:found.start()], self.ids[found[0]]]
            done = found.end()
        items.append(text[done:])
        items = [item.replace(mark, "") if isinstance(item, str) else item for item in items]
        return [item for item in items if item != ""]


# --------------------------------------------------------------------------------------------- answers


def tagged_answers(text):
    """Where {% generation %} says that answers are: ranges of the text without its tags, which is returned too."""
    plain, spans, begin = [], [], None
    length = 0
    for piece in re.split(f"([{GENERATION_BEGIN}{GENERATION_END}])", text):
        if piece == GENERATION_BEGIN:
            begin = length
        elif piece == GENERATION_END:
            if begin is not None:
                spans.append((begin, length))
            begin = None
        else:
            plain.append(piece)
            length += len(piece)
    return "".join(plain), spans


def common_length(a, b):
    return len(os.path.commonprefix([a, b]))


def content_end(template, mark, text, messages, i, others, begin):
    """Where the content of message i ends in the text, which is found by changing it."""
    changed = messages[:i] + [messages[i] | {"content": next(other for other in MARKS if other != mark)}] + messages[i + 1:]
    try:
        other = without_tags(template.render(changed, **others))
    except TemplateFailed:
        return begin
    return max(begin, len(text) - common_length(text[::-1], other[::-1]))


def marker_behind(marks, mark, text, content):
    """The special token behind a content, only white space between them, or None."""
    found = next(marks.find(text, mark, content), None)
    return found if found and not text[content:found.start()].strip() else None


def is_marker(template, marks, mark, text, messages, others, content, found):
    """Does that special token stand behind the last turn too once others follow?"""
    others_follow = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        longer = without_tags(template.render(messages + others_follow, **others))
    except TemplateFailed:
        return True
    then = marker_behind(marks, mark, longer, content) if longer.startswith(text[:content]) else None
    return then is None or then[0] == found[0]


def answer_span(template, marks, mark, text, messages, i, others):
    """The range of assistant turn i, its end marker included: from where the template has the model begin, to the last
    special token of the turn; or, where the template renders the turn otherwise once others follow, to the special token
    behind its content."""
    begin = without_tags(template.render(messages[:i], prompt=True, **others))
    if not text.startswith(begin):
        raise TemplateFailed(f"it renders what precedes message {i + 1} in another way once that is there, so where the "
                             "answer begins is not known; a template can say it by {% generation %}")
    content = content_end(template, mark, text, messages, i, others, len(begin))
    ends = []
    if not template.ignores_prompt or messages[i].get("tool_calls"):
        # Of the last turn, what ends the whole is left out: there generation does not go on.
        ended = without_tags(template.render(messages[:i + 1], prompt=i + 1 == len(messages), **others))
        ends = [found.end() for found in marks.find(text[:common_length(ended, text)], mark, content)]
    if not ends:
        found = marker_behind(marks, mark, text, content)
        if found and i + 1 == len(messages) and template.ignores_prompt:
            found = found if is_marker(template, marks, mark, text, messages, others, content, found) else None
        ends = [found.end()] if found else []
    if not ends:
        raise TemplateFailed(f"no special token follows message {i + 1}, an answer, so that its end could not be learned")
    return len(begin), ends[-1]


def extended(marks, mark, text, spans):
    """What counts ends with the end marker, which {% generation %} may leave out, or close after a line's end."""
    result = []
    for begin, end in spans:
        inside = list(marks.find(text[:end], mark, begin))
        if inside and not text[inside[-1].end():end].strip():
            result.append((begin, inside[-1].end()))
            continue
        found = next(marks.find(text, mark, end), None)
        result.append((begin, found.end() if found and not text[end:found.start()].strip() else end))
    return result


def rendered_parts(template, marks, messages, **others):
    """A conversation as [(items, counts)]: items are ids and texts, and counts says whether they are an answer, end
    marker included. A cut is where generation begins: what is on both sides is tokenized apart."""
    content = json.dumps([messages, others], ensure_ascii=False)
    mark = Marks.free(content)
    if mark is None or GENERATION_BEGIN in content or GENERATION_END in content:
        raise TemplateFailed("it has characters of which Unicode says that no text has them, U+FDD0 to U+FDEF")
    messages, others = marks.hide(messages, mark), marks.hide(others, mark)
    text, spans = tagged_answers(template.render(messages, **others))
    if spans:
        spans = extended(marks, mark, text, spans)
    else:
        spans = [answer_span(template, marks, mark, text, messages, i, others)
                 for i, message in enumerate(messages) if message["role"] == "assistant"]
    parts, done = [], 0
    for begin, end in spans:
        if begin < done:
            raise TemplateFailed("two of its answers overlap")
        parts += [(marks.split(text[done:begin], mark), False), (marks.split(text[begin:end], mark), True)]
        done = end
    return parts + [(marks.split(text[done:], mark), False)]
