"""Checksums of the framework's own files of a checkpoint, at a cost that a save does not notice.

torch writes a checkpoint as a zip archive with a CRC-32 of every record, and never looks at it again. So a save hashes
only what lies around the records, the archive's directory with those CRCs included; loading holds the records against
them. Together that is every byte of the file. A file that is no such archive is hashed whole.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

from ds_shampoo.state.index import ForeignFile

_CHUNK = 1 << 22


def digest(folder: Path, name: str) -> ForeignFile:
    """What the index records of a file.

    Args:
        folder: the checkpoint's.
        name: the file's path in it.

    Raises:
        OSError: if it can't be read.
    """
    with (folder / name).open("rb") as file:
        size = file.seek(0, 2)
        try:
            return ForeignFile(name=name, size=size, method="zip", sha256=_around(file, size, _records(file)))
        except (zipfile.BadZipFile, ValueError):
            return ForeignFile(name=name, size=size, method="whole", sha256=_around(file, size, []))


def differs(folder: Path, recorded: ForeignFile) -> str:
    """How a file differs from what was recorded of it, as the end of a sentence; empty if it does not."""
    try:
        with (folder / recorded.name).open("rb") as file:
            if file.seek(0, 2) != recorded.size:
                return "has not the size that it was written with"
            records = _records(file) if recorded.method == "zip" else []
            if _around(file, recorded.size, records) != recorded.sha256:
                return "is not the file that was written"
            for begin, end, crc in records:
                if _crc(file, begin, end) != crc:
                    return f"is damaged between bytes {begin} and {end}"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read ({error.strerror or error})"
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        return f"is damaged ({error})"
    return ""


def _records(file: BinaryIO) -> list[tuple[int, int, int]]:
    """Begin, end and CRC-32 of every record of an archive, in the file's order.

    Raises:
        BadZipFile, ValueError: if it is none, or one that compresses.
    """
    with zipfile.ZipFile(file) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    found: list[tuple[int, int, int]] = []
    reached = 0
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED:
            raise ValueError("its records are compressed")
        file.seek(info.header_offset)
        header = file.read(30)
        begin = info.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        end = begin + info.compress_size
        if len(header) != 30 or info.header_offset < reached:
            raise ValueError("its directory is not in order")
        found.append((begin, end, info.CRC))
        reached = end
    return found


def _around(file: BinaryIO, size: int, records: list[tuple[int, int, int]]) -> str:
    """The SHA-256 of all that lies outside the records."""
    found, at = hashlib.sha256(), 0
    for begin, end in [*((begin, end) for begin, end, _ in records), (size, size)]:
        file.seek(at)
        while at < begin:
            chunk = file.read(min(_CHUNK, begin - at))
            if not chunk:
                raise ValueError("it is cut off")
            found.update(chunk)
            at += len(chunk)
        at = end
    return found.hexdigest()


def _crc(file: BinaryIO, begin: int, end: int) -> int:
    file.seek(begin)
    crc = 0
    while begin < end and (chunk := file.read(min(_CHUNK, end - begin))):
        crc = zlib.crc32(chunk, crc)
        begin += len(chunk)
    return crc if begin == end else -1
