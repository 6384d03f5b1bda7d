"""Messages as files: in a tar archive on a pipe, or in a folder."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from lclstream.client.errors import AddressError


class Writer(Protocol):
    """Takes messages, numbered from 0."""

    def write(self, number: int, message: bytes) -> None:
        """Store one message."""

    def close(self) -> None:
        """Make what was stored readable."""


def checked_names(names: str) -> str:
    """A naming scheme such as ``%05d.h5``, checked.

    Raises:
        AddressError: it has not exactly one number in it, or leaves the folder.
    """
    try:
        first, second = names % 0, names % 1
    except (TypeError, ValueError) as error:
        raise AddressError(f"--names {names!r}: give exactly one number format such as %05d ({error})") from error
    path = PurePosixPath(first)
    if first == second or path.is_absolute() or ".." in path.parts:
        raise AddressError(f"--names {names!r}: a relative name with one number format, such as run7-%05d.h5")
    return names


class TarWriter:
    """A tar archive written as it grows, without seeking: for a pipe.

    Args:
        file: binary stream.
        names: scheme of the members' names.
    """

    def __init__(self, file: BinaryIO, names: str) -> None:
        self._names = checked_names(names)
        self._file = file
        self._tar = tarfile.open(fileobj=file, mode="w|")  # noqa: SIM115 - closed in close()

    def write(self, number: int, message: bytes) -> None:
        """Append one member."""
        member = tarfile.TarInfo(self._names % number)
        member.size, member.mtime, member.mode = len(message), int(time.time()), 0o644
        self._tar.addfile(member, io.BytesIO(message))
        # A reader at the other end of the pipe gets this message now, not when the next one comes.
        self._file.flush()

    def close(self) -> None:
        """Write the end of the archive."""
        self._tar.close()
        self._file.flush()


class FolderWriter:
    """One file a message; each appears under its name when it is complete.

    Args:
        folder: made when missing.
        names: scheme of the file names.
    """

    def __init__(self, folder: Path, names: str) -> None:
        self._names = checked_names(names)
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, number: int, message: bytes) -> None:
        """Write one file."""
        path = self._folder / (self._names % number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, message)

    def close(self) -> None:
        """Nothing is open."""


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that no reader ever sees a part of it."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
