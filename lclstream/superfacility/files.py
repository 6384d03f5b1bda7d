"""A user's files: one folder each, and nothing outside of it, by the absolute paths the job scripts see, too."""

from __future__ import annotations

import errno
import grp
import hashlib
import os
import pwd
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from lclstream.jobs import confined

_NO_SUCH = "No such file or directory"


class FileRefusedError(OSError):
    """A path cannot be used; the message is in the words of the machine's own tools, which the client looks for."""


class UserFiles:
    """The files of one user.

    Args:
        root: the folder that holds one folder a user.
        name: the user.
    """

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self.home = root / name
        self.home.mkdir(exist_ok=True, mode=0o700)

    def _inside(self, path: str) -> str:
        """A path relative to the user's folder; empty for the folder itself.

        Raises:
            FileRefusedError: it lies outside.
        """
        pure = PurePosixPath("/" + path.lstrip("/"))
        if ".." in pure.parts or "\0" in path or not pure.is_relative_to(self.home):
            raise FileRefusedError(errno.EACCES, f"{path!r}: Permission denied: your files are in {self.home}")
        relative = str(pure.relative_to(self.home))
        return "" if relative == "." else relative

    def folder(self, path: str) -> Path:
        """An existing folder of the user's.

        Raises:
            ValueError: it is none.
        """
        try:
            confined.listing(self.home, self._inside(path) or None)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror or error}") from error
        return Path("/" + path.lstrip("/"))

    def read(self, path: str, most: int) -> bytes:
        """A file's bytes.

        Raises:
            FileRefusedError: it is not there, no file, too large, or outside.
        """
        with _worded(path), confined.open_to_read(self.home, self._inside(path) or ".") as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                raise FileRefusedError(errno.EFBIG, f"{path}: File too large: {size} bytes, and {most} can be fetched")
            return file.read(most)

    def write(self, path: str, source: BinaryIO) -> None:
        """Put a file; its folder must be there.

        Raises:
            FileRefusedError: the folder is not there, or outside.
        """
        with _worded(path):
            name = self._inside(path)
            parent = str(PurePosixPath(name).parent)
            confined.listing(self.home, None if parent == "." else parent)
            with confined.replacing(self.home, name) as target:
                shutil.copyfileobj(source, target, 1 << 20)

    def keep(self, folder: str, text: str) -> Path:
        """Keep a text under the name of its hash; returns where."""
        name = f"{folder}/{hashlib.sha256(text.encode()).hexdigest()[:32]}"
        (self.home / folder).mkdir(exist_ok=True, mode=0o700)
        with confined.replacing(self.home, name) as target:
            target.write(text.encode())
        return self.home / name

    def listing(self, path: str) -> list[dict[str, Any]]:
        """What `ls -la` shows: a folder's entries with ``.`` and ``..``, or one line with the whole path of a file.

        Raises:
            FileRefusedError: it is not there, or outside.
        """
        with _worded(path):
            name = self._inside(path)
            place = self.home / name
            try:
                entries = confined.listing(self.home, name or None)
            except NotADirectoryError:
                with confined.open_to_read(self.home, name) as file:
                    return [_line(str(place), os.fstat(file.fileno()))]
            lines = [_line(".", place.lstat()), _line("..", place.lstat())]
            for entry in entries:
                try:
                    lines.append(_line(entry, (place / entry).lstat()))
                except FileNotFoundError:
                    continue  # gone since the folder was read
            return lines


@contextmanager
def _worded(path: str) -> Iterator[None]:
    """Make errors of the file system into those a user sees."""
    try:
        yield
    except FileRefusedError:
        raise
    except OSError as error:
        words = _NO_SUCH if error.errno in (errno.ENOENT, errno.ENOTDIR) else error.strerror or str(error)
        raise FileRefusedError(error.errno or errno.EIO, f"cannot access {path!r}: {words}") from error


def _line(name: str, status: os.stat_result) -> dict[str, Any]:
    return {
        "perms": stat.filemode(status.st_mode),
        "hardlinks": status.st_nlink,
        "user": _named(pwd.getpwuid, status.st_uid),
        "group": _named(grp.getgrgid, status.st_gid),
        "size": float(status.st_size),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(status.st_mtime)),
        "name": name,
    }


def _named(look_up: Callable[[int], Any], number: int) -> str:
    try:
        return str(look_up(number)[0])
    except KeyError:
        return str(number)
