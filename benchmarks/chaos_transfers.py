"""Transfers among failures: services, buffers and engines are killed at every transition, and every end stays the same.

Each trial is one transfer with a real buffer and a real engine. In one of its transitions - as soon as the transfer
service's database shows it - one of its parts gets SIGKILL: the transfer service, the job service, both, the process of
the buffer or of the engine's rank, or the runner that follows one of these jobs. A killed service is started again. The
transfer must come to the end it would have had, or `failed` when what was killed carried its data, and must leave no
leased port, no listening socket, no job and no process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from transfer_site import Consumer, Site, Stored, discard, engine_config, kill_all, scratch

from lclstream.api.models import JobState, TransferInfo, TransferPhase
from lclstream.api.states import END, FINAL, INITIAL, LIVING, TABLE, Effect, Event, State
from lclstream.security.errors import PeerError

#: Messages of a transfer that is to be pulled to its end.
MESSAGES = 40
#: An engine that does not end by itself.
ENDLESS = 10**9
#: Seconds within which a transfer must have ended and left nothing, whatever happened to it.
STUCK_AFTER_S = 90.0
#: Seconds the processes of an ended job may take to go.
GONE_WITHIN_S = 60.0
SERVICES = ("api", "jobs", "both")
LATE_ENGINE = "#!/bin/sh\nmpiexec -n {ranks} lclstreamer --config {config} && sleep 3\n"
#: Stories in which somebody pulls.
PULLED = ("good", "late")
#: Seconds of the limits in trials that wait for one to pass.
SHORT_S = 1.0


@dataclass(frozen=True)
class Point:
    """Where a kill happens: as soon as the database shows this.

    Attributes:
        what: ``state``, ``effect`` (it is the next to be done), ``done`` (it has just been done), ``job`` (how far the
            asking for a job is) or ``request`` (the request is on its way).
        value: which one.
    """

    what: str
    value: str

    def is_shown(self, now: Stored, before: Stored | None) -> bool:
        """Whether the database shows it.

        Args:
            now: what it says.
            before: what it said when it was looked at before.
        """
        if self.what == "request":
            return True
        if self.what == "state":
            return now.state == self.value
        if self.what == "effect":
            return now.effects[:1] == (self.value,)
        if self.what == "done":
            return before is not None and self.value in before.effects and self.value not in now.effects
        role, _, progress = self.value.partition(" ")
        return now.jobs.get(role) == progress

    def __str__(self) -> str:
        return f"{self.what} {self.value}".strip()


@dataclass(frozen=True)
class Trial:
    """One transfer and one kill.

    Attributes:
        story: how the transfer would go: ``good``, ``late`` (the engine's job ends well after its last message),
            ``cancel``, ``lease``, ``limit``, ``engine fails``, ``spill``, or ``wait`` in a state until something is
            killed.
        at: the state in which the story's event happens; empty for those that need none.
        victim: ``api``, ``jobs``, ``both``, ``buffer``, ``engine``, ``buffer's runner`` or ``engine's runner``.
        point: when.
    """

    story: str
    at: str
    victim: str
    point: Point

    @property
    def ends(self) -> set[State]:
        """The ends the transfer may have."""
        if self.victim not in SERVICES:
            return {State.failed}
        return {
            "good": {State.done},
            "late": {State.done},
            "cancel": {State.canceled},
            "lease": {State.expired},
            "limit": {State.failed},
            "engine fails": {State.failed},
            "spill": {State.done},
        }[self.story]

    def __str__(self) -> str:
        story = f"{self.story} in {self.at}" if self.at else self.story
        return f"{story}: kill {self.victim} at {self.point}"


_ORDER = [state.value for state in State]
#: States that last as long as the news of a job's end takes: they are passed, not waited in, and only in some stories.
_PASSED = (State.emptied, State.keeping)


def _has_come(state: str, now: str) -> bool:
    """Whether a transfer has come to that state; a short one may be over before it is looked at."""
    return _ORDER.index(now) >= _ORDER.index(state)


def _points_of_end(state: State) -> list[Point]:
    """Everything that is done at an end, and the moments between."""
    effects = [Point("effect", effect.value) for effect in END]
    return [Point("state", state.value), *effects, Point("done", Effect.free_ports.value)]


def _points_of_life() -> list[Point]:
    """The states of a good transfer, the effects on its way, and what happens within these."""
    states = {answer.state for (state, _), answer in TABLE.items() if state in LIVING and answer.state in LIVING}
    points = [Point("request", ""), *(Point("state", state.value) for state in (INITIAL.state, *sorted(states)))]
    started = {*INITIAL.effects, *(effect for answer in TABLE.values() for effect in answer.effects)} - set(END)
    for effect in sorted(started):
        role = effect.value.removeprefix("start_")
        points += [Point("effect", effect.value), Point("done", effect.value)]
        points += [Point("job", f"{role} {progress}") for progress in ("planned", "created", "started")]
    return points


def trials() -> list[Trial]:
    """One trial for every transition and everything that is done in it, and each of those that may be killed then."""
    found = [
        Trial("good", "", victim, point)
        for point in [*_points_of_life(), *_points_of_end(State.done)]
        for victim in SERVICES
        if point.value not in _PASSED
    ]
    # Seldom shown otherwise: the buffer must have ended before the engine's job has.
    found += [Trial("late", "", victim, Point("state", State.emptied.value)) for victim in SERVICES]
    turns = itertools.cycle(SERVICES)
    stories = {Event.cancel: "cancel", Event.lease_expired: "lease"}
    for (state, event), answer in TABLE.items():
        if event in stories and state not in _PASSED:
            for point in _points_of_end(answer.state):
                found.append(Trial(stories[event], state.value, next(turns), point))
    for at in (State.producing, State.draining):
        found += [Trial("limit", at.value, next(turns), point) for point in _points_of_end(State.failed)]
    found += [Trial("engine fails", "", next(turns), point) for point in _points_of_end(State.failed)]
    found += [Trial("spill", "", victim, Point("state", State.keeping.value)) for victim in SERVICES]
    found += [Trial("spill", "", next(turns), point) for point in _points_of_end(State.done)]
    for victim, states in (
        ("buffer", ("ready", "producing", "draining")),
        ("buffer's runner", ("buffer_starting", "ready", "producing", "draining")),
        ("engine", ("producing",)),
        ("engine's runner", ("producing",)),
    ):
        found += [Trial("wait", at, victim, Point("state", at)) for at in states]
    return found


def quick_trials() -> list[Trial]:
    """One of each kind of kill."""
    return [
        Trial("good", "", "both", Point("job", "engine created")),
        Trial("cancel", "producing", "api", Point("effect", Effect.stop_buffer.value)),
        Trial("good", "", "jobs", Point("effect", Effect.collect.value)),
        Trial("wait", "producing", "buffer", Point("state", "producing")),
        Trial("wait", "producing", "engine", Point("state", "producing")),
        Trial("wait", "draining", "buffer's runner", Point("state", "draining")),
    ]


@dataclass
class Verdict:
    """What became of a trial; the counts are those of the result."""

    stuck: int = 0
    wrong_end: int = 0
    leaked_ports: int = 0
    leaked_jobs: int = 0
    reached: bool = True
    words: str = ""
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether something is wrong."""
        return bool(self.stuck or self.wrong_end or self.leaked_ports or self.leaked_jobs)


class Chaos:
    """Runs trials at one site, one after the other."""

    def __init__(self, site: Site, say: Callable[[str], None]) -> None:
        self.site = site
        self._say = say
        self._numbers = itertools.count(1)
        self._prefix = f"chaos-{random.getrandbits(32):08x}"
        self._changes: dict[str, Any] = {}

    def run(self, trial: Trial) -> Verdict:
        """One trial."""
        began = time.monotonic()
        key = f"{self._prefix}-{next(self._numbers)}"
        self._configure(trial)
        asking = threading.Thread(target=self._ask, args=(trial, key), daemon=True)
        asking.start()
        verdict = Verdict()
        number, consumer, killed = self._until_killed(trial, key, verdict)
        asking.join(STUCK_AFTER_S)
        if number is None:
            number = self.site.database.by_key(key)
        if number is None:
            verdict.stuck, verdict.words = 1, "the request was lost"
            return verdict
        if consumer is None and trial.story in PULLED:
            consumer = self._consumer(number)
        info = self._ended(number)
        if info is None:
            verdict.stuck = 1
            verdict.words = f"still {self.site.database.stored(number)}"
        else:
            self._judge(trial, info, consumer, killed, verdict)
        if consumer is not None:
            consumer.end(at_once=True)
        self._count_what_is_left(number, verdict)
        verdict.seconds = time.monotonic() - began
        if verdict.bad:
            self._clean_up(number)
        return verdict

    # The story

    def _configure(self, trial: Trial) -> None:
        changes: dict[str, Any] = {}
        if trial.story == "limit" or trial.story == "spill":
            # In a limited state before its own end, the transfer waits: in `draining` because nobody pulls.
            changes["limits_s"] = {trial.at or "draining": SHORT_S}
        if trial.story == "spill":
            changes["buffer"] = {**self.site.api_config["buffer"], "spill": str(self.site.folder / "spill")}
        if trial.story == "late":
            changes["engine"] = {"script": LATE_ENGINE}
        if changes != self._changes:
            self.site.api_service.stop()
            self.site.start_api(**changes)
            self.site.ready()
            self._changes = changes

    def _ask(self, trial: Trial, key: str) -> None:
        """Ask for the transfer until an answer comes: the service may be killed before it gives one."""
        # To drain, an engine must end; nobody pulls what it has made.
        waits = trial.story in ("cancel", "lease", "limit", "wait") and trial.at != "draining"
        config = engine_config(ENDLESS if waits else MESSAGES)
        if trial.story == "engine fails":
            config["event_source"] = {"type": "Psana2EventSource"}
            config["source_identifier"] = "files=/nowhere/none.xtc2"
        arguments: dict[str, Any] = {"ranks": 1, "idempotency_key": key}
        if trial.story == "spill":
            arguments["on_no_consumer"] = "spill"
        if trial.story == "lease":
            arguments["lease_s"] = 3600
        deadline = time.monotonic() + STUCK_AFTER_S
        while time.monotonic() < deadline:
            try:
                self.site.client.request(config, **arguments)
                return
            except PeerError as error:
                if not error.retry:
                    self._say(f"  {error}")
                    return
                time.sleep(0.05)

    def _until_killed(self, trial: Trial, key: str, verdict: Verdict) -> tuple[int | None, Consumer | None, list[str]]:
        """Follow the transfer in the database, play its story, and kill when the moment comes."""
        deadline = time.monotonic() + STUCK_AFTER_S
        number: int | None = None
        consumer: Consumer | None = None
        before: Stored | None = None
        told = False
        if trial.point.what == "request":
            # Somewhere in the handling of the request, which takes some ten milliseconds.
            time.sleep(random.uniform(0, 0.03))
            return None, None, self._kill(trial, None)
        while time.monotonic() < deadline:
            number = number or self.site.database.by_key(key)
            now = None if number is None else self.site.database.stored(number)
            if number is None or now is None:
                time.sleep(0.001)
                continue
            if trial.story in PULLED and consumer is None and now.state in ("ready", "producing", "draining"):
                consumer = self._consumer(number)
            if not told and trial.at and _has_come(trial.at, now.state):
                told = True
                self._tell(trial, number)
            if trial.point.is_shown(now, before) and (told or not trial.at):
                return number, consumer, self._kill(trial, number)
            if now.released:
                verdict.reached = False
                return number, consumer, []
            before = now
            time.sleep(0.0005)
        return number, consumer, []

    def _tell(self, trial: Trial, number: int) -> None:
        """What somebody else does in the state of the story."""
        if trial.story not in ("cancel", "lease"):
            return
        # In a thread: the service may be killed before it answers, and is asked again.
        threading.Thread(target=self._insist, args=(trial.story, number), daemon=True).start()

    def _insist(self, story: str, number: int) -> None:
        deadline = time.monotonic() + STUCK_AFTER_S
        while time.monotonic() < deadline:
            try:
                if story == "cancel":
                    self.site.client.cancel(number)
                else:
                    self.site.client.renew(number, 0.01)
                return
            except PeerError as error:
                if not error.retry:
                    return  # it has ended meanwhile
                time.sleep(0.05)

    def _consumer(self, number: int) -> Consumer:
        rows = self.site.database.rows("SELECT endpoints FROM transfers WHERE id = ?", number)
        return Consumer(json.loads(rows[0][0])[0]["output"])

    # The kill

    def _kill(self, trial: Trial, number: int | None) -> list[str]:
        """Kill, and start again what is a service; returns what was killed of the transfer's own processes."""
        site = self.site
        if trial.victim in SERVICES:
            services = [site.api_service, site.jobs_service]
            services = {"api": services[:1], "jobs": services[1:], "both": services}[trial.victim]
            for service in services:
                service.kill()
            time.sleep(random.choice((0, 0, 0.5)))
            for service in services:
                service.start()
            site.ready()
            return []
        assert number is not None
        role, _, runner = trial.victim.partition("'s ")
        killed: list[str] = []
        deadline = time.monotonic() + STUCK_AFTER_S
        while not killed and time.monotonic() < deadline:
            found = site.database.rows("SELECT jobid FROM jobs WHERE transfer = ? AND role = ?", number, role)
            processes = site.processes_of(found[0][0]) if found and found[0][0] else []
            program = {"buffer": "nngstream", "engine": "lclstreamer"}[role]
            wanted = "runner.py" if runner else program
            for process in processes:
                words = _words(process)
                # `mpiexec -n 1 lclstreamer` names the program as well, but later.
                if any(word.endswith(wanted) for word in words[: 4 if runner else 2]) and kill_all([process]):
                    killed.append(wanted)
                    break
        return killed

    # The judgement

    def _ended(self, number: int) -> TransferInfo | None:
        deadline = time.monotonic() + STUCK_AFTER_S
        while time.monotonic() < deadline:
            try:
                info = self.site.client.info(number)
            except PeerError:
                time.sleep(0.1)
                continue
            if info.released:
                return info
            time.sleep(0.05)
        return None

    def _judge(
        self, trial: Trial, info: TransferInfo, consumer: Consumer | None, killed: list[str], verdict: Verdict
    ) -> None:
        ends = set(trial.ends)
        if trial.victim not in SERVICES and not killed:
            verdict.reached = False
            ends = set(FINAL)
        if info.phase not in {state.phase for state in ends}:
            verdict.wrong_end, verdict.words = 1, f"{info.phase}: {info.info}"
            return
        if info.phase is TransferPhase.done and consumer is not None:
            came = consumer.end()
            if came != MESSAGES or info.metrics.sent != MESSAGES:
                verdict.wrong_end = 1
                verdict.words = f"{came} of {MESSAGES} messages came ({consumer.trouble}); {info.metrics}"
        for client in {entry.client for entry in info.log}:
            ended = [entry for entry in info.log if entry.client == client and JobState(entry.state).is_final]
            if len({entry.state for entry in ended}) > 1:
                verdict.wrong_end, verdict.words = 1, f"the log contradicts itself: {ended}"

    def _count_what_is_left(self, number: int, verdict: Verdict) -> None:
        site = self.site
        deadline = time.monotonic() + GONE_WITHIN_S
        # The end of a job is known to its service a moment after its processes have gone.
        while time.monotonic() < deadline and (
            site.job_processes() or site.listening_ports() or site.living_jobs() or site.database.leased_ports()
        ):
            time.sleep(0.1)
        verdict.leaked_ports = site.database.leased_ports() + site.listening_ports()
        processes = site.job_processes()
        verdict.leaked_jobs = site.living_jobs() + len(processes)
        if verdict.leaked_jobs or verdict.leaked_ports:
            left = [(job.jobid, job.name, job.state) for job in site.jobs.list() if not job.state.is_final]
            verdict.words += f" left: {left}, {[_words(one)[:4] for one in processes]}"

    def _clean_up(self, number: int) -> None:
        """What one trial left must not be blamed on the next."""
        with contextlib.suppress(PeerError):
            self.site.client.cancel(number)
        for job in self.site.jobs.list():
            if not job.state.is_final:
                self.site.jobs.cancel(job.jobid)
        time.sleep(5)
        kill_all(self.site.job_processes())


def _words(process: psutil.Process) -> list[str]:
    """Its command line; empty when it has ended."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def run(
    plan: Iterable[Trial],
    *,
    folder: Path | None = None,
    tries: int = 1,
    verbose: bool = True,
) -> dict[str, Any]:
    """Run these trials.

    Args:
        plan: the trials.
        folder: where everything lies; a temporary one when None.
        tries: how often a trial is begun whose moment passes before it is seen, as on a busy machine.
        verbose: whether the course is printed.

    Returns:
        ``{"trials", "leaked_ports", "leaked_jobs", "stuck", "wrong_end", …}``.
    """

    def say(text: str) -> None:
        if verbose:
            print(text, file=sys.stderr, flush=True)

    where = folder or scratch("lclstream-chaos-")
    verdicts: list[tuple[Trial, Verdict]] = []
    try:
        with Site(where, ports=30) as site:
            chaos = Chaos(site, say)
            for number, trial in enumerate(plan, 1):
                for _ in range(tries):
                    verdict = chaos.run(trial)
                    if verdict.reached or verdict.bad:
                        break
                verdicts.append((trial, verdict))
                outcome = "BAD: " + verdict.words if verdict.bad else "ok" if verdict.reached else "ok, not reached"
                say(f"{number:4d} {verdict.seconds:5.1f} s  {trial}: {outcome}")
            left_files = site.left_files()
    finally:
        if folder is None and not any(verdict.bad for _, verdict in verdicts):
            discard(where)
        elif folder is None:
            say(f"logs are in {where}")
    return {
        "trials": len(verdicts),
        "leaked_ports": sum(verdict.leaked_ports for _, verdict in verdicts),
        "leaked_jobs": sum(verdict.leaked_jobs for _, verdict in verdicts),
        "stuck": sum(verdict.stuck for _, verdict in verdicts),
        "wrong_end": sum(verdict.wrong_end for _, verdict in verdicts),
        "left_files": left_files,
        "not_reached": sum(not verdict.reached for _, verdict in verdicts),
        "killed": {
            victim: sum(trial.victim == victim and verdict.reached for trial, verdict in verdicts)
            for victim in dict.fromkeys(trial.victim for trial, _ in verdicts)
        },
        "bad": [f"{trial}: {verdict.words}" for trial, verdict in verdicts if verdict.bad],
    }


def planned(count: int, *, skip: int = 0) -> list[Trial]:
    """That many trials, in an order that mixes the kinds and is the same each time; all of them before any comes again.

    Args:
        count: how many.
        skip: how many of the order to leave out at its beginning.
    """
    every = trials()
    random.Random(0).shuffle(every)
    # Trials with a configuration of their own side by side: each change costs a restart of the transfer service.
    every.sort(key=lambda trial: trial.story in ("limit", "spill", "late"))
    return list(itertools.islice(itertools.cycle(every), skip, skip + count))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    known = len(trials())
    parser.add_argument("--trials", type=int, default=100, help=f"transfers (default 100; there are {known} kinds)")
    parser.add_argument(
        "--skip", type=int, default=0, help="kinds to leave out at the beginning, to go on where one was"
    )
    parser.add_argument("--quick", action="store_true", help="one of each kind of kill")


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run it as the options say."""
    plan = quick_trials() if arguments.quick else planned(arguments.trials, skip=arguments.skip)
    return run(plan)
