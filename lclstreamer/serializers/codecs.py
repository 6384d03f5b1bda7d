"""Compressing one HDF5 chunk outside HDF5: the bytes are those HDF5's own filters would store.

HDF5 compresses under one global lock; these functions release Python's, so that several events are compressed at once.
"""

from __future__ import annotations

import abc
import ctypes
import itertools
import struct
import threading
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin
import numpy as np
from numpy.typing import NDArray

from lclstreamer.events import Buffer

_numbers = itertools.count()


class AsItIs(bytes):
    """A chunk that no filter has changed, in a dataset with a filter: the file must say so of this chunk."""


class ChunkCodec(abc.ABC):
    """Compresses chunks of one shape and dtype; safe to use from several threads."""

    #: How many bytes a compressed chunk can have at most, 0 where `encode` brings its own memory.
    room = 0

    @abc.abstractmethod
    def encode(self, values: NDArray[Any], into: memoryview) -> Buffer:
        """The stored form of a C-contiguous array, in `into` (of `room` bytes) or in memory of its own.

        :class:`AsItIs` where the values are not compressed.
        """


class BitshuffleCodec(ChunkCodec):
    """Bitshuffle with LZ4 or Zstandard: a header of 12 bytes, then blocks (https://github.com/kiyo-masui/bitshuffle)."""

    def __init__(self, count: int, itemsize: int, algorithm: str, level: int, *, block: int = 0) -> None:
        self._library = _bitshuffle()
        self._count, self._itemsize, self._algorithm, self._level = count, itemsize, algorithm, level
        self._block = block or int(self._library.bshuf_default_block_size(itemsize))
        bound = (
            self._library.bshuf_compress_lz4_bound if algorithm == "lz4" else self._library.bshuf_compress_zstd_bound
        )
        self.room = 12 + int(bound(count, itemsize, self._block))
        self._header = struct.pack(">QI", count * itemsize, self._block * itemsize)

    def encode(self, values: NDArray[Any], into: memoryview) -> Buffer:
        """See :class:`ChunkCodec`."""
        into[:12] = self._header
        target = ctypes.addressof(ctypes.c_char.from_buffer(into, 12))
        arguments = (values.ctypes.data, target, self._count, self._itemsize, self._block)
        if self._algorithm == "lz4":
            size = int(self._library.bshuf_compress_lz4(*arguments))
        else:
            size = int(self._library.bshuf_compress_zstd(*arguments, self._level))
        if size < 0:
            raise RuntimeError(f"bitshuffle failed with code {size}")
        return into[: 12 + size]


class GzipCodec(ChunkCodec):
    """HDF5's deflate, with or without its byte shuffle."""

    def __init__(self, level: int, *, shuffle: bool) -> None:
        self._level, self._shuffle = level, shuffle

    def encode(self, values: NDArray[Any], into: memoryview) -> Buffer:
        """See :class:`ChunkCodec`."""
        data = values.reshape(-1).view(np.uint8)
        if self._shuffle and values.itemsize > 1:
            data = np.ascontiguousarray(data.reshape(-1, values.itemsize).T)
        return zlib.compress(data.data.cast("B"), self._level)


class FilterCodec(ChunkCodec):
    """Any one HDF5 filter, by letting HDF5 write the chunk to a file in memory. One chunk at a time.

    With an `accuracy` no value comes back with a larger error: where the filter cannot give that, the chunk is stored
    as it is.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], filters: dict[str, Any], accuracy: float | None = None
    ) -> None:
        self._lock = threading.Lock()
        # HDF5 opens no second file of the same name, also in memory; without a cache it reads what it has stored.
        name = f"chunk {next(_numbers)}"
        self._file = h5py.File(name, "w", driver="core", backing_store=False, rdcc_nbytes=0)
        self._chunk = self._file.create_dataset("chunk", shape=(1, *shape), chunks=(1, *shape), dtype=dtype, **filters)
        self._origin = (0,) * (len(shape) + 1)
        self._accuracy = accuracy

    def encode(self, values: NDArray[Any], into: memoryview) -> Buffer:
        """See :class:`ChunkCodec`."""
        largest = 0.0
        if self._accuracy is not None:
            largest = float(max(values.max(), -values.min()))
            if not np.isfinite(largest):
                return AsItIs(values.tobytes())
        with self._lock:
            self._chunk[0] = values
            self._file.flush()
            mask, content = self._chunk.id.read_direct_chunk(self._origin)
            exact = mask or self._accuracy is None or self._within(self._accuracy, largest, values)
        if mask or not exact:
            return AsItIs(values.tobytes())
        return bytes(content)

    def _within(self, accuracy: float, largest: float, values: NDArray[Any]) -> bool:
        """Whether what is in the file is as accurate as it should be."""
        # zfp counts in steps of a block's largest value: it cannot be better than those, whatever it was asked for. In
        # any number of axes it was off by less than 2 eps; up to an eighth of the accuracy there is no need to look.
        if 8 * float(np.finfo(values.dtype).eps) * largest <= accuracy:
            return True
        with np.errstate(all="ignore"):
            error = np.abs(self._chunk[0].astype(np.float64) - values)
        return bool(error.max() <= accuracy)


@cache
def _bitshuffle() -> Any:
    """The library behind HDF5's bitshuffle filter; calling it releases Python's lock.

    Raises:
        OSError, AttributeError: this build of hdf5plugin does not show these functions.
    """
    (path,) = Path(hdf5plugin.PLUGIN_PATH).glob("libh5bshuf.*")
    library = ctypes.CDLL(str(path))
    sizes, pointer = ctypes.c_size_t, ctypes.c_void_p
    library.bshuf_default_block_size.argtypes = [sizes]
    library.bshuf_default_block_size.restype = sizes
    for name in ("lz4", "zstd"):
        bound = getattr(library, f"bshuf_compress_{name}_bound")
        bound.argtypes, bound.restype = [sizes, sizes, sizes], sizes
        compress = getattr(library, f"bshuf_compress_{name}")
        compress.argtypes, compress.restype = [pointer, pointer, sizes, sizes, sizes], ctypes.c_int64
    library.bshuf_compress_zstd.argtypes = [pointer, pointer, sizes, sizes, sizes, ctypes.c_int]
    return library


def filters_of(parameters: Any) -> dict[str, Any]:
    """What h5py's `create_dataset` takes for the configured compression."""
    level = parameters.compression_level
    if parameters.compression in ("gzip", "gzip_with_shuffle"):
        shuffle = parameters.compression == "gzip_with_shuffle"
        return {"compression": "gzip", "compression_opts": level, "shuffle": shuffle}
    if parameters.compression == "bitshuffle_with_lz4":
        return dict(hdf5plugin.Bitshuffle(cname="lz4"))
    if parameters.compression == "bitshuffle_with_zstd":
        return dict(hdf5plugin.Bitshuffle(cname="zstd", clevel=level))
    if parameters.compression == "zfp" and parameters.zfp_accuracy is not None:
        return dict(hdf5plugin.Zfp(accuracy=parameters.zfp_accuracy))
    if parameters.compression == "zfp":
        return dict(hdf5plugin.Zfp(reversible=True))
    return {}


def zfp_takes(dtype: np.dtype[Any], axes: int) -> bool:
    """Whether zfp can compress this: 1 to 4 axes of 32- or 64-bit numbers, in which the lossy mode needs floats."""
    return dtype.kind in "if" and dtype.itemsize in (4, 8) and 1 <= axes <= 4


def codec_for(parameters: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> ChunkCodec | None:
    """The codec for one data source's events, `None` where they are stored as they are."""
    compression = parameters.compression
    if compression is None or dtype.kind not in "biufc":
        return None
    if compression in ("gzip", "gzip_with_shuffle"):
        return GzipCodec(parameters.compression_level, shuffle=compression == "gzip_with_shuffle")
    if compression == "zfp":
        lossy_integers = parameters.zfp_accuracy is not None and dtype.kind == "i"
        if not zfp_takes(dtype, len(shape)) or lossy_integers:
            return None
        return FilterCodec(shape, dtype, filters_of(parameters), parameters.zfp_accuracy)
    count = int(np.prod(shape))
    algorithm = compression.removeprefix("bitshuffle_with_")
    try:
        return BitshuffleCodec(count, dtype.itemsize, algorithm, parameters.compression_level)
    except (OSError, AttributeError, ValueError):
        return FilterCodec(shape, dtype, filters_of(parameters))
