"""The event source that reads LCLS-II runs with psana2.

`files=` and `exp=` are divided over the ranks by the number of the event: every rank knows all events and reads its
own. `exp=` with ``division: psana`` and more than two ranks leaves the division to psana. `shmem=` and `drp=` are
divided by the server they come from.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lclstreamer import identifiers
from lclstreamer.errors import SourceError
from lclstreamer.events import Event, RunInfo
from lclstreamer.sources import _psana, constants
from lclstreamer.sources.base import EventSource, Reader, SourceContext, make_data_sources
from lclstreamer.sources.psana2_data import timestamp_ns

#: Fields of detectors that are made with calibration constants.
_CALIBRATED = re.compile(r"calib|image|mask|pedestal|gain|common_mode|pixel_|geo(?!txt_default)")


class Psana2EventSource(EventSource):
    """Events of LCLS-II runs.

    Attributes:
        run: psana's run object, after :meth:`open`.
    """

    def __init__(self, parameters: Any, context: SourceContext) -> None:
        super().__init__(parameters, context)
        self.identifier = identifiers.parse_psana2(context.source_identifier)
        self._data_source: Any = None
        self._runs: Iterator[Any] = iter(())
        self.run: Any = None

    def open(self) -> None:
        """Open the first run and its detectors.

        Raises:
            SourceError: no file, no run, or a detector or field that is not there.
        """
        self.identifier = _whole(self.identifier)
        self._data_sources = self._make()
        self.run = self._next_run()
        if self.run is None:
            raise SourceError(f"{self.context.source_identifier}: there is no run in these data")
        self._read = self._reader(self.run)

    def events(self) -> Iterator[Event]:
        """This rank's events of all runs, one run after the other."""
        total = self._total()
        start = 0
        while True:
            info = RunInfo(str(self.run.expt or ""), int(self.run.runnum or 0))
            for index, event in self._numbered(start, total):
                stamp = event.timestamp
                yield Event(self._read(event), index, info, timestamp_ns(stamp))
            start = self._next_index
            if total is not None and start >= total:
                return
            self.run = self._next_run()
            if self.run is None:
                return
            self._read = self._reader(self.run)

    def _total(self) -> int | None:
        """How many events may be given over all ranks, `None` for all there are."""
        limits = (self.context.limit, self.identifier.max_events)
        return min((limit for limit in limits if limit is not None), default=None)

    def close(self) -> None:
        """Close files."""
        self._data_source = self.run = self._read = None  # type: ignore[assignment]
        self._runs = self._data_sources = iter(())

    @classmethod
    def plan(cls, parameters: Any, context: SourceContext) -> str:
        """What this rank would read; looks for the files of `files=`."""
        identifier = identifiers.parse_psana2(context.source_identifier)
        if identifier.files is not None:
            whole = _whole(identifier)
            paths = identifier.paths()
            if whole.exp is not None:
                return f"reads {super().plan(parameters, context)} of the {len(paths)} streams in {whole.dir}"
            return f"reads {super().plan(parameters, context)} of {', '.join(map(str, paths))}"
        return f"reads {super().plan(parameters, context)} of {context.source_identifier}"

    # ------------------------------------------------------------------------------------------------------ opening

    def _make(self) -> Iterator[Any]:
        """Psana's data sources, one after the other: one a file, else a single one."""
        source = self.identifier
        by_psana = parallel_psana(self.parameters, source, self.context.size)
        if by_psana:
            _psana.divide_by_psana()
        psana = _psana.psana2()
        options: dict[str, Any] = {"log_level": "WARNING", "skip_calib_load": self._skipped_constants()}
        if source.files is not None:
            return (self._opened(psana.DataSource, files=[str(path)], **options) for path in source.paths())
        if source.exp is not None:
            return iter((self._experiment(psana, options, by_psana),))
        if source.shmem is None:
            return iter((self._opened(psana.DataSource, drp=source.drp, **options),))
        if not _psana.await_monitor(source.shmem, _psana.MONITOR_S):
            raise SourceError(
                f"source_identifier: no monitoring server offers the shared memory {source.shmem!r} on this machine "
                f"since {_psana.MONITOR_S:g} s: run this beside the server, with the tag it was started with"
            )
        return iter((self._opened(psana.DataSource, shmem=source.shmem, **options),))

    def _opened(self, make: Any, **options: Any) -> Any:
        try:
            return make(**options)
        except (OSError, AssertionError, RuntimeError, SystemExit, AttributeError, StopIteration) as error:
            if "drp" in options:
                raise SourceError(
                    f"source_identifier: drp={options['drp']} cannot be opened: psana reads from the data acquisition "
                    f"only in a process that the data acquisition itself has started ({error})"
                ) from error
            if "shmem" in options:
                raise SourceError(f"source_identifier: shmem={options['shmem']} cannot be opened: {error}") from error
            what = options.get("files", [self.context.source_identifier])[0]
            # On a file that is no xtc2, psana 4.3 fails to log its own failure: the reason stands behind that error.
            reason = error.__context__ if isinstance(error, AttributeError) and error.__context__ else error
            raise SourceError(f"source_identifier: {what} cannot be opened as xtc2: {reason}") from error

    def _next_run(self) -> Any:
        """The next psana run of all data sources, `None` after the last."""
        while True:
            try:
                # psana says on stdout that a file has ended.
                with contextlib.redirect_stdout(io.StringIO()):
                    run = None if self._at_end() else next(self._runs, None)
            except OSError as error:
                raise SourceError(
                    f"{self.context.source_identifier}: the run cannot be opened: {error}. Where the calibration "
                    "database cannot be reached, set event_source.calibration to none or to a file with the constants"
                ) from error
            if run is not None:
                return run
            self._data_source = next(self._data_sources, None)
            if self._data_source is None:
                return None
            self._runs = iter(self._data_source.runs())
            self.run = None

    def _at_end(self) -> bool:
        """Whether the file of a run has nothing behind that run; psana would wait a second to find out."""
        if self.identifier.files is None or self.run is None:
            return False
        descriptor = self._data_source.dm.fds[0]
        return os.lseek(descriptor, 0, os.SEEK_CUR) >= os.fstat(descriptor).st_size

    def _experiment(self, psana: Any, options: dict[str, Any], by_psana: bool) -> Any:
        from psana.psexp.ds_base import DataSourceBase

        source = self.identifier
        options["exp"] = source.exp
        if source.run is not None:
            options["run"] = source.run
        if source.dir is not None:
            if not Path(source.dir).is_dir():
                raise SourceError(f"source_identifier: folder dir={source.dir} does not exist")
            options["dir"] = source.dir
        if by_psana:
            options["batch_size"] = 10  # larger ones leave most workers without events in short runs
            if (total := self._total()) is not None:
                options["max_events"] = total
        asks = self.parameters.use_logbook if self.parameters.use_logbook is not None else source.dir is None
        if asks:
            return self._opened(psana.DataSource, **options)
        # psana has no switch for the logbook; without an answer from it, psana looks in the folder.
        method = DataSourceBase._get_file_info_from_db  # noqa: SLF001
        DataSourceBase._get_file_info_from_db = lambda *_: {}  # noqa: SLF001
        try:
            made = self._opened(psana.DataSource, **options)
            made._get_file_info_from_db = lambda *_: {}  # noqa: SLF001 - for the runs opened later
            return made
        finally:
            DataSourceBase._get_file_info_from_db = method  # noqa: SLF001

    def _skipped_constants(self) -> Any:
        calibration = self.parameters.calibration
        if calibration == "database":
            return []
        if calibration != "auto":
            return "all"
        sections: list[Any] = [one for one in self.context.data_sources.values() if hasattr(one, "psana_name")]
        wanted = {
            section.psana_name
            for section in sections
            if any(_CALIBRATED.search(chain.rpartition(".")[2]) for chain in section.chains)
        }
        return "all" if not wanted else _AllBut(wanted)

    def _reader(self, run: Any) -> Reader:
        calibration = self.parameters.calibration
        if calibration not in ("auto", "none", "database"):
            found = constants.read(Path(calibration))
            run._calib_const = found  # noqa: SLF001 - psana's own prefetching does it this way
            run.dsparms.calibconst = found
        return Reader(make_data_sources(self.context, {"run": run}))

    # ------------------------------------------------------------------------------------------------------- events

    def _numbered(self, start: int, total: int | None) -> Iterator[tuple[int, Any]]:
        """This rank's psana events with their numbers; `_next_index` afterwards is the first number of the next run."""
        source, size = self.identifier, self.context.size
        self._next_index = start
        if source.exp is not None and size > 1 and not parallel_psana(self.parameters, source, size):
            yield from self._from_table(start, total)
            return
        left = None if total is None else max(0, total - start)
        if source.files is None and size > 1:
            yield from self._divided_elsewhere(start, left)
            return
        for number, event in enumerate(islice(self.run.events(), left)):
            index = start + number
            self._next_index = index + 1
            if self.mine(index):
                yield index, event

    def _divided_elsewhere(self, start: int, left: int | None) -> Iterator[tuple[int, Any]]:
        """All events this rank is given; their numbers are unique, not those of the run."""
        rank, size = self.context.rank, self.context.size
        if self.identifier.exp is not None:
            left = None  # psana was told the limit, and some of its ranks only organise
        elif left is not None:
            left = len(range(rank, left, size))
        for number, event in enumerate(islice(self.run.events(), left)):
            index = start + number * size + rank
            self._next_index = index + 1
            yield index, event

    def _from_table(self, start: int, total: int | None) -> Iterator[tuple[int, Any]]:
        with self.run.build_table() as filled:
            stamps = sorted(self.run._ts_table) if filled else []  # noqa: SLF001
        if total is not None:
            stamps = stamps[: max(0, total - start)]
        self._next_index = start + len(stamps)
        environment = _Environment(self.run)
        for number, stamp in enumerate(stamps):
            if self.mine(start + number):
                environment.go_to(stamp)
                yield start + number, self.run.event(stamp)


def _whole(identifier: identifiers.Psana2Identifier) -> identifiers.Psana2Identifier:
    if identifier.files is None:
        return identifier
    try:
        return identifier.whole_run()
    except (FileNotFoundError, ValueError) as error:
        raise SourceError(f"source_identifier: {error}") from None


class _Environment:
    """What a run knows of EPICS variables and scan steps, as far as it had come at a time.

    Where psana knows all of them beforehand, as after making its table of events, it gives an event the value that came
    *after* it.
    """

    def __init__(self, run: Any) -> None:
        self._coming: list[tuple[Any, deque[Any]]] = []
        for store in run.esm.stores.values():
            for manager in store.env_managers:
                self._coming.append((manager, deque(manager.dgrams)))
                manager.dgrams, manager._timestamps, manager.n_items = [], [], 0  # noqa: SLF001

    def go_to(self, stamp: int) -> None:
        """Know what had come at the time of an event; times only go forwards."""
        for manager, coming in self._coming:
            while coming and coming[0].timestamp() <= stamp:
                manager.add(coming.popleft())


class _AllBut:
    """What psana takes as `skip_calib_load`: everything except the detectors whose constants are needed."""

    def __init__(self, wanted: set[str]) -> None:
        self._wanted = wanted

    def __contains__(self, detector: object) -> bool:
        return detector not in self._wanted


def parallel_psana(parameters: Any, identifier: identifiers.Psana2Identifier, size: int) -> bool:
    """Whether psana divides the events over the ranks.

    Raises:
        SourceError: it should, but cannot.
    """
    if parameters.division != "psana" or size == 1:
        return False
    if identifier.exp is None or size < 3:
        raise SourceError(
            f"event_source.division: psana divides events only of exp= sources over at least 3 ranks (here: {size}); "
            "use `division: index`"
        )
    return True
