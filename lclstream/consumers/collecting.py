"""`lclstream collect`: one HDF5 file for a run, over the files that the engine's ranks have written message by message.

Nothing is copied: each dataset of the file is a *virtual* one, its first axis the events of all parts, one after the
other by rank and number. The parts stay where they are; move them together with the file.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import h5py
import typer

app = typer.Typer(name="collect", add_completion=False)

_NUMBER = re.compile(r"(\d+)")


class CollectError(ValueError):
    """The parts do not make one file; the message says which does not fit."""


@dataclass(frozen=True)
class Part:
    """What one file holds.

    Attributes:
        path: the file.
        datasets: path in the file → (shape, dtype); the first axis is the event's.
    """

    path: Path
    datasets: dict[str, tuple[tuple[int, ...], Any]]


def read(path: Path) -> Part:
    """What a part holds.

    Raises:
        CollectError: it is no HDF5 file, or a dataset in it has no axis.
    """
    found: dict[str, tuple[tuple[int, ...], Any]] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.ndim == 0:
                raise CollectError(f"{path}: {name} has no axis of events: use a BatchProcessingPipeline")
            found[name] = (item.shape, item.dtype)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(note)
    except OSError as error:
        raise CollectError(f"{path}: not a complete HDF5 file: {error}") from error
    return Part(path, found)


def collect(folder: Path, output: Path, prefix: str = "") -> dict[str, Any]:
    """Write the file, and say what is in it: ``{"file", "events", "files", "bytes"}``.

    Args:
        folder: where the parts are.
        output: the file to write; it is there completely or not at all.
        prefix: what the parts' names begin with.

    Raises:
        CollectError: there are no parts, or one differs from the others.
        OSError: the file cannot be written.
    """
    paths = sorted(folder.glob("*.h5"), key=lambda path: [int(word) if word.isdigit() else word
                                                          for word in _NUMBER.split(path.name)])  # fmt: skip
    parts = [read(path) for path in paths if path.name.startswith(prefix) and path.resolve() != output.resolve()]
    if not parts:
        raise CollectError(f"{folder}: no file {prefix}*.h5 is there: has the engine written any?")
    for part in parts[1:]:
        for name in parts[0].datasets.keys() | part.datasets.keys():
            ours, others = part.datasets.get(name), parts[0].datasets.get(name)
            if ours is None or others is None or (ours[0][1:], ours[1]) != (others[0][1:], others[1]):
                raise CollectError(f"{part.path}: {name} is {ours}, in {parts[0].path.name} it is {others}")
    partial = output.with_name(f".{output.name}.part")
    with h5py.File(partial, "w", libver="latest") as file:
        for name, (shape, dtype) in parts[0].datasets.items():
            total = sum(part.datasets[name][0][0] for part in parts)
            layout, start = h5py.VirtualLayout((total, *shape[1:]), dtype), 0
            for part in parts:
                theirs = part.datasets[name][0]
                # By relative names, so that the folder can be moved.
                source = os.path.relpath(part.path, output.parent)
                layout[start : start + theirs[0]] = h5py.VirtualSource(source, name, theirs, dtype)
                start += theirs[0]
            file.create_virtual_dataset(name, layout)
    partial.replace(output)
    events = max((sum(part.datasets[name][0][0] for part in parts) for name in parts[0].datasets), default=0)
    size = sum(part.path.stat().st_size for part in parts)
    return {"file": str(output.resolve()), "events": events, "files": len(parts), "bytes": size}


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(help="Folder with the files that the engine wrote.", file_okay=False)],
    output: Annotated[Path, typer.Option(help="The file to write.", dir_okay=False)],
    prefix: Annotated[str, typer.Option(help="What the parts' names begin with.")] = "",
    result: Annotated[Path | None, typer.Option(help="Write the figures into this file, as JSON.")] = None,
) -> None:
    """Make one HDF5 file of a run, over the files that the engine's ranks have written. Nothing is copied.

    Example: lclstream collect reduced/ --prefix mfx100-r0007_ --output reduced/mfx100-r0007.h5 --result result.json

    Exit codes: 0 written, 1 a part does not fit or the file cannot be written.
    """
    try:
        facts = collect(folder, output, prefix)
        if result is not None:
            result.write_text(json.dumps(facts))
    except (CollectError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    typer.echo(f"{facts['events']} events of {facts['files']} files: {output}")
