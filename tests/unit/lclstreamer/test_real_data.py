"""The real LCLS-II files, through the whole engine and our reader: what arrives equals psana's own reading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lclstream.client.batch import Batch, decode
from lclstreamer.config import from_mapping
from lclstreamer.engine import Engine
from lclstreamer.sources import _psana
from lclstreamer.sources.psana2_data import timestamp_ns

pytestmark = pytest.mark.skipif(find_spec("psana") is None, reason="psana (LCLS-II) is not installed")


BATCHES = {"type": "BatchProcessingPipeline", "batch_size": 64}


def streamed(path: Path, folder: Path, data_source: dict[str, Any], *, pipelines: Any, rank: int, size: int) -> Any:
    """The messages of one rank, decoded."""
    configuration = {
        "source_identifier": f"files={path}",
        "skip_incomplete_events": False,
        "event_source": {"type": "Psana2EventSource", "calibration": "none"},
        "data_sources": {"time": {"type": "Psana2Timestamp"}, "value": data_source},
        "processing_pipeline": pipelines,
        "data_serializer": {
            "type": "HDF5BinarySerializer",
            "fields": {"time": "/time", ("value" if pipelines is BATCHES else "value_samples"): "/value"},
            "compression": "bitshuffle_with_lz4",
        },
        "data_handlers": [{"type": "BinaryFileWritingDataHandler", "write_directory": str(folder)}],
    }
    engine = Engine(from_mapping(configuration, origin="test"), rank=rank, size=size)
    engine.open()
    engine.run()
    paths = sorted(folder.glob(f"r{rank}_*.h5"), key=lambda one: int(one.stem.partition("_")[2]))
    return [decode(one.read_bytes(), name=one.name) for one in paths]


def batches(path: Path, folder: Path, data_source: dict[str, Any], pipelines: Any = BATCHES) -> Iterator[Batch]:
    """The messages of two ranks."""
    for rank in (0, 1):
        yield from streamed(path, folder, data_source, pipelines=pipelines, rank=rank, size=2)


def psanas_own(path: Path, name: str, read: Callable[[Any, Any], Any]) -> dict[int, Any]:
    """Time in nanoseconds to value, as psana gives it."""
    run = next(_psana.psana2().DataSource(files=[str(path)], skip_calib_load="all").runs())
    detector = run.Detector(name)
    found = {timestamp_ns(event.timestamp): read(detector, event) for event in run.events()}
    return {stamp: None if value is None else np.array(value) for stamp, value in found.items()}


def test_the_real_jungfrau_frames_arrive_bit_by_bit(real_run: Callable[[str], Path], tmp_path: Path) -> None:
    path = real_run("mfx101332224-r0007-jungfrau05M.xtc2")
    own = psanas_own(path, "jungfrau", lambda detector, event: detector.raw.raw(event))
    source = {
        "type": "Psana2DetectorInterface",
        "psana_name": "jungfrau",
        "psana_fields": "raw.raw",
        "dtype": "native",
    }
    seen = {}
    for batch in batches(path, tmp_path, source):
        assert batch["/value"].dtype == np.uint16
        seen |= dict(zip(batch["/time_ns"].tolist(), batch["/value"], strict=True))
    assert len(own) == 2
    assert any((image >> 14).any() for image in own.values()), "pixels of this run have gain bits"
    assert sorted(seen) == sorted(own)
    for stamp, image in own.items():
        assert np.array_equal(seen[stamp], image)


def test_the_real_digitizer_waveforms_arrive_bit_by_bit(real_run: Callable[[str], Path], tmp_path: Path) -> None:
    path = real_run("tmolv9418-r0175-hsd.xtc2")
    own = psanas_own(path, "hsd", lambda detector, event: detector.raw.waveforms(event)[0][0])
    pipelines = [
        {"type": "FexPipeline", "data_source": "value", "form": "waveform"},
        {"type": "BatchProcessingPipeline", "batch_size": 4},
    ]
    seen = {}
    for batch in batches(path, tmp_path, {"type": "Psana2Waveforms", "psana_name": "hsd"}, pipelines):
        offsets = batch["/value_offsets"]
        for number, stamp in enumerate(batch["/time_ns"].tolist()):
            seen[stamp] = batch["/value"][offsets[number] : offsets[number + 1]]
    assert len(own) == 10
    assert sorted(seen) == sorted(own)
    for stamp, waveform in own.items():
        assert waveform.shape == (130_720,)
        assert np.array_equal(seen[stamp], waveform)


def test_the_real_time_tool_images_arrive_and_those_that_are_not_there_are_marked(
    real_run: Callable[[str], Path], tmp_path: Path
) -> None:
    path = real_run("timetool.xtc2")
    own = psanas_own(path, "tmott", lambda detector, event: detector.ttalg.image(event))
    source = {
        "type": "Psana2DetectorInterface",
        "psana_name": "tmott",
        "psana_fields": "ttalg.image",
        "dtype": "native",
    }
    seen: dict[int, Any] = {}
    for batch in batches(path, tmp_path, source):
        stamps = batch["/time_ns"].tolist()
        if "/value" not in batch:
            seen |= dict.fromkeys(stamps)
            continue
        missing = batch["/value_missing"] if "/value_missing" in batch else np.zeros(len(stamps), bool)
        for stamp, image, none in zip(stamps, batch["/value"], missing, strict=True):
            seen[stamp] = None if none else image
    assert len(own) == 1325
    assert sorted(seen) == sorted(own)
    assert 0 < sum(image is None for image in own.values()) < len(own)
    for stamp, image in own.items():
        assert (seen[stamp] is None) == (image is None)
        if image is not None:
            assert seen[stamp].dtype == image.dtype
            assert np.array_equal(seen[stamp], image)
