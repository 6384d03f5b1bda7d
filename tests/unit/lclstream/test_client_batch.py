"""Messages to arrays."""

from __future__ import annotations

import io

import h5py
import hdf5plugin
import numpy as np
import pytest

from lclstream.client import MessageError
from lclstream.client.batch import decode


def hdf5(fill) -> bytes:
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        fill(file)
    return image.getvalue()


@pytest.mark.parametrize(
    "filters",
    [{}, {"compression": "gzip", "shuffle": True}, dict(hdf5plugin.Bitshuffle(cname="lz4")), dict(hdf5plugin.Zfp())],
)
def test_arrays_keep_type_shape_and_values_whatever_the_codec(filters):
    dtype = np.float32 if "compression" in filters and filters["compression"] == 32013 else np.uint16
    images = np.arange(4 * 64 * 64).reshape(4, 64, 64).astype(dtype)

    def fill(file):
        file.create_dataset("/entry/data", data=images, chunks=(1, 64, 64), **filters)

    batch = decode(hdf5(fill))
    assert batch["/entry/data"].dtype == dtype
    np.testing.assert_allclose(batch["entry/data"], images, rtol=1e-3)
    assert batch.events == 4


def test_root_and_field_attributes_are_plain_values():
    def fill(file):
        file.attrs.update({"experiment": "mfx1", "run": np.int64(7), "missing": ["a", "b"]})
        file["/t_ns"] = np.arange(3)
        file["/t_ns"].attrs["units"] = "ns"

    batch = decode(hdf5(fill))
    assert batch.attributes["experiment"] == "mfx1"
    assert batch.attributes["run"] == 7
    assert type(batch.attributes["run"]) is int
    assert list(batch.attributes["missing"]) == ["a", "b"]
    assert batch.field_attributes == {"/t_ns": {"units": "ns"}}


def test_strings_come_as_text():
    def fill(file):
        file["/any_length"] = ["alpha", "β"]
        file["/fixed_length"] = np.array([b"alpha", b"\xce\xb2"], h5py.string_dtype("utf-8", 5))

    batch = decode(hdf5(fill))
    assert list(batch["/any_length"]) == ["alpha", "β"]
    assert list(batch["/fixed_length"]) == ["alpha", "β"]


def test_bytes_that_are_no_text_are_kept():
    def fill(file):
        file["/odd"] = np.array([b"a\xff"], h5py.string_dtype("utf-8", 2))

    assert decode(hdf5(fill))["/odd"][0].encode(errors="surrogateescape") == b"a\xff"


def test_a_missing_path_is_told_with_the_paths_there_are():
    batch = decode(hdf5(lambda file: file.create_dataset("/a/b", data=[1])))
    with pytest.raises(KeyError, match="/a/b"):
        batch["/a/c"]


@pytest.mark.parametrize("damage", ["not hdf5 at all", "cut"])
def test_what_is_no_hdf5_is_told_with_its_number(damage):
    whole = hdf5(lambda file: file.create_dataset("/a", data=np.arange(1000)))
    message = whole[: len(whole) // 2] if damage == "cut" else damage.encode()
    with pytest.raises(MessageError, match="message 17"):
        decode(message, name="message 17")


def test_datasets_of_different_lengths_are_refused():
    def fill(file):
        file["/a"] = np.arange(3)
        file["/b"] = np.arange(4)

    with pytest.raises(MessageError, match="different numbers of events"):
        _ = decode(hdf5(fill)).events
