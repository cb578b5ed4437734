"""Encodings of text: UTF-16 and UTF-32 become UTF-8, and what is probably no text is named."""

import codecs
import io
from typing import Any, BinaryIO

BOMS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
GARBLED = 0.1  # share of a text's characters


def in_utf8(data: Any) -> BinaryIO:
    """A file as UTF-8: recoded where its byte order mark says UTF-16 or UTF-32.

    Args:
        data: a binary file that can `peek`.
    """
    begin = data.peek(4)[:4]
    for mark, encoding in BOMS:
        if begin.startswith(mark):
            data.read(len(mark))
            return io.BufferedReader(_Recoded(data, encoding))
    return data


class _Recoded(io.RawIOBase):
    """A file in UTF-16 or UTF-32 as UTF-8. What is damaged stays invalid UTF-8, for `_decode`."""

    def __init__(self, file: BinaryIO, encoding: str) -> None:
        self._file, self._left = file, b""
        self._decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
        self._ended = False

    def readable(self) -> bool:
        """True: `BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer with UTF-8; 0 at the end."""
        while not self._left and not self._ended:
            chunk = self._file.read(io.DEFAULT_BUFFER_SIZE)
            self._ended = not chunk
            try:
                text = self._decoder.decode(chunk, final=self._ended)
            except UnicodeDecodeError:  # half a character at the end, or no character at all
                self._decoder.reset()
                text = "\ud800"  # which UTF-8 cannot hold
            self._left = text.encode("utf-8", "surrogatepass")
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def garbled(text: str) -> str:
    """Why a text is probably no text; empty: it may be one."""
    for sign, name in (("\ufffd", "no UTF-8"), ("\0", "the null character")):
        if text.count(sign) > GARBLED * len(text):
            share = text.count(sign) / len(text)
            return (
                f"{share:.0%} of it is {name}; is it in another encoding, or no text? "
                "(iconv -f ENCODING -t UTF-8 converts it)"
            )
    return ""
