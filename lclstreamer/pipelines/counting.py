"""Electron counting with `stempy`, as NERSC's 4D-STEM streaming does it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ComponentError, ConfigurationError
from lclstreamer.events import Event, Ragged, RunInfo
from lclstreamer.pipelines.base import Pipeline

#: Run and number of a frame.
_Frame = tuple[RunInfo, int]
_REMEMBERED = 10_000


class ElectronCountingPipeline(Pipeline):
    """Replaces frames by the pixels that electrons hit.

    `NAME_electrons` are pixel numbers, row x columns + column (uint32, another number in every event), `NAME_frame` is
    the number of the frame (int64), `NAME_sectors` how many sectors it had (int64). Sectors (rows, columns) are put one
    below the other, the first at the top; missing ones are zero. An event that lacks one of its numbers, and a sector
    that comes when its frame has been counted without it, are left out and counted.
    """

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters)
        try:
            from stempy import image
        except ImportError as error:
            raise ConfigurationError(
                f"processing_pipeline.type: ElectronCountingPipeline needs stempy, which cannot be imported: {error}; "
                "pip install stempy"
            ) from error
        self._stempy = image
        self._dark = None
        if parameters.dark_reference is not None:
            try:
                self._dark = np.load(parameters.dark_reference, allow_pickle=False).astype(np.float32)
            except (OSError, ValueError) as error:
                raise ConfigurationError(
                    f"processing_pipeline.dark_reference: {parameters.dark_reference} cannot be read: {error}; a .npy "
                    "file "
                    "is needed"
                ) from error
        self._open: dict[_Frame, tuple[Event, dict[int, NDArray[Any]]]] = {}
        #: Frames counted without all sectors, so that a late one does not become a second frame of that number.
        self._given_up: dict[_Frame, None] = {}
        self._counts = {"frames": 0, "incomplete frames": 0, "electrons": 0, "sectors without a frame": 0}

    def process(self, event: Event) -> Iterable[Event]:
        """The event of a frame that is complete with it; nothing while sectors are missing.

        With more frames waiting than there may be, also the one that has waited longest, as it is.

        Raises:
            ComponentError: the value is no image, or a sector comes twice.
        """
        options = self.parameters
        value = event.values[options.data_source]
        if value is not None and (not isinstance(value, np.ndarray) or value.ndim != 2):
            raise ComponentError(f"ElectronCountingPipeline: {options.data_source} must be an image of two axes")
        if options.sectors == 1:
            return (self._counted(event, value, event.index, 0 if value is None else 1),)
        if value is None:
            return ()
        numbers = event.values[options.frame_number], event.values[options.sector_number]
        if any(number is None for number in numbers):
            self._counts["sectors without a frame"] += 1
            return ()
        frame, sector = (int(number) for number in numbers)
        if not 0 <= sector < options.sectors:
            raise ComponentError(
                f"ElectronCountingPipeline: sector {sector} of frame {frame}: there are {options.sectors}"
            )
        key = (event.run, frame)
        if key in self._given_up:
            self._counts["sectors without a frame"] += 1
            return ()
        if key not in self._open:
            self._open[key] = (self._kept(event), {})
        _, parts = self._open[key]
        if sector in parts:
            raise ComponentError(f"ElectronCountingPipeline: sector {sector} of frame {frame} came twice")
        parts[sector] = value.copy()
        if len(parts) == options.sectors:
            first, parts = self._open.pop(key)
            return (self._whole(first, frame, parts),)
        if len(self._open) > options.maximum_open_frames:
            return (self._give_up(next(iter(self._open))),)
        return ()

    def finish(self) -> Iterable[Event]:
        """Frames of which sectors never came."""
        for key in sorted(self._open, key=lambda key: (key[0].experiment, key[0].run, key[1])):
            yield self._give_up(key)

    def _give_up(self, key: _Frame) -> Event:
        first, parts = self._open.pop(key)
        self._counts["incomplete frames"] += 1
        self._given_up[key] = None
        if len(self._given_up) > _REMEMBERED:
            del self._given_up[next(iter(self._given_up))]
        return self._whole(first, key[1], parts)

    def _kept(self, event: Event) -> Event:
        """An event that stays good: sources may use the memory of its values for the next one."""
        values = {
            name: value.copy() if isinstance(value, np.ndarray) else value
            for name, value in event.values.items()
            if name != self.parameters.data_source
        }
        return Event(values, event.index, event.run, event.timestamp_ns, event.times)

    def report(self) -> dict[str, int]:
        """Frames, frames without all sectors, electrons, and sectors that were left out."""
        return dict(self._counts)

    def _whole(self, event: Event, frame: int, parts: dict[int, NDArray[Any]]) -> Event:
        empty = np.zeros_like(next(iter(parts.values())))
        image = np.concatenate([parts.get(sector, empty) for sector in range(self.parameters.sectors)])
        return self._counted(event, image, frame, len(parts))

    def _counted(self, event: Event, image: NDArray[Any] | None, frame: int, sectors: int) -> Event:
        options = self.parameters
        electrons, number, present = options.makes
        values = {name: value for name, value in event.values.items() if name != options.data_source}
        values[number], values[present] = np.array(frame, np.int64), np.array(sectors, np.int64)
        values[electrons] = None
        if image is not None:
            if self._dark is not None and self._dark.shape != image.shape:
                raise ComponentError(
                    f"ElectronCountingPipeline: the dark reference has the shape {self._dark.shape}, frames have "
                    f"{image.shape}"
                )
            found = self._stempy.electron_count_frame(
                np.ascontiguousarray(image),
                darkreference=self._dark,
                background_threshold=options.background_threshold,
                xray_threshold=options.xray_threshold,
            )
            values[electrons] = Ragged(np.asarray(found.data[0][0], dtype=np.uint32))
            self._counts["frames"] += 1
            self._counts["electrons"] += int(values[electrons].values.size)
        return Event(values, event.index, event.run, event.timestamp_ns, event.times)
