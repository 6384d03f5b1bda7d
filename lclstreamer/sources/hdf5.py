"""The event source that reads archived runs in HDF5 or NeXus files, and its data sources.

Events are rows: the n-th row of every dataset is of the same event; the rows of all files, in order of their names, are
numbered through. Every rank opens all files and reads its own rows. Companion datasets ``<path>_missing``, as the HDF5
serializer writes them, mark rows without a value; a data source that the file's root attribute `missing` names gave no
row of it a value, and has no dataset.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401 - registers the codecs
import numpy as np
from numpy.typing import NDArray

from lclstreamer import identifiers
from lclstreamer.errors import SourceError
from lclstreamer.events import Event, RunInfo
from lclstreamer.models import nearest
from lclstreamer.sources.base import DataSource, EventSource, Reader, SourceContext, make_data_sources

_SUFFIXES = (".h5", ".hdf5", ".nxs", ".cxi")
_NANOSECONDS: dict[str, int] = {"s": 1_000_000_000, "ms": 1_000_000, "us": 1000, "ns": 1}


class HDF5EventSource(EventSource):
    """Rows of HDF5 files."""

    def __init__(self, parameters: Any, context: SourceContext) -> None:
        super().__init__(parameters, context)
        self._text = identifiers.parse_files(context.source_identifier)
        self._paths: list[Path] = []
        self._file: Any = None

    def open(self) -> None:
        """Open the first file.

        Raises:
            SourceError: no file, or a dataset that is not there.
        """
        self._paths = _find(self._text)
        self._sources: dict[str, DataSource] = make_data_sources(self.context, {})
        self._read = Reader(self._sources)
        self._rows = self._use(self._paths[0])

    def events(self) -> Iterator[Event]:
        """This rank's rows of all files."""
        start = 0
        for number, path in enumerate(self._paths):
            if number:
                self._rows = self._use(path)
            run = self._run_info()
            rows = self._rows if self.context.limit is None else min(self._rows, max(0, self.context.limit - start))
            for row in range(rows):
                if self.mine(start + row):
                    values, times = self._read(row), self._times(row)
                    yield Event(values, start + row, run, next(iter(times.values()), None), times)
            start += rows

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @classmethod
    def plan(cls, parameters: Any, context: SourceContext) -> str:
        """What this rank would read; looks for the files."""
        paths = _find(identifiers.parse_files(context.source_identifier))
        return f"reads {super().plan(parameters, context)} of {', '.join(map(str, paths))}"

    def _use(self, path: Path) -> int:
        """Give a file to all data sources; how many rows it has."""
        self.close()
        try:
            self._file = h5py.File(path, "r")
        except OSError as error:
            raise SourceError(f"source_identifier: {path} cannot be read as HDF5: {error}") from error
        found = {
            name: source.use(self._file, path) for name, source in self._sources.items() if isinstance(source, _Rows)
        }
        if not found:
            raise SourceError(
                "data_sources: an HDF5EventSource needs at least one HDF5Dataset or HDF5Timestamp: their rows are the "
                "events"
            )
        lengths = {name: count for name, count in found.items() if count is not None}
        if not lengths:
            return _count_rows(self._file)
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise SourceError(f"{path}: the datasets have different numbers of rows: {shown}")
        return next(iter(lengths.values()))

    def _run_info(self) -> RunInfo:
        experiment, run = self.parameters.experiment, self.parameters.run
        if experiment is None:
            experiment = self._file.attrs.get("experiment", "")
            experiment = "".join(_texts(experiment))
        if run is None:
            run = int(self._file.attrs.get("run", 0))
        return RunInfo(experiment, run)

    def _times(self, row: int) -> dict[str, int | None]:
        """The times of all data sources that have one; the first is the event's."""
        return {
            name: source.nanoseconds(row) for name, source in self._sources.items() if isinstance(source, HDF5Timestamp)
        }


class _Rows(DataSource):
    """A dataset, a row an event."""

    def __init__(self, name: str, parameters: Any, info: Mapping[str, Any]) -> None:
        super().__init__(name, parameters, info)
        self._dataset: Any = None
        self._missing: NDArray[Any] | None = None

    def use(self, file: Any, path: Path) -> int | None:
        """Read from this file from now on; how many rows the dataset has, `None` where the source gave it nothing.

        Raises:
            SourceError: the file has no such dataset; the text names those it has.
        """
        wanted = self.parameters.path
        found = file.get(wanted)
        silent = _texts(file.attrs.get("missing", ()))
        if found is None and self.name in silent:
            self._dataset = None
            return None
        if not isinstance(found, h5py.Dataset) or not found.shape:
            names: list[str] = []
            file.visititems(lambda name, item: names.append(f"/{name}") if isinstance(item, h5py.Dataset) else None)
            raise SourceError(
                f"data_sources.{self.name}.path: {path} has no dataset {wanted!r} with an axis for the events; it has "
                f"{', '.join(names[:30]) or 'none'}{nearest(wanted, names)}"
                + (
                    f". Data sources that gave nothing for this file: {', '.join(silent)}; if it is one of them, call "
                    "this one so"
                    if silent
                    else ""
                )
            )
        self._dataset = found
        # Exact times share the mask of the times they belong to.
        mask = file.get(f"{wanted}_missing", file.get(f"{wanted.removesuffix('_ns')}_missing"))
        self._missing = mask[()] if isinstance(mask, h5py.Dataset) else None
        # Reading row by row would decompress a chunk once for every row in it.
        self._block_rows = found.chunks[0] if found.chunks else 1
        self._block: tuple[int, NDArray[Any]] | None = None
        return int(found.shape[0])

    def row(self, number: int) -> NDArray[Any] | None:
        """A row, `None` where it is marked as missing."""
        if self._dataset is None:
            return None
        if self._missing is not None and self._missing[number]:
            return None
        start = number - number % self._block_rows
        if self._block is None or self._block[0] != start:
            self._block = (start, np.asarray(self._dataset[start : start + self._block_rows]))
        return np.asarray(self._block[1][number - start])


class HDF5Dataset(_Rows):
    """A row of a dataset; strings become numpy strings."""

    def get(self, event: Any) -> NDArray[Any] | None:
        """The row of the event."""
        value = self.row(event)
        if value is None:
            return None
        if value.dtype.kind in "SO":
            return np.char.decode(value.astype(np.bytes_), "utf-8")
        return value if self.parameters.dtype == "native" else value.astype(self.parameters.dtype)


class HDF5Timestamp(_Rows):
    """Times of a dataset."""

    is_timestamp = True

    def get(self, event: Any) -> NDArray[np.float64] | None:
        """Seconds since 1970 as float64, `None` where the time is missing."""
        exact = self.nanoseconds(event)
        return None if exact is None else np.array(exact / 1e9)

    def nanoseconds(self, row: int) -> int | None:
        """Nanoseconds since 1970, exact where the dataset has integers; `None` where the time is missing."""
        value = self.row(row)
        if value is None or not np.isfinite(value):
            return None
        factor = _NANOSECONDS[str(self.parameters.unit)]
        exact: int = int(value) * factor if value.dtype.kind in "iu" else round(float(value) * factor)
        offset: int = round(self.parameters.epoch * 1e9)
        return exact + offset


def _texts(attribute: Any) -> list[str]:
    """The strings of an attribute; those of a fixed length come as bytes."""
    return [one.decode() if isinstance(one, bytes) else str(one) for one in np.ravel(attribute).tolist()]


def _count_rows(file: Any) -> int:
    """How many events a file has that the HDF5 serializer wrote, 0 without any dataset."""
    counts: list[int] = []

    def count(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.shape and f"{name}_offsets" not in file:
            counts.append(int(item.shape[0]) - name.endswith("_offsets"))

    file.visititems(count)
    return min(counts, default=0)


def _find(text: str) -> list[Path]:
    try:
        return identifiers.find_files(text, _SUFFIXES)
    except FileNotFoundError as error:
        raise SourceError(f"source_identifier: {error}") from None
