"""Long texts cut into pieces that encode to the tokens of the whole text.

A tokenizer cuts a text into words (the pattern of `tokenizer.py`) and merges bytes within each
word. Memory and time grow with the longest word: one of a million characters takes up to 150 MB. A
piece ends where the pattern ends a word in any case, so no token changes.
"""

import re
from itertools import pairwise

from ..errors import UserError

PIECE = 200_000  # characters; shorter texts are never cut
LONGEST_SPACE = 2_000_000  # characters of white space in a row
LONG_SPACE_CHARACTERS = 100_000
# The characters that the pattern calls white space (\\s).
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# tiktoken backtracks through a long run of white space one character at a time, and fails at a
# million. The look behind keeps the search from trying each character of a shorter run.
LONG_SPACE = re.compile(f"(?<![{SPACE}])[{SPACE}]{{{LONG_SPACE_CHARACTERS},}}")
ALL_SPACE = re.compile(f"[{SPACE}]+")
SIGNS = "!-/:-@[-`{-~"  # of ASCII
# Places where a word surely ends: in front of white space; between a letter or digit of ASCII and
# a sign or each other; between a Chinese, Japanese or Korean letter and a sign. Not behind a sign:
# the pattern joins an apostrophe with letters behind it.
WORD_END = re.compile(
    rf"(?<=[^{SPACE}])(?=[{SPACE}])"
    rf"|(?<=[A-Za-z])(?=[0-9{SIGNS}])|(?<=[0-9])(?=[A-Za-z{SIGNS}])"
    rf"|(?<=[\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3])"
    rf"(?=[{SIGNS}0-9\u3001-\u3003\u3008-\u3011\uff01-\uff0f\uff1a-\uff1f])"
)


class LongWord(UserError):
    """A text has a word of over `PIECE` characters."""


def pieces(text: str) -> list[str]:
    """Cuts a text into pieces of about `PIECE` characters.

    Raises:
        LongWord: no word ends within `PIECE` characters.
    """
    if len(text) <= PIECE:
        return _cut_long_space(text)
    parts = []
    for part in _cut_long_space(text):
        begin = 0
        while len(part) - begin > PIECE:
            end = _end_of_word(part, begin)
            parts.append(part[begin:end])
            begin = end
        parts.append(part[begin:])
    return parts


def has_long_word(text: str) -> bool:
    """Whether `pieces` raises LongWord for a text."""
    try:
        pieces(text) if len(text) > PIECE else ()
    except LongWord:
        return True
    return False


def beginning(text: str, characters: int) -> str:
    """At least this many characters of a text, cut where a word ends, if one ends soon.

    Tokens up to the cut are those of the whole text.
    """
    if len(text) <= characters + PIECE:
        return text
    found = WORD_END.search(text, characters, characters + PIECE)
    return text[: found.start() if found else characters + PIECE]


def _end_of_word(text: str, begin: int) -> int:
    """Where a word ends, up to `PIECE` characters behind `begin`."""
    middle, end = begin + PIECE // 2, begin + PIECE
    if found := WORD_END.search(text, middle, end):
        return found.start()
    ends = [found.start() for found in WORD_END.finditer(text, begin + 1, middle)]
    if ends:
        return ends[-1]
    if len(text) - begin <= LONGEST_SPACE and ALL_SPACE.fullmatch(text, begin):
        return len(text)
    raise LongWord(
        f"a word of over {PIECE:,} characters, without white space, sign or digit; leave it out, "
        "or insert line breaks"
    )


def _cut_long_space(text: str) -> list[str]:
    """Cuts a text before the last character of each long run of white space.

    No token changes, because the pattern cuts there as well: within a text by `\\s+(?!\\S)`, and at
    the end of a piece by `\\s++$`, which does not backtrack. A run at the end of the text stays
    whole.
    """
    if len(text) < LONG_SPACE_CHARACTERS:
        return [text]
    ends = [match.end() for match in LONG_SPACE.finditer(text)]
    cuts = [0, *(end - 1 for end in ends if end < len(text)), len(text)]
    return [text[begin:end] for begin, end in pairwise(cuts)]
