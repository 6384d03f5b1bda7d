"""The compression of DECTRIS streams, beside DECTRIS' own package where that could be compiled."""

from __future__ import annotations

import io
import struct

import h5py
import hdf5plugin
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lclstream.client.compression import decompress
from lclstream.client.errors import MessageError

try:
    from dectris import compression as dectris
except ImportError:  # it needs a compiler
    dectris = None


def compressed(plain: bytes, algorithm: str, itemsize: int, block: int) -> bytes:
    """The payload of HDF5's own filter, in blocks of so many elements."""
    count = len(plain) // itemsize
    if algorithm == "bslz4":
        filters = hdf5plugin.Bitshuffle(nelems=block, cname="lz4")
    else:
        filters = hdf5plugin.LZ4(nbytes=block * itemsize)
    with h5py.File(io.BytesIO(), "w") as file:
        dataset = file.create_dataset("image", (count,), f"V{itemsize}", chunks=(count,), **filters)
        dataset[:] = np.frombuffer(plain, f"V{itemsize}")
        skipped, data = dataset.id.read_direct_chunk((0,))
    assert not skipped
    return bytes(data)


@given(
    algorithm=st.sampled_from(["bslz4", "lz4"]),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    elements=st.integers(1, 5000),
    block=st.sampled_from([8, 64, 1024, 8192]),
    repeated=st.binary(min_size=1, max_size=40),
)
def test_what_hdf5s_filters_compress_is_read(
    algorithm: str, itemsize: int, elements: int, block: int, repeated: bytes
) -> None:
    size = elements * itemsize
    plain = (repeated * (size // len(repeated) + 1))[:size]
    data = compressed(plain, algorithm, itemsize, block)
    assert decompress(data, algorithm, itemsize, "image") == plain
    if dectris is not None:
        assert bytes(dectris.decompress(data, algorithm, elem_size=itemsize)) == plain


def test_blocks_of_lz4_are_read_compressed_and_as_they_are() -> None:
    # A literal run of one byte and a match of 15 + 4 + 0 bytes at distance 1, then the last five literals.
    run = bytes([0x1F]) + b"a" + struct.pack("<H", 1) + b"\x00" + bytes([0x50]) + b"aaaaa"
    blocks = [struct.pack(">I", len(run)) + run, struct.pack(">I", 7) + b"as it is"[:7]]
    assert decompress(struct.pack(">QI", 32, 25) + b"".join(blocks), "lz4", 1, "image") == b"a" * 25 + b"as it i"


@pytest.mark.parametrize("algorithm", ["bslz4", "lz4"])
@given(
    header=st.tuples(st.integers(0, 200), st.integers(0, 64)),
    blocks=st.lists(st.tuples(st.integers(0, 40), st.binary(max_size=40)), max_size=4),
    itemsize=st.sampled_from([1, 2, 4, 8]),
)
def test_any_other_bytes_are_refused_with_the_messages_name_or_have_the_size_they_claim(
    algorithm: str, header: tuple[int, int], blocks: list[tuple[int, bytes]], itemsize: int
) -> None:
    data = struct.pack(">QI", *header) + b"".join(struct.pack(">I", length) + body for length, body in blocks)
    try:
        plain = decompress(data, algorithm, itemsize, "message 7")
    except MessageError as error:
        assert str(error).startswith("message 7")  # noqa: PT017 - both ends are right
    else:
        assert len(plain) == header[0]
