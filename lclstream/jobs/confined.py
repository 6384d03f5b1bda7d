"""Files inside one folder, and nowhere else, opened so that a symbolic link put there meanwhile cannot lead out.

Every name is walked part by part from the folder's own descriptor with ``O_NOFOLLOW``. Comparing resolved paths
instead would leave a moment between the check and the opening in which a job can exchange a folder for a link.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lclstream.jobs.models import FileStat

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class OutsideFolderError(PermissionError):
    """A name that leads, or could lead, out of the folder: absolute, with ``..``, through or to a symbolic link."""


def parts_of(name: str) -> list[str]:
    """The parts of a relative name.

    Raises:
        OutsideFolderError: it is absolute, empty, has ``..`` or a NUL character.
    """
    if "\0" in name or name.startswith("/") or "\\" in name:
        raise OutsideFolderError(f"{name!r}: not a relative file name")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or ".." in parts:
        raise OutsideFolderError(f"{name!r}: leads out of the job's folder")
    return parts


@contextmanager
def _folder(root: Path, parts: list[str], *, make: bool = False) -> Iterator[int]:
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts:
            if make:
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=descriptor)
            try:
                inner = os.open(part, _FOLDER, dir_fd=descriptor)
            except OSError as error:
                raise _explained(error, "/".join(parts), descriptor, part) from error
            os.close(descriptor)
            descriptor = inner
        yield descriptor
    finally:
        os.close(descriptor)


def _explained(error: OSError, name: str, folder: int, part: str) -> OSError:
    try:
        link = stat.S_ISLNK(os.stat(part, dir_fd=folder, follow_symlinks=False).st_mode)
    except (OSError, ValueError):
        link = False
    if link or error.errno == errno.ELOOP:
        return OutsideFolderError(f"{name!r}: symbolic links are not followed")
    return error


def open_to_read(root: Path, name: str) -> BinaryIO:
    """Open a regular file below `root`.

    Raises:
        OutsideFolderError: see :class:`OutsideFolderError`.
        FileNotFoundError, IsADirectoryError: it is not there, or is a folder.
        OSError: it is a device, a pipe or a socket.
    """
    parts = parts_of(name)
    with _folder(root, parts[:-1]) as folder:
        try:
            # O_NONBLOCK: opening a pipe somebody put there must not wait for its writer.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(parts[-1], flags, dir_fd=folder)
        except OSError as error:
            raise _explained(error, name, folder, parts[-1]) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder", name)
        raise OSError(errno.EINVAL, "is not a regular file", name)
    return os.fdopen(descriptor, "rb")


@contextmanager
def replacing(root: Path, name: str) -> Iterator[BinaryIO]:
    """A new file below `root`; it takes its name when the block ends well, so nobody ever reads half of it.

    Missing folders are made.

    Raises:
        OutsideFolderError: see :class:`OutsideFolderError`.
        OSError: a part of the name is a file, or there is no space.
    """
    parts = parts_of(name)
    with _folder(root, parts[:-1], make=True) as folder:
        temporary = f".upload-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o666, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                yield file
            os.rename(temporary, parts[-1], src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.unlink(temporary, dir_fd=folder)
            raise


def listing(root: Path, name: str | None = None, *, depth: int = 0) -> dict[str, FileStat]:
    """What lies in `root`, or in a folder below it. Symbolic links are left out.

    Args:
        root: the folder nothing outside of which is looked at.
        name: a folder below it.
        depth: how many levels of folders to show inside; 0 says only that they are folders.

    Raises:
        OutsideFolderError: see :class:`OutsideFolderError`.
        FileNotFoundError, NotADirectoryError: there is no such folder.
    """
    with _folder(root, parts_of(name) if name else []) as folder:
        return _listing(folder, depth)


def _listing(folder: int, depth: int) -> dict[str, FileStat]:
    found: dict[str, FileStat] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                status = entry.stat(follow_symlinks=False)
                children: bool | dict[str, FileStat] = stat.S_ISDIR(status.st_mode)
                if children and depth > 0:
                    inner = os.open(entry.name, _FOLDER, dir_fd=folder)
                    try:
                        children = _listing(inner, depth - 1)
                    finally:
                        os.close(inner)
            except OSError:
                continue  # gone since the folder was read
            if stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode):
                shown = entry.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
                found[shown] = FileStat(
                    size=status.st_size, atime=int(status.st_atime), mtime=int(status.st_mtime), children=children
                )
    return dict(sorted(found.items()))
