"""LCLS-I runs, with a small fake of psana1's interface: the real one comes from SLAC's conda channel only."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from lclstreamer import models
from lclstreamer.errors import ConfigurationError, SourceError
from lclstreamer.events import Event
from lclstreamer.sources.base import SourceContext
from lclstreamer.sources.psana1 import Psana1EventSource

VARIABLE = "SIOC:SYS0:ML00:AO192"


class EventId:
    def __init__(self, number: int) -> None:
        self.number = number

    def time(self) -> tuple[int, int]:
        return 1_400_000_000 + self.number, 5


class FakeEvent:
    def __init__(self, number: int) -> None:
        self.number = number

    def get(self, kind: type) -> EventId | None:
        return EventId(self.number) if kind is EventId else None


class Jungfrau:
    def calib(self, event: FakeEvent) -> np.ndarray[Any, Any] | None:
        return None if event.number == 3 else np.full((1, 4, 6), event.number, np.float32)

    def shape(self) -> tuple[int, int]:
        return 4, 6


class Evr:
    def eventCodes(self, event: FakeEvent) -> list[int]:  # noqa: N802 - psana's name
        return [40, 140, event.number]


class FakeSource:
    opened: str

    def __init__(self, identifier: str) -> None:
        if "exp=gone" in identifier:
            raise RuntimeError("no such run")
        FakeSource.opened = identifier

    def events(self) -> Iterator[FakeEvent]:
        return (FakeEvent(number) for number in range(11))


def _detector(name: str) -> Any:
    found = {"Jungfrau1M": Jungfrau(), "evr0": Evr(), VARIABLE: lambda event: 1.3}
    if name not in found:
        raise KeyError(name)
    return found[name]


@pytest.fixture(autouse=True)
def fake_psana(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("psana")
    module.DataSource = FakeSource  # type: ignore[attr-defined]
    module.Detector = _detector  # type: ignore[attr-defined]
    module.EventId = EventId  # type: ignore[attr-defined]
    module.DetNames = lambda: [("CxiDs1.0:Jungfrau.0", "Jungfrau1M", ""), ("NoDetector.0:Evr.0", "evr0", "")]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "psana", module)
    return module


def detector(name: str, fields: Any = None, **options: Any) -> models.Psana1DetectorInterface:
    return models.Psana1DetectorInterface(
        type="Psana1DetectorInterface", psana_name=name, psana_fields=fields, **options
    )


def read(
    sources: dict[str, Any], identifier: str = "exp=xpptut15:run=430", rank: int = 0, size: int = 1, limit: Any = None
) -> list[Event]:
    source = Psana1EventSource(
        models.Psana1EventSource(type="Psana1EventSource"), SourceContext(identifier, sources, rank, size, limit)
    )
    source.open()
    return list(source.events())


def test_detectors_variables_codes_and_times_are_read() -> None:
    events = read(
        {
            "time": models.Psana1Timestamp(type="Psana1Timestamp"),
            "image": detector("Jungfrau1M", "calib"),
            "native": detector("Jungfrau1M", "calib", dtype="native"),
            "shape": detector("Jungfrau1M", "shape", dtype="int32"),
            "codes": detector("evr0", "eventCodes"),
            "wavelength": detector(VARIABLE),
        }
    )
    assert FakeSource.opened == "exp=xpptut15:run=430:smd"
    assert len(events) == 11
    values = events[5].values
    assert (values["image"].dtype, values["native"].dtype) == (np.float64, np.float32)
    assert values["image"][0, 0, 0] == 5
    assert values["shape"].tolist() == [4, 6]
    assert (values["codes"].shape, values["codes"].dtype) == ((256,), np.int64)
    assert values["codes"][:4].tolist() == [40, 140, 5, 0]
    assert float(values["wavelength"]) == 1.3
    assert float(values["time"]) == pytest.approx(1_400_000_005)
    assert events[5].timestamp_ns == 1_400_000_005_000_000_005
    assert events[3].values["image"] is None
    assert (events[0].run.experiment, events[0].run.run) == ("xpptut15", 430)


@pytest.mark.parametrize(("size", "limit"), [(3, None), (4, 6)])
def test_ranks_together_read_every_event_once(size: int, limit: int | None) -> None:
    found = [event.index for rank in range(size) for event in read({}, rank=rank, size=size, limit=limit)]
    assert sorted(found) == list(range(limit or 11))


def test_the_server_of_shared_memory_divides_the_events() -> None:
    assert len(read({}, "shmem=psana.0:stop=no", rank=1, size=2)) == 11
    assert len(read({}, "shmem=psana.0:stop=no", rank=1, size=2, limit=5)) == 2


def test_a_detector_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(
        SourceError, match=r"data_sources.x.psana_name: 'Jungfrau' is not in .*Jungfrau1M.* did you mean"
    ):
        read({"x": detector("Jungfrau", "calib")})


def test_a_field_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(SourceError, match="Jungfrau1M has no 'clib'; it has calib, shape; did you mean calib"):
        read({"x": detector("Jungfrau1M", "clib")})


def test_a_run_that_cannot_be_opened_is_named() -> None:
    with pytest.raises(SourceError, match="exp=gone:run=1 cannot be opened: no such run"):
        read({}, "exp=gone:run=1")


def test_psana_of_lcls_2_is_recognised(fake_psana: types.ModuleType) -> None:
    del fake_psana.EventId
    with pytest.raises(ConfigurationError, match="the installed psana is that of LCLS-II"):
        read({})


def test_without_psana_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psana", None)
    with pytest.raises(ConfigurationError, match="conda install"):
        read({})
