"""How the services bear a crowd, and how soon they are back: ``python benchmarks/services.py --only jobs-local``.

``transfers``
    That many requests at the same moment (100), each for a stream of its own from an internal source, with real
    buffers, engines and consumers. The times are those of the POST; `ok` counts the transfers that ended `done` with
    every message received.
``jobs-local``
    That many jobs (1000) from 16 clients, as processes of this machine. The times are those of the POST; `ok` counts
    the jobs whose history is complete and in order. A second row is the state lag: how long after a job began or ended
    that stood in its history; `ok` counts those within 2 s.
``jobs-slurm``
    The same with 200 jobs of a real Slurm of one node, which is started here (needs root).
``restart``
    That many ended jobs and transfers (1000), a tenth of the transfers still to be looked after: the time from the
    start of each service to its first answer, several times; `ok` counts those within 2 s.

`leaked` counts what was left behind: leased ports, listening sockets, jobs that have not ended, processes, files, and
descriptors the services have open. Prints a table for people and, with ``--json FILE``, the same for programs. Ends
with 1 when something failed or was left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from slurm_site import NoSlurmError, Slurm
from stopping import stop_on_signals
from transfer_site import Consumer, Site, discard, engine_config, scratch, wait_until

from lclstream.api.client import TransferClient
from lclstream.api.config import ApiConfig
from lclstream.api.models import TransferPhase
from lclstream.api.states import Event, State
from lclstream.api.store import Order, Role, Store
from lclstream.jobs.client import JobClient
from lclstream.jobs.models import JobSpec, JobState, ResourceSpec, Transition
from lclstream.security.errors import PeerError
from lclstream.security.identity import Identity

#: What a state may lag behind the scheduler's, and what a restart may take, in milliseconds.
WITHIN_MS = 2000.0
CASES = {"transfers": 100, "jobs-local": 1000, "jobs-slurm": 200, "restart": 1000}
QUICK = {"transfers": 10, "jobs-local": 60, "jobs-slurm": 20, "restart": 200}
#: Clients that submit jobs at the same time.
CLIENTS = 16
EVENTS, BATCH = 20, 2
#: Idle connections that a service's HTTP client keeps to another service.
KEPT = 20
RESTARTS = 5
#: Seconds within which everything must have ended.
END_S = 900.0
_COMPLETE = [JobState.new, JobState.queued, JobState.active, JobState.completed]
_STATE_LOGGED = re.compile(r"^(\S+ \S+) INFO \S+: job (\S+): attempt (\d+) (active|completed|failed|canceled)\b")


@dataclass(frozen=True)
class Row:
    """One line of the table; times in milliseconds.

    Attributes:
        case: what was done.
        n: how often.
        ok: how often it went well.
        p50_ms: median.
        p99_ms: 99th percentile, or the longest of fewer than 100.
        leaked: what was left behind.
    """

    case: str
    n: int
    ok: int
    p50_ms: float
    p99_ms: float
    leaked: int


def _row(case: str, times_s: list[float], ok: int, leaked: int) -> Row:
    times = sorted(1000 * seconds for seconds in times_s) or [0.0]
    last = times[min(len(times) - 1, int(0.99 * len(times)))]
    return Row(case, len(times_s), ok, round(statistics.median(times), 1), round(last, 1), leaked)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    answer = call()
    return time.monotonic() - began, answer


def _left(site: Site, descriptors: tuple[int, int]) -> int:
    """What is left when everything has ended, with the files the services have open more than before."""

    def open_more() -> int:
        now = (site.api_service.descriptors, site.jobs_service.descriptors)
        return sum(max(0, after - before - KEPT) for after, before in zip(now, descriptors, strict=True))

    def count() -> int:
        ports = site.database.leased_ports() + site.listening_ports()
        return ports + site.living_jobs() + len(site.job_processes()) + len(site.left_files()) + open_more()

    # A connection between the services is closed half a minute after its last request.
    deadline = time.monotonic() + 45
    while (left := count()) and time.monotonic() < deadline:
        time.sleep(0.5)
    if left:
        print(
            f"left: {site.database.leased_ports()} leased ports, {site.listening_ports()} listening, "
            f"{site.living_jobs()} jobs, {len(site.job_processes())} processes, {site.left_files()}, "
            f"{open_more()} descriptors",
            file=sys.stderr,
        )
    return left


def transfers(count: int, folder: Path) -> Iterator[Row]:
    """That many requests at the same moment."""
    with Site(folder, ports=3 * count + 6) as site, ExitStack() as stack:
        people = [site.authority.member(f"user{number}") for number in range(count)]
        clients = [stack.enter_context(TransferClient(site.url, who, timeout=120)) for who in people]
        # Each has a connection, as a client that follows transfers has.
        for client in clients:
            client.list(limit=1)
        descriptors = (site.api_service.descriptors - count, site.jobs_service.descriptors)
        with ThreadPoolExecutor(count) as threads:
            asked = list(
                threads.map(
                    lambda client: _timed(lambda: client.request(engine_config(EVENTS, batch_size=BATCH), ranks=1)),
                    clients,
                )
            )
            done = list(threads.map(_to_the_end, clients, [status for _, status in asked]))
        for client in clients:
            client.close()
        yield _row(
            "transfers: POST", [seconds for seconds, _ in asked], sum(ok for _, ok in done), _left(site, descriptors)
        )
        yield _row("transfers: to released", [seconds for seconds, _ in done], sum(ok for _, ok in done), 0)


def _to_the_end(client: TransferClient, status: Any) -> tuple[float, bool]:
    """Pull a transfer's messages and follow it to its end; seconds, and whether all went well."""
    began = time.monotonic()
    deadline = began + END_S
    consumer = None
    while time.monotonic() < deadline:
        info = client.info(status.id)
        if consumer is None and info.phase.pullable:
            consumer = Consumer(info.url)
        if info.released:
            came = 0 if consumer is None else consumer.end()
            well = info.phase is TransferPhase.done and came == EVENTS // BATCH
            if not well:
                print(f"transfer {status.id}: {info.phase}: {info.info}; {came} messages", file=sys.stderr)
            return time.monotonic() - began, well
        time.sleep(0.5)
    print(f"transfer {status.id} has not ended", file=sys.stderr)
    return time.monotonic() - began, False


def jobs_local(count: int, folder: Path) -> Iterator[Row]:
    """That many jobs as processes of this machine."""
    with Site(folder, ports=6) as site:
        yield from _jobs("jobs-local", site, count)


def jobs_slurm(count: int, folder: Path) -> Iterator[Row]:
    """That many jobs of a Slurm that is started here."""
    with Slurm() as cluster:
        os.environ["SLURM_CONF"] = str(cluster.configuration)
        try:
            backends = {"default": {"type": "slurm", "poll_s": 0.5}}
            with Site(folder, ports=6, backends=backends) as site:
                yield from _jobs("jobs-slurm", site, count)
        finally:
            del os.environ["SLURM_CONF"]


def _jobs(case: str, site: Site, count: int) -> Iterator[Row]:
    spec = JobSpec(script="true", resources=ResourceSpec(duration=5, exclusive_node_use=False))
    descriptors = (site.api_service.descriptors, site.jobs_service.descriptors)
    with ExitStack() as stack:
        who = site.authority.member("alice")
        clients = [stack.enter_context(JobClient(site.jobs_url, who, timeout=120)) for _ in range(CLIENTS)]
        for client in clients:
            client.backends()
        with ThreadPoolExecutor(CLIENTS) as threads:
            submitted = list(
                threads.map(lambda number: _timed(lambda: clients[number % CLIENTS].submit(spec)), range(count))
            )
        jobids = [jobid for _, jobid in submitted]
        wait_until(lambda: not _living(clients[0]), END_S, "end of all jobs")
        histories = {jobid: clients[0].history(jobid) for jobid in jobids}
    ok = sum(_is_complete(history) for history in histories.values())
    lags = _lags(site.jobs_service.log, histories)
    yield _row(f"{case}: POST", [seconds for seconds, _ in submitted], ok, _left(site, descriptors))
    yield _row(f"{case}: state lag", lags, sum(1000 * lag <= WITHIN_MS for lag in lags), 0)


def _living(client: JobClient) -> int:
    time.sleep(0.5)
    try:
        return sum(len(client.list(state=state)) for state in (JobState.new, JobState.queued, JobState.active))
    except PeerError as error:
        print(error, file=sys.stderr)
        return -1


def _is_complete(history: list[Transition]) -> bool:
    times = [line.time for line in history]
    return [line.state for line in history] == _COMPLETE and times == sorted(times)


def _lags(log: Path, histories: dict[str, list[Transition]]) -> list[float]:
    """Seconds from the moment a job began or ended to the moment its history had it, which the service logs."""
    happened = {(jobid, line.state.value): line.time for jobid, history in histories.items() for line in history}
    lags = []
    for text in log.read_text(errors="replace").splitlines():
        match = _STATE_LOGGED.match(text)
        if match and (match[2], match[4]) in happened:
            written = datetime.strptime(match[1], "%Y-%m-%d %H:%M:%S,%f").timestamp()
            lags.append(max(0.0, written - happened[match[2], match[4]]))
    return lags


def restart(count: int, folder: Path) -> Iterator[Row]:
    """The start of services that have that much to remember."""
    with Site(folder, ports=30) as site:
        _remember_jobs(site, count)
        site.api_service.stop()
        _remember_transfers(site, count)
        for name, service, call in (
            ("jobs", site.jobs_service, lambda: site.jobs.list(limit=1)),
            ("transfers", site.api_service, lambda: site.client.list(limit=1)),
        ):
            times = []
            for _ in range(RESTARTS):
                if service.process is not None and service.process.poll() is None:
                    service.stop()
                times.append(_timed(lambda service=service, call=call: _until_answer(service, call))[0])
            ok = sum(1000 * seconds <= WITHIN_MS for seconds in times)
            yield _row(f"restart: {name}", times, ok, 0)
        began = time.monotonic()
        unreleased = "SELECT count(*) FROM transfers WHERE NOT released"
        wait_until(lambda: site.database.rows(unreleased) == [(0,)], END_S, "release of all transfers")
        print(f"all looked after {time.monotonic() - began:.1f} s after the last answer", file=sys.stderr)


def _until_answer(service: Any, call: Callable[[], object]) -> None:
    service.start()
    while True:
        try:
            call()
            return
        except PeerError:
            time.sleep(0.01)


def _remember_jobs(site: Site, count: int) -> None:
    """Ended jobs: folders are what the service reads at its start, whoever wrote them."""
    spec = JobSpec(name="remembered", script="true")
    with ThreadPoolExecutor(CLIENTS) as threads:
        jobids = list(threads.map(lambda _: site.jobs.create(spec), range(count)))
        list(threads.map(site.jobs.cancel, jobids))
    wait_until(lambda: not _living(site.jobs), END_S, "end of all jobs")


def _remember_transfers(site: Site, count: int) -> None:
    """Transfers in the stopped service's database: nine of ten ended, the others with jobs that have gone meanwhile."""
    config = ApiConfig.model_validate(site.api_config)
    store = Store(config.database, config.limit_s)
    owner = Identity(login="alice", issuer="", subject="", serial="")
    wide = config.ports.model_copy(update={"first": 1024, "last": 65535})
    ended = iter([job.jobid for job in site.jobs.list()])
    try:
        for number in range(count):
            order = Order(
                owner=owner, name=f"n{number}", ranks=1, producers=1, buffers=1, lease_s=None, key=None, request={},
                config=lambda inputs: engine_config(EVENTS),
            )  # fmt: skip
            row, _ = store.create(order, wide)
            for effect in store.effects(row.id):
                store.effect_done(effect.id)
            for role in (Role.buffer, Role.engine):
                job = store.plan_job(row.id, role, 0, f"{role}-{number}", {"script": "true", "cb_secret": "x"})
                assert job is not None
                store.job_created(
                    job.id, next(ended) if number % 10 == 0 and role is Role.buffer else f"1.{number:03d}"
                )
                store.job_started(job.id)
                history = [(1, JobState.queued), (1, JobState.active)]
                store.record(job.id, [Transition(time=1.0, jobndx=n, state=state) for n, state in history])
            if number % 10:
                _end(store, row.id)
    finally:
        store.close()


def _end(store: Store, number: int) -> None:
    store.happen(number, Event.cancel, "remembered")
    assert State(store.get(number).state).final  # type: ignore[union-attr]
    store.release(number)


RUNNERS: dict[str, Callable[[int, Path], Iterator[Row]]] = {
    "transfers": transfers,
    "jobs-local": jobs_local,
    "jobs-slurm": jobs_slurm,
    "restart": restart,
}


@contextmanager
def _folder(keep: Path | None, case: str) -> Iterator[Path]:
    if keep is not None:
        where = keep.absolute() / case
        where.mkdir(parents=True)
        yield where
        print(f"{case}: kept in {where}", file=sys.stderr)
        return
    where = scratch("lclstream-services-")
    try:
        yield where
    finally:
        discard(where)


def main() -> int:
    """Read options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append", help="only this; may be given again")
    parser.add_argument("--jobs", type=int, metavar="N", help=f"how many (default {CASES})")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave job folders, logs and database there")
    parser.add_argument("--quick", action="store_true", help=f"fewer: {QUICK}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same for programs")
    options = parser.parse_args()
    rows: list[Row] = []
    form = "{:<24} {:>6} {:>6} {:>10} {:>10} {:>7}"
    print(form.format("case", "n", "ok", "p50 ms", "p99 ms", "leaked"))
    for case in options.only or CASES:
        count = options.jobs or (QUICK if options.quick else CASES)[case]
        try:
            with _folder(options.keep, case) as folder:
                for row in RUNNERS[case](count, folder):
                    rows.append(row)
                    print(form.format(*asdict(row).values()), flush=True)
        except NoSlurmError as error:
            print(f"{case}: {error}", file=sys.stderr)
    if options.json is not None:
        machine = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
        document = {"machine": machine, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(any(row.leaked or row.ok < row.n for row in rows))


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(main())
