"""Messages as the engine writes them, made with h5py."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
import pytest

START_NS = 1_700_000_000_123_456_789


@pytest.fixture
def message() -> Callable[..., bytes]:
    """``message(first, images, energies)``: one HDF5 message whose first event has that number in the run."""

    def make(
        first: int,
        images: np.ndarray,
        energies: np.ndarray | None = None,
        *,
        path: str = "/data/image",
        attributes: dict[str, Any] | None = None,
        extra: dict[str, np.ndarray] | None = None,
        **filters: Any,
    ) -> bytes:
        times = START_NS + 8_333_333 * np.arange(first, first + len(images), dtype=np.int64)
        image = io.BytesIO()
        with h5py.File(image, "w") as file:
            file.attrs.update(
                {"experiment": "mfxtest01", "run": np.int64(12), "source_identifier": "test", **(attributes or {})}
            )
            file.create_dataset(path, data=images, chunks=(1, *images.shape[1:]) if filters else None, **filters)
            file["/data/timestamp"] = times * 1e-9
            file["/data/timestamp_ns"] = times
            if energies is not None:
                file["/data/gmd"] = energies
            for name, values in (extra or {}).items():
                file[name] = values
        return image.getvalue()

    return make
