"""Headers of tar members, thirty times faster than `tarfile` makes them."""

from __future__ import annotations

import tarfile

BLOCK = 512  # bytes: members start and end at multiples of this
_NAME, _SIZE, _SUM = slice(0, 100), slice(124, 136), slice(148, 156)
_EMPTY = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT)  # mode 0644, uid, gid and mtime 0, no owner names
_BLANK = _EMPTY[: _SUM.start] + b" " * 8 + _EMPTY[_SUM.stop :]  # the checksum is taken with spaces in its place
_BLANK_SUM = sum(_BLANK) - sum(_BLANK[_SIZE])


def member_header(name: str, size_bytes: int) -> bytes:
    """The ustar header of a file: the very bytes that `tarfile` writes for it.

    `TarInfo.tobuf` takes 40 us (one core, 2026-11-21), as long as reading a small picture; this takes 1.2 us, because
    only name, size and checksum differ from member to member.

    Args:
        name: ASCII, at most 100 characters.
        size_bytes: of the file, below 8 GiB.
    """
    encoded, size = name.encode("ascii"), b"%011o\0" % size_bytes
    assert len(encoded) <= 100
    assert len(size) == 12
    checksum = b"%06o\0 " % (_BLANK_SUM + sum(encoded) + sum(size))
    return b"".join((encoded.ljust(100, b"\0"), _BLANK[100:124], size, _BLANK[136:148], checksum, _BLANK[156:]))
