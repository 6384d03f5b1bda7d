"""`lclstream collect`: one HDF5 file for a run, over the files that the engine's ranks have written message by message.

No data are copied: each dataset of the file is a *virtual* one, its first axis the events of all parts, one after the
other by rank and number. The parts stay where they are; move them together with the file.

Only what stands beside a dataset is written anew, for a part's is not the run's: ``<path>_offsets`` count the elements
of all parts before, and ``<path>_missing`` covers the parts that have none because nothing was missing there, and those
that have no ``<path>`` because everything was.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import numpy.typing as npt
import typer

from lclstream.client.batch import Batch
from lclstream.client.errors import MessageError

app = typer.Typer(name="collect", add_completion=False)

_NUMBER = re.compile(r"(\d+)")
_OFFSETS, _MISSING = "_offsets", "_missing"


class CollectError(ValueError):
    """The parts do not make one file; the message says which does not fit."""


@dataclass(frozen=True)
class Part:
    """What one file holds.

    Attributes:
        path: the file.
        events: how many.
        datasets: path in the file → (shape, dtype) of the data; the first axis is the event's, or in ragged data that
            of all events' elements.
        offsets: path of ragged data → where each event's elements begin, and where the last one's end.
        missing: path of data → for each event whether the value is missing; only where the file says so.
        attributes: path of data → attributes; ``""`` has those of the file.
    """

    path: Path
    events: int
    datasets: dict[str, tuple[tuple[int, ...], Any]]
    offsets: dict[str, npt.NDArray[np.uint64]]
    missing: dict[str, npt.NDArray[np.uint8]]
    attributes: dict[str, dict[str, Any]]

    @property
    def silent(self) -> set[str]:
        """Data sources that gave nothing for the whole file, and have no dataset in it."""
        return {str(name) for name in self.attributes[""].get("missing", ())}


def read(path: Path) -> Part:
    """What a part holds.

    Raises:
        CollectError: it is no HDF5 file, a dataset in it has no axis, or they differ in their numbers of events.
    """
    found: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            if item.ndim == 0:
                raise CollectError(f"{path}: {name} has no axis of events: use a BatchProcessingPipeline")
            # What belongs to another dataset is small and read; data are only looked at.
            found[name] = item[:] if item.ndim == 1 and name.endswith((_OFFSETS, _MISSING)) else item

    try:
        with h5py.File(path, "r") as file:
            file.visititems(note)
            attributes = {"": dict(file.attrs), **{name: dict(file[name].attrs) for name in found}}
            batch = Batch({f"/{name}": item for name, item in found.items()}, {})
            events = batch.events
            offsets = {name: found[f"{name}{_OFFSETS}"] for name in found if batch.is_ragged(name)}
            missing = {name: found[f"{name}{_MISSING}"] for name in found if f"{name}{_MISSING}" in found}
            beside = {f"{name}{_OFFSETS}" for name in offsets} | {f"{name}{_MISSING}" for name in missing}
            datasets = {name: (item.shape, item.dtype) for name, item in found.items() if name not in beside}
    except MessageError as error:
        raise CollectError(f"{path}: {error}") from error
    except OSError as error:
        raise CollectError(f"{path}: not a complete HDF5 file: {error}") from error
    return Part(path, events, datasets, offsets, missing, attributes)


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
    _check(parts)
    partial = output.with_name(f".{output.name}.part")
    with h5py.File(partial, "w", libver="latest") as file:
        file.attrs.update(_common(part.attributes[""] for part in parts))
        if silent := set.intersection(*(part.silent for part in parts)):
            file.attrs["missing"] = sorted(silent)
        for name in dict.fromkeys(name for part in parts for name in part.datasets):
            made = _virtual(file, name, parts, output.parent)
            made.attrs.update(_common(part.attributes[name] for part in parts if name in part.datasets))
            if any(name in part.offsets for part in parts):
                file[f"{name}{_OFFSETS}"] = _offsets(name, parts)
            if any(name in part.missing or name not in part.datasets for part in parts):
                file[f"{name}{_MISSING}"] = np.concatenate([_missing(name, part) for part in parts])
    partial.replace(output)
    size = sum(part.path.stat().st_size for part in parts)
    events = sum(part.events for part in parts)
    return {"file": str(output.resolve()), "events": events, "files": len(parts), "bytes": size}


def _check(parts: Sequence[Part]) -> None:
    """That the parts hold the same datasets, but for those whose data source was silent.

    Raises:
        CollectError: they do not.
    """
    firsts: dict[str, Part] = {}
    for part in parts:
        for name, ours in part.datasets.items():
            first = firsts.setdefault(name, part)
            others = first.datasets[name]
            # Strings are as long as the longest of their file.
            alike = ours[1] == others[1] or ours[1].kind == others[1].kind == "S"
            if ours[0][1:] != others[0][1:] or not alike:
                raise CollectError(f"{part.path}: {name} is {ours}, in {first.path.name} it is {others}")
            if (name in part.offsets) != (name in first.offsets):
                kinds = ("of one value an event", "ragged")
                raise CollectError(
                    f"{part.path}: {name} is {kinds[name in part.offsets]}, in {first.path.name} it is "
                    f"{kinds[name in first.offsets]}"
                )
    for part in parts:
        lacking = [name for name in firsts if name not in part.datasets]
        # The attribute names data sources, not datasets: only their number can be compared.
        if len(lacking) > len(part.silent):
            first, name = firsts[lacking[0]], lacking[0]
            raise CollectError(
                f"{part.path}: {name} is not there, in {first.path.name} it is {first.datasets[name]}; the file names "
                f"{len(part.silent)} data sources without a value, and lacks {', '.join(lacking)}"
            )


def _virtual(file: Any, name: str, parts: Sequence[Part], base: Path) -> Any:
    """A dataset over those of the parts, with what stands for a missing value where a part has none."""
    ragged = any(name in part.offsets for part in parts)
    lengths = [part.datasets[name][0][0] if name in part.datasets else (0 if ragged else part.events) for part in parts]
    having = [part.datasets[name] for part in parts if name in part.datasets]
    rest, dtype = having[0][0][1:], max((each[1] for each in having), key=lambda each: each.itemsize)
    layout, start = h5py.VirtualLayout((sum(lengths), *rest), dtype), 0
    for part, length in zip(parts, lengths, strict=True):
        if name in part.datasets and length:
            # By relative names, so that the folder can be moved.
            source = os.path.relpath(part.path, base)
            layout[start : start + length] = h5py.VirtualSource(source, name, *part.datasets[name])
        start += length
    return file.create_virtual_dataset(name, layout, fillvalue=_filler(dtype))


def _filler(dtype: np.dtype[Any]) -> Any:
    """What stands for a missing value, as in the engine's messages; None: zero, or an empty string."""
    if dtype.kind in "fc":
        return np.nan
    return -999 if dtype.kind == "i" and dtype.itemsize > 1 else None


def _offsets(name: str, parts: Sequence[Part]) -> npt.NDArray[np.uint64]:
    """Where each event's elements begin among those of all parts."""
    counts = [np.diff(part.offsets[name]) if name in part.offsets else np.zeros(part.events, np.uint64)
              for part in parts]  # fmt: skip
    return np.cumsum(np.concatenate([np.zeros(1, np.uint64), *counts]), dtype=np.uint64)


def _missing(name: str, part: Part) -> npt.NDArray[np.uint8]:
    if name in part.missing:
        return part.missing[name]
    return np.full(part.events, name not in part.datasets, np.uint8)


def _common(attributes: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What all say: not the number of a message, but the run, or the error of a lossy codec."""
    first, *others = attributes
    return {
        key: value
        for key, value in first.items()
        if all(key in other and np.array_equal(value, other[key]) for other in others)
    }


@app.command()
def command(
    folder: Annotated[Path, typer.Argument(help="Folder with the files that the engine wrote.", file_okay=False)],
    output: Annotated[Path, typer.Option(help="The file to write.", dir_okay=False)],
    prefix: Annotated[str, typer.Option(help="What the parts' names begin with.")] = "",
    result: Annotated[Path | None, typer.Option(help="Write the figures into this file, as JSON.")] = None,
) -> None:
    """Make one HDF5 file of a run, over the files that the engine's ranks have written. No data are copied.

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
