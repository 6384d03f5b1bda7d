"""Messages that are HDF5 files.

Every dataset has the event as its first axis. Root attributes say where a message comes from: `experiment`, `run`,
`rank`, `sequence` (number of the message on its rank), `source_identifier`, `configuration_sha256`,
`lclstreamer_version`.

* Times have a companion dataset ``<path>_ns``: int64 nanoseconds, with the attribute `epoch`.
* Strings are stored as UTF-8 of a fixed length.
* Ragged values (:class:`lclstreamer.events.Ragged`) are stored one event after the other in ``<path>``; event i has the
  elements from ``<path>_offsets[i]`` to ``<path>_offsets[i + 1]``.
* A value that is missing is NaN in floating data, -999 in signed integers that can hold it, 0 or an empty string
  elsewhere; as soon as a data source has missed a value its dataset has a companion ``<path>_missing`` (uint8, 1 where
  the value is missing). A data source that gave nothing for a whole message has no dataset in it and is named in the
  root attribute `missing`.
* With a lossy codec the dataset says so: attribute `max_absolute_error`.

An event is copied once, to its place in a file laid out before (:mod:`lclstreamer.serializers.layout`); compression
runs in threads while the next events are read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lclstreamer.errors import ComponentError, ConfigurationError
from lclstreamer.events import Buffer, Channels, Event, Message, Ragged, RunInfo
from lclstreamer.models import dataset_place
from lclstreamer.serializers.base import Serializer, SerializerContext
from lclstreamer.serializers.batches import Batch, Kind
from lclstreamer.serializers.codecs import ChunkCodec, codec_for, filters_of
from lclstreamer.serializers.layout import Column, Layout
from lclstreamer.serializers.slots import SlotRing

log = logging.getLogger("lclstreamer")

EPOCH = "1970-01-01T00:00:00Z"
#: Events smaller than this are stored as they are: a compressed chunk of a few bytes only costs.
_PACK_FROM = 256
#: Compressing less than this in another thread costs more than it gains.
_THREAD_FROM = 16_384
_KEPT_LAYOUTS = 16


class HDF5BinarySerializer(Serializer):
    """One HDF5 file a batch.

    Raises:
        ConfigurationError: a field is in the way of the exact times of another.
    """

    def __init__(self, parameters: Any, context: SerializerContext) -> None:
        super().__init__(parameters, context)
        if problems := parameters.collisions(context.timestamps, (), incomplete=False):
            raise ConfigurationError("\n".join(problems))
        self.paths: dict[str, str] = {name: dataset_place(path) for name, path in parameters.fields.items()}
        self.stamps = {name: f"{path}_ns" for name, path in self.paths.items() if name in context.timestamps}
        self._filters = filters_of(parameters)
        self._codecs: dict[Kind, ChunkCodec | None] = {}
        self._layouts: dict[Any, Layout] = {}
        self.ring = SlotRing(context.slots, context.stop)
        self._threads: ThreadPoolExecutor | None = None
        self.incomplete: frozenset[str] = frozenset()
        self._batch: Batch | None = None
        self._sequence = 0
        self._kinds: dict[str, Kind] = {}
        self._told: set[str] = set()

    @property
    def waited_s(self) -> float:
        """Seconds spent waiting for messages to leave."""
        return self.ring.waited_s

    def add(self, event: Event) -> Iterable[Message]:
        """Take an event. A value of another shape or dtype, or of another run, begins a new message.

        Raises:
            ComponentError: the pipelines did not give a configured field, or it is no number or string.
        """
        batch = self._batch
        if batch is not None and batch.add(event):
            return ()
        return self._add_slowly(event)

    def end_batch(self) -> Iterable[Message]:
        """The message of the events added since the last one."""
        batch, self._batch = self._batch, None
        if batch is None:
            return ()
        if batch.count < batch.layout.rows:
            batch = self._moved(batch, batch.kinds, batch.count)
        message = batch.message(self._sequence)
        self._sequence += 1
        return (message,)

    def close(self) -> None:
        """End the threads that compress."""
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)

    @classmethod
    def fields(cls, parameters: Any, names: Iterable[str]) -> Mapping[str, str]:
        """Data source name to dataset path."""
        return dict(parameters.fields)

    # ------------------------------------------------------------------------- when the layout does not fit the event

    def _add_slowly(self, event: Event) -> list[Message]:
        values = {name: self._storable(name, event) for name in self.paths}
        event = Event(values, event.index, event.run, event.timestamp_ns, event.times)
        # What only had to be turned into bytes or an array fits now: moving the batch would copy and compress it again.
        if self._batch is not None and self._batch.add(event):
            return []
        missing = {name for name, value in values.items() if value is None}
        self.incomplete |= missing
        messages: list[Message] = []
        if self._batch is not None and self._differs(self._batch, event):
            messages += self.end_batch()
        kinds = {} if self._batch is None else dict(self._batch.kinds)
        for name, value in values.items():
            if value is None:
                # A guess from earlier messages keeps the same layout for events with and without the value.
                continue
            kind: Kind = ((), value.values.dtype) if isinstance(value, Ragged) else (value.shape, value.dtype)
            before = kinds.get(name)
            if before is not None and kind[1].kind == "S":
                kind = (kind[0], max(before[1], kind[1], key=lambda one: one.itemsize))
            kinds[name] = kind
        if self._batch is None:
            rows = self.context.batch_size
            self._batch = self._begin(
                kinds, {name for name, value in values.items() if isinstance(value, Ragged)}, rows, event
            )
        else:
            rows = self._batch.layout.rows
            grown = max(rows, 2 * self._batch.count) if self._batch.count == rows else rows
            self._batch.ragged |= {name for name, value in values.items() if isinstance(value, Ragged)}
            self._batch = self._moved(self._batch, kinds, grown)
        if not self._batch.add(event):
            raise AssertionError("the new layout must fit the event it was made for")
        return messages

    def _storable(self, name: str, event: Event) -> Any:
        try:
            value = event.values[name]
        except KeyError:
            raise ComponentError(
                f"data_serializer.fields.{name}: events have no {name} after the pipelines; they have "
                f"{', '.join(event.values)}"
            ) from None
        return value if value is None or isinstance(value, Ragged) else storable(name, value)

    @staticmethod
    def _differs(batch: Batch, event: Event) -> bool:
        """Whether the event cannot be in the same message, whatever its layout."""
        if event.run != batch.run or not batch.fits_times(event):
            return True
        for name, value in event.values.items():
            known = batch.kinds.get(name)
            if value is None or known is None:
                continue
            if isinstance(value, Ragged) != (name in batch.ragged):
                return True
            shape, dtype = ((), value.values.dtype) if isinstance(value, Ragged) else (value.shape, value.dtype)
            if shape != known[0] or (dtype != known[1] and not dtype.kind == known[1].kind == "S"):
                return True
        return False

    def _begin(self, kinds: dict[str, Kind], ragged: set[str], rows: int, event: Event) -> Batch:
        timed = frozenset(name for name in self.stamps if event.time_of(name) is not None)
        layout = self._layout(kinds, ragged, rows, event.run, timed)
        return Batch(self, layout, kinds, ragged, event.run, timed)

    def _moved(self, batch: Batch, kinds: dict[str, Kind], rows: int) -> Batch:
        """The same events in another layout: other rows, more datasets, or longer strings."""
        layout = self._layout(kinds, batch.ragged, rows, batch.run, batch.timed)
        new = Batch(self, layout, kinds, batch.ragged, batch.run, batch.timed)
        new.take_over(batch)
        return new

    def _layout(
        self, kinds: dict[str, Kind], ragged: set[str], rows: int, run: RunInfo, timed: frozenset[str]
    ) -> Layout:
        key = (tuple(kinds.items()), frozenset(ragged), rows, run, timed, self.incomplete)
        found = self._layouts.pop(key, None)
        if found is None:
            columns = tuple(self._columns(kinds, ragged, timed))
            found = Layout(columns, rows, self._attributes(run, kinds), self._filters)
        self._layouts[key] = found
        while len(self._layouts) > _KEPT_LAYOUTS:
            del self._layouts[next(iter(self._layouts))]
        return found

    def _columns(self, kinds: dict[str, Kind], ragged: set[str], timed: frozenset[str]) -> Iterable[Column]:
        for name, path in self.paths.items():
            if name in timed:
                yield Column(f"{path}_ns", "plain", (), np.dtype(np.int64), (("epoch", EPOCH), ("units", "ns")))
            if name not in kinds:
                continue
            shape, dtype = kinds[name]
            if name in ragged:
                yield Column(path, "ragged", (), dtype)
                yield Column(f"{path}_offsets", "plain", (), np.dtype(np.uint64), extra=1)
            elif self.codec(name, kinds[name]) is not None:
                bound = self.parameters.zfp_accuracy
                lossy = (("max_absolute_error", bound),) if bound is not None else ()
                yield Column(path, "packed", shape, dtype, lossy)
            else:
                yield Column(path, "plain", shape, dtype)
            if name in self.incomplete:
                yield Column(f"{path}_missing", "plain", (), np.dtype(np.uint8))

    def _attributes(self, run: RunInfo, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        attributes: dict[str, Any] = {
            "experiment": run.experiment,
            "run": np.int64(run.run),
            "rank": np.int64(self.context.rank),
            "source_identifier": self.context.source_identifier,
            "configuration_sha256": self.context.configuration_sha256,
            "lclstreamer_version": self.context.version,
        }
        missing = [name for name in self.paths if name not in kinds]
        if missing:
            attributes["missing"] = missing
        return attributes

    # -------------------------------------------------------------------------------------------------- for the batch

    def codec(self, name: str, kind: Kind) -> ChunkCodec | None:
        """The codec for values of this kind, `None` where they are stored as they are."""
        if kind not in self._codecs:
            shape, dtype = kind
            nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
            codec = codec_for(self.parameters, shape, dtype) if shape and nbytes >= _PACK_FROM else None
            if (
                codec is None
                and self.parameters.compression == "zfp"
                and nbytes >= _PACK_FROM
                and name not in self._told
            ):
                self._told.add(name)
                log.warning(
                    "data_serializer.compression: zfp cannot hold %s of %d axes (%s); %s is sent uncompressed, use "
                    "bitshuffle_with_lz4 for it",
                    dtype,
                    len(shape),
                    "it takes 1 to 4 axes of 32- and 64-bit numbers, lossy only floating ones",
                    name,
                )
            self._codecs[kind] = codec
        return self._codecs[kind]

    def submit(self, work: Callable[[], Buffer]) -> Future[Buffer]:
        """Run in one of the threads that compress."""
        if self._threads is None:
            count = self.parameters.compression_threads or max(1, _cores() // self.context.size)
            self._threads = ThreadPoolExecutor(count, thread_name_prefix="compress")
        return self._threads.submit(work)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def storable(name: str, value: Any) -> NDArray[Any]:
    """The value as HDF5 can hold it: numbers as they are, strings as UTF-8 bytes of a fixed length.

    Raises:
        ComponentError: it is neither.
    """
    if isinstance(value, Channels):
        raise ComponentError(
            f"{name}: waveforms of several channels have no single shape; put a FexPipeline before the serializer "
            "(`form: waveform` keeps all samples)"
        )
    array = np.asarray(value)
    if array.dtype.kind == "U":
        encoded = np.char.encode(array, "utf-8")
        return encoded if encoded.dtype.itemsize else encoded.astype("S1")
    if array.dtype.kind not in "biufcS":
        raise ComponentError(f"{name}: {array.dtype} values cannot be stored in HDF5; only numbers and strings can")
    return array
