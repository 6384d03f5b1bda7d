"""Nothing outside a job's folder can be read or written by name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest

from lclstream.jobs.confined import OutsideFolderError, listing, open_to_read, replacing


@pytest.fixture
def work(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("hush")
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    (work / "sub" / "file").write_text("text")
    (work / "link").symlink_to("../secret")
    (work / "way").symlink_to("..")
    (work / "inner").symlink_to("sub")
    os.mkfifo(work / "pipe")
    return work


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "sub/../../secret",
        "/etc/passwd",
        "..",
        "",
        ".",
        "link",
        "way/secret",
        "inner/file",
        "a\0b",
        "..\\x",
    ],
)
def test_names_that_lead_out_are_refused(work: Path, name: str) -> None:
    with pytest.raises(OutsideFolderError):
        open_to_read(work, name)
    if name != "link":
        with pytest.raises(OutsideFolderError), replacing(work, name) as file:
            file.write(b"evil")
    assert (work.parent / "secret").read_text() == "hush"


def test_writing_over_a_link_replaces_the_link_and_not_its_target(work: Path) -> None:
    with replacing(work, "link") as file:
        file.write(b"mine")
    assert (work.parent / "secret").read_text() == "hush"
    assert (work / "link").read_text() == "mine"
    assert not (work / "link").is_symlink()


def test_a_file_inside_is_read(work: Path) -> None:
    with open_to_read(work, "sub/file") as file:
        assert file.read() == b"text"
    with open_to_read(work, "./sub//file") as file:
        assert file.read() == b"text"


def test_a_pipe_is_refused_without_waiting_for_its_writer(work: Path) -> None:
    with pytest.raises(OSError, match="not a regular file"):
        open_to_read(work, "pipe")


def test_folders_in_a_new_files_name_are_made(work: Path) -> None:
    with replacing(work, "a/b/c") as file:
        file.write(b"1")
    assert (work / "a" / "b" / "c").read_bytes() == b"1"


def test_an_interrupted_file_leaves_nothing(work: Path) -> None:
    before = sorted(os.listdir(work))
    broken = replacing(work, "new")
    broken.__enter__().write(b"half")
    assert not broken.__exit__(RuntimeError, RuntimeError("interrupted"), None)
    assert sorted(os.listdir(work)) == before


def test_a_listing_shows_files_and_folders_and_no_links(work: Path) -> None:
    found = listing(work)
    assert set(found) == {"sub"}
    assert found["sub"].children is True
    assert listing(work, "sub")["file"].size == 4
    deep = listing(work, depth=1)["sub"].children
    assert isinstance(deep, dict)
    assert deep["file"].size == 4
    with pytest.raises(OutsideFolderError):
        listing(work, "way")


def test_no_descriptor_is_left_open(work: Path) -> None:
    def inside() -> list[str]:
        # Of other parts of the tests' process, descriptors come and go.
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/self/fd/{name}"))
        return [path for path in found if path.startswith(str(work))]

    for name in ("link", "sub", "nowhere/x", "pipe"):
        with pytest.raises(OSError):
            open_to_read(work, name)
    listing(work, depth=3)
    assert inside() == []
