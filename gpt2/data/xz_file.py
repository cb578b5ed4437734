"""An .xz file of a stranger, decompressed in bounded memory."""

import io
import lzma
from typing import Any, BinaryIO

XZ_BYTES = 2**27  # of memory for the dictionary of an .xz file; `xz -9` uses half


class XzReader(io.RawIOBase):
    """An .xz file as `lzma.LZMAFile` reads it, with a limit of the memory that it asks for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._stream = lzma.LZMADecompressor(memlimit=XZ_BYTES)
        self._begun = False  # whether a stream came before

    def readable(self) -> bool:
        """True: `BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills a buffer with decompressed bytes; 0 at the end."""
        while True:
            if self._stream.eof:
                data = self._stream.unused_data.lstrip(b"\0")  # zeros pad a stream
                data = data or self._file.read(io.DEFAULT_BUFFER_SIZE).lstrip(b"\0")
                if not data:
                    return 0
                self._stream, self._begun = lzma.LZMADecompressor(memlimit=XZ_BYTES), True
            else:
                wants = self._stream.needs_input
                data = self._file.read(io.DEFAULT_BUFFER_SIZE) if wants else b""
                if wants and not data:
                    raise EOFError("compressed file ended before the end of its stream")
            try:
                made = self._stream.decompress(data, len(buffer))
            except lzma.LZMAError:
                if self._begun and not self._stream.eof:
                    return 0  # padding or other bytes behind the last stream
                raise
            if made:
                buffer[: len(made)] = made
                return len(made)
