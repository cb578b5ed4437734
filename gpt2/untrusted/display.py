"""Text from outside the project on a terminal, which obeys escape codes."""

import re

MAX_SHOWN = 500  # characters of a name or value in a message
# Control characters (C0, DEL, C1), line and paragraph separators, and marks of writing direction,
# which reorder the rest of a line. Lone surrogates have no UTF-8.
CONTROL = re.compile("[\0-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: object, limit: int = MAX_SHOWN, keep: str = "") -> str:
    """Text from outside for a terminal: control characters as `\\x1b`, long text cut in the middle.

    Args:
        text: any value; its `str` is shown.
        limit: most characters; 0: no limit.
        keep: control characters that stay, such as line breaks of a generated text.
    """
    plain = str(text)
    if 0 < limit < len(plain):
        end = limit // 4
        plain = f"{plain[: limit - end]} … {plain[-end:]}"
    return CONTROL.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), plain)


def _escaped(character: str) -> str:
    code = ord(character)
    if character in "\n\r\t":
        return repr(character)[1:-1]
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
