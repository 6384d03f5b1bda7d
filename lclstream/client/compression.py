"""The compression of images in DECTRIS streams: LZ4, with or without a bitshuffle before it.

Both are the payload of HDF5's filters of these names: sizes of the whole and of a block (big endian, 8 and 4 bytes),
then the blocks, each after its own compressed size (4 bytes). DECTRIS' own package does the same, and comes as source
only: it would need a compiler wherever a stream is read.

https://github.com/kiyo-masui/bitshuffle (bitshuffle.c), https://github.com/dectris/HDF5Plugin (LZ4 filter).
"""

from __future__ import annotations

import io
import struct

from lclstream.client.cbor import shown
from lclstream.client.errors import MessageError

#: LZ4 makes at most 255 bytes of one; a message that claims more is damaged, and must not cost the memory it claims.
_LARGEST_RATIO = 255
_UNCOMPRESSED_TAIL = 4096
_ALGORITHMS = ("bslz4", "lz4")
_HEADER = struct.Struct(">QI")
_LENGTH = struct.Struct(">I")


def decompress(data: bytes, algorithm: str, itemsize: int, name: str) -> bytes:
    """The bytes of an image.

    Args:
        data: header and compressed blocks.
        algorithm: ``bslz4`` or ``lz4``.
        itemsize: bytes of one element.
        name: what to call the message in errors.

    Raises:
        MessageError: the algorithm is another, the data are damaged, or a package that is needed is not installed.
    """
    if algorithm not in _ALGORITHMS:
        raise MessageError(f"{name} is compressed with {shown(algorithm)}; known are {', '.join(_ALGORITHMS)}")
    if len(data) < _HEADER.size:
        raise MessageError(f"{name}: {len(data)} bytes of compressed data are less than their header")
    size, block = _HEADER.unpack_from(data)
    if size > _LARGEST_RATIO * len(data) + _UNCOMPRESSED_TAIL:
        raise MessageError(f"{name}: {len(data)} bytes of compressed data cannot hold the {size} they claim")
    try:
        return _lz4(data, size, block) if algorithm == "lz4" else _bitshuffle(data, size, block, itemsize)
    except ImportError as error:
        raise MessageError(
            f"{name} is compressed, and reading it needs {error.name}: pip install 'lclstream[stream]'"
        ) from error
    except ValueError as error:
        raise MessageError(f"{name}: the compressed data are damaged ({error})") from error


def _lz4(data: bytes, size: int, block: int) -> bytes:
    """Blocks of LZ4; one that would have grown is stored as it was."""
    import lz4.block

    if size and not block:
        raise ValueError("blocks of 0 bytes")
    pieces = []
    position = _HEADER.size
    for start in range(0, size, block or 1):
        wanted = min(block, size - start)
        piece, position = _block(data, position)
        if len(piece) == wanted:
            pieces.append(piece)
            continue
        try:
            plain = lz4.block.decompress(piece, uncompressed_size=wanted)
        except lz4.block.LZ4BlockError as error:
            raise ValueError(str(error)) from error
        if len(plain) != wanted:
            raise ValueError(f"a block of {len(plain)} bytes where {wanted} belong")
        pieces.append(plain)
    if position != len(data):
        raise ValueError(f"{len(data) - position} bytes behind the last block")
    return b"".join(pieces)


def _bitshuffle(data: bytes, size: int, block: int, itemsize: int) -> bytes:
    """As HDF5's filter reads it: the data become the only chunk of a file in memory.

    The filter trusts the lengths of the blocks, so they are looked at before.
    """
    import h5py
    import hdf5plugin
    import numpy as np

    elements, together = size // itemsize, block // itemsize
    if size % itemsize or block % itemsize or (size and not together) or together % 8:
        raise ValueError(f"{size} bytes in blocks of {block} are no elements of {itemsize} bytes in groups of 8")
    # The last block holds what can be shuffled, eight elements at a time; fewer than eight follow as they are.
    blocks = elements // together + (elements % together >= 8) if size else 0
    position = _HEADER.size
    for _ in range(blocks):
        _, position = _block(data, position)
    if position + elements % 8 * itemsize != len(data):
        raise ValueError("the lengths of its blocks are not that of the whole")
    if not size:
        return b""
    dtype = np.dtype(f"V{itemsize}")
    try:
        with h5py.File(io.BytesIO(), "w") as file:
            filters = hdf5plugin.Bitshuffle(nelems=0, cname="lz4")
            dataset = file.create_dataset("image", (elements,), dtype, chunks=(elements,), **filters)
            dataset.id.write_direct_chunk((0,), data)
            return bytes(dataset[:].tobytes())
    except (OSError, RuntimeError) as error:
        raise ValueError(str(error)) from error


def _block(data: bytes, position: int) -> tuple[memoryview, int]:
    """The compressed bytes of the block that begins there, and where the next one does."""
    start = position + _LENGTH.size
    if start > len(data):
        raise ValueError("it ends before its last block")
    end = start + int(_LENGTH.unpack_from(data, position)[0])
    if end > len(data):
        raise ValueError("it ends within a block")
    return memoryview(data)[start:end], end
