"""chat.json: a chat template as the pieces of text and ids between the contents of messages, which `train_iha generate
--chat` puts together without Jinja.

The pieces are taken from how the template renders a few conversations, and checked on others, token by token: a template
that they do not express is refused with the reason.

    before_system content after_system          (or before_user alone)
    content after_user                          the user's first turn; the model goes on from here
    answer answer_end                           generation stops at its last id
    after_answer content after_user             the user's next turn
"""

from chat_template import TemplateFailed, rendered_parts

FIRST, SECOND, ANSWER, SYSTEM = "Firstquestion", "Secondquestion", "Theanswer", "Thesystem"
CONTENTS = ["a", "Hello there!", "two\n\nlines", "1 + 1 = 2 <b>&amp;</b> {{ x }}", "naïve café, 你好, 🙂", "say <|im_end|> or </s>",
            "tab\tand  spaces", "[INST] no [/INST]", "'quoted' \"twice\""]
SPACED = ["  spaces around ", "\n\nlines around\n", "\t tab", "a trailing space "]


class NoPieces(Exception):
    """The message says what stands against it."""


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def flat(parts):
    return join([item for items, _ in parts for item in items])


def join(items):
    """Texts side by side become one."""
    joined = []
    for item in items:
        if isinstance(item, str) and joined and isinstance(joined[-1], str):
            joined[-1] += item
        elif item != "":
            joined.append(item)
    return joined


def cut(items, content):
    """(before, after) of a content that must be there once, within one text."""
    places = [i for i, item in enumerate(items) if isinstance(item, str) and content in item]
    if len(places) != 1 or items[places[0]].count(content) != 1:
        raise NoPieces("it does not render the content of a message once, as it is")
    before, after = items[places[0]].split(content)
    return join(items[:places[0]] + [before]), join([after] + items[places[0] + 1:])


class Renderer:
    """A template that ends where an answer begins, as items."""

    def __init__(self, template, marks):
        self.template, self.marks = template, marks

    def prompt(self, messages):
        try:
            return self.marks.split(self.template.render(messages, prompt=True), "\ufdd0")
        except TemplateFailed as error:
            raise NoPieces(f"it fails to render a plain conversation: {error}") from None

    def parts(self, messages):
        try:
            return rendered_parts(self.template, self.marks, messages)
        except TemplateFailed as error:
            raise NoPieces(f"it fails to render a plain conversation: {error}") from None


def strips(render, messages, content):
    """Which white space around a content the template strips: False, True, "left" or "right". messages: of a content."""
    before, after = cut(render.prompt(messages(content)), content)

    left, right = " \n", "\n "
    found = cut(render.prompt(messages(left + content + right)), content)
    for how, front, back in ((False, left, right), (True, "", ""), ("left", "", right), ("right", left, "")):
        if found == (join(before + [front]), join([back] + after)):
            return how
    raise NoPieces("it changes the white space around the content of a message")


def stripped(content, how):
    """The content without the white space that is taken: see strips()."""
    content = content.lstrip() if how in (True, "left") else content
    return content.rstrip() if how in (True, "right") else content


def with_system(render, pieces):
    """The pieces that a system message at the start adds to these."""
    before, rest = cut(render.prompt([system(SYSTEM), user(FIRST)]), SYSTEM)
    between, after = cut(rest, FIRST)
    if after != pieces["after_user"]:
        raise NoPieces("what follows the first question differs once there is a system message")
    return {"before_system": before, "after_system": between,
            "strip_system": strips(render, lambda text: [system(text), user(FIRST)], SYSTEM),
            "strip_after_system": strips(render, lambda text: [system(SYSTEM), user(text)], FIRST)}


def find_pieces(render):
    """The members of chat.json that the template decides, without those of a system message."""
    before_user, after_user = cut(render.prompt([user(FIRST)]), FIRST)
    parts = render.parts([user(FIRST), assistant(ANSWER), user(SECOND), assistant(ANSWER)])
    if len(parts) != 5 or [counts for _, counts in parts] != [False, True, False, True, False]:
        raise NoPieces("its answers do not stand apart")
    if parts[1] != parts[3]:
        raise NoPieces("it renders an answer differently once others follow")
    begin, end = cut(parts[1][0], ANSWER)
    if not end or isinstance(end[-1], str):
        raise NoPieces("no special token ends its answers, so that generation would not know where to stop")
    if begin and not (len(begin) == 1 and isinstance(begin[0], str) and begin[0].isspace()):
        raise NoPieces("it puts more than spaces between where generation begins and the answer")
    after_answer, again = cut(parts[2][0], SECOND)
    if again != after_user:
        raise NoPieces("what follows the first question differs from what follows the next one")
    begun = [user(FIRST), assistant(ANSWER)]
    return {"before_system": None, "after_system": None, "before_user": before_user, "after_user": after_user,
            "answer_begin": begin, "answer_end": end, "after_answer": after_answer, "strip_system": False,
            "strip_after_system": False, "strip_first": strips(render, lambda text: [user(text)], FIRST),
            "strip_user": strips(render, lambda text: [*begun, user(text)], SECOND)}


def compose(pieces, messages, dropped=""):
    """A conversation put together from its pieces, as data/chat.c does it: [(items, counts)]."""
    clean = lambda text: text.translate({ord(character): None for character in dropped})
    parts, pending = [], None
    for message in messages:
        content = clean(message["content"])
        if message["role"] == "system":
            pending = pieces["before_system"] + [stripped(content, pieces["strip_system"])] + pieces["after_system"]
        elif message["role"] == "user":
            before = pending if pending is not None else pieces["before_user"] if not parts else pieces["after_answer"]
            which = "strip_after_system" if pending is not None else "strip_user" if parts else "strip_first"
            content = stripped(content, pieces[which])
            parts.append((join(before + [content] + pieces["after_user"]), False))
            pending = None
        else:
            parts.append((join(pieces["answer_begin"] + [content] + pieces["answer_end"]), True))
    return parts


def samples(pieces):
    """Conversations of one to three rounds, with and without a system message; answers have no spaces around them."""
    for i, content in enumerate(CONTENTS):
        other = CONTENTS[(i + 3) % len(CONTENTS)]
        yield [user(content), assistant(other)]
        yield [user(content), assistant(other), user(other), assistant(content), user(content), assistant(other)]
        if pieces["before_system"] is not None:
            yield [system(other), user(content), assistant(other), user(other), assistant(content)]
    for content in SPACED:
        yield [user(content), assistant("a"), user(content), assistant("b")]
        if pieces["before_system"] is not None:
            yield [system(content), user(content), assistant("a")]


def check(render, pieces, dropped, encode_parts):
    """encode_parts makes ids of [(items, counts)]."""
    if any("\0" in item for piece in pieces.values() if isinstance(piece, list) for item in piece if isinstance(item, str)):
        raise NoPieces("it writes a character 0")
    for messages in samples(pieces):
        wanted = render.parts(messages)
        made = compose(pieces, messages, dropped)
        # what follows the last answer belongs to no turn yet
        if encode_parts(wanted[:-1]) != encode_parts(made):
            raise NoPieces("it renders a message differently depending on the other messages or on its text, for example "
                           f"{messages[0]['content']!r}")


def chat_pieces(template, marks, dropped, encode_parts):
    """(the pieces, checked, why there are none for a system message or "")."""
    render = Renderer(template, marks)
    pieces = find_pieces(render)
    check(render, pieces, dropped, encode_parts)
    try:
        whole = pieces | with_system(render, pieces)
        check(render, whole, dropped, encode_parts)
        return whole, ""
    except NoPieces as error:
        return pieces, str(error)
