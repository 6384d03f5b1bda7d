"""What the engine's tests share: configurations, events, runs written by the simulator, and readers of messages."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401 - registers the codecs
import numpy as np
import pytest

REAL_DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "lcls"

INTERNAL: dict[str, Any] = {
    "source_identifier": "",
    "skip_incomplete_events": False,
    "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": 25},
    "data_sources": {
        "random": {"type": "GenericRandomNumpyArray", "array_shape": "4,3", "array_dtype": "float32"},
        "number": {"type": "IntValue", "value": 3},
    },
    "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 10},
    "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"random": "/data/random", "number": "/data/number"}},
    "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": "out"}],
}


@pytest.fixture
def internal() -> dict[str, Any]:
    """A valid configuration of 25 synthetic events, to be changed at will."""
    return copy.deepcopy(INTERNAL)


def datasets(message: bytes) -> dict[str, Any]:
    """Path to array of an HDF5 message; strings are decoded. The key ``""`` has the root attributes."""
    found: dict[str, Any] = {}
    with h5py.File(io.BytesIO(message)) as file:
        found[""] = dict(file.attrs)

        def take(name: str, item: Any) -> None:
            if isinstance(item, h5py.Dataset):
                data = item[()]
                found[f"/{name}"] = np.char.decode(data, "utf-8") if data.dtype.kind == "S" else data

        file.visititems(take)
    return found


@pytest.fixture(name="datasets")
def datasets_fixture() -> Callable[[bytes], dict[str, Any]]:
    return datasets


@pytest.fixture
def real_run() -> Callable[[str], Path]:
    """The path of a real LCLS-II file; skips where the data folder is not there."""

    def path(name: str) -> Path:
        if not REAL_DATA.is_dir():
            pytest.skip(f"the folder with real detector data, {REAL_DATA}, is not there")
        return REAL_DATA / name

    return path


@pytest.fixture(scope="session")
def simulated_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated run of 23 small frames."""
    from lclstreamer.sources import psana2_simulator as simulator

    path = tmp_path_factory.mktemp("run") / "run.xtc2"
    simulator.write(path, simulator.Simulation(events=23, rows=64, columns=96))
    return path


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()
