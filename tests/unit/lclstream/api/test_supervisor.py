"""The supervisor against jobs in memory: every end, lost news, unreachable services, and a crash at every step."""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from lclstream.api import launch
from lclstream.api.config import ApiConfig
from lclstream.api.models import JobState
from lclstream.api.states import Event, State
from lclstream.api.store import Order, Store
from lclstream.api.supervisor import Supervisor
from lclstream.security.errors import UnreachableError
from lclstream.security.identity import Identity

pytestmark = pytest.mark.asyncio

ALICE = Identity(login="alice", issuer="CN=s3df", subject="UID=alice", serial="1")


class Crash(BaseException):
    """The process was killed here."""


class Scene:
    """One transfer, the world, and the supervisor that is started and killed."""

    def __init__(self, world: Any, store: Store, config: ApiConfig, configuration: dict[str, Any]) -> None:
        self.world, self.store, self.config = world, store, config
        self.configuration = configuration
        self.number = 0
        self.crashed = asyncio.Event()

    def request(self, **changes: Any) -> int:
        order = Order(
            **{
                "owner": ALICE,
                "name": "",
                "ranks": 2,
                "producers": 2,
                "buffers": 1,
                "lease_s": None,
                "key": None,
                "request": self.configuration,
                "config": lambda inputs: launch.with_buffers(self.configuration, inputs, self.config),
                **changes,
            }
        )
        row, _ = self.store.create(order, self.config.ports)
        self.number = row.id
        return row.id

    def supervisor(self, store: Store | None = None) -> Supervisor:
        return Supervisor(store or self.store, self.world, self.config, self.world.reader)

    @property
    def state(self) -> State:
        row = self.store.get(self.number)
        assert row is not None
        return State(row.state)

    async def until(self, condition: Callable[[], object], what: str, timeout: float = 60) -> None:
        deadline = asyncio.get_running_loop().time() + timeout
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, f"no {what}: {self.state}, {self.world.jobs}"
            await asyncio.sleep(0.005)

    async def released(self) -> State:
        def is_released() -> bool:
            row = self.store.get(self.number)
            return row is not None and row.released

        await self.until(is_released, "release")
        return self.state

    def nothing_is_left(self) -> None:
        assert self.world.running() == []
        assert self.store.leased_ports() == {}
        assert self.store.effects(self.number) == []
        assert self.store.unreleased() == []

    def log(self) -> list[tuple[str, str, str]]:
        return [(entry.client, entry.state, entry.info) for entry in self.store.log(self.number)]


@pytest.fixture
def scene(world: Any, store: Store, settings: Callable[..., ApiConfig], configuration: dict[str, Any]) -> Scene:
    return Scene(world, store, settings(), configuration)


async def test_a_good_transfer_passes_all_states_and_leaves_nothing(scene: Scene) -> None:
    scene.request()
    async with scene.supervisor():
        assert await scene.released() is State.done
    scene.nothing_is_left()
    assert [(client, state) for client, state, _ in scene.log() if client == "consumer"] == [
        ("consumer", state) for state in ("new", "queued", "queued", "active", "active", "completed")
    ]
    assert [state for client, state, _ in scene.log() if client == "producer"] == [
        "new",
        "queued",
        "active",
        "completed",
    ]
    row = scene.store.get(scene.number)
    assert row is not None
    assert row.buffers[0] is not None
    assert row.buffers[0]["state"] == "done", "the buffer's own summary is kept"


async def test_the_engine_gets_its_configuration_and_starts_after_the_buffer_answers(scene: Scene) -> None:
    calls: list[str] = []
    scene.world.hook = lambda name, when: calls.append(name) if when == "after" or name == "read" else None
    scene.request()
    async with scene.supervisor():
        await scene.released()
    (engine,) = scene.world.of("engine")
    assert b"tcp://127.0.0.1" in engine["files"][launch.CONFIG_FILE]
    starts = [number for number, name in enumerate(calls) if name == "start"]
    assert "read" in calls[starts[0] : starts[1]], "the status was asked between the two starts"


async def test_a_failed_engine_says_why_and_stops_the_buffer(scene: Scene) -> None:
    scene.world.engine_fails = True
    scene.request()
    async with scene.supervisor():
        assert await scene.released() is State.failed
    scene.nothing_is_left()
    row = scene.store.get(scene.number)
    assert row is not None
    assert "exit status 9" in row.info
    assert "rank 1 was killed" in row.info, "the line of its stderr that tells"
    assert ("producer", "failed", "rank 1 was killed\nsignal 9 in transfer-1-engine") in scene.log()


async def test_a_refused_job_ends_the_transfer_with_the_services_words(scene: Scene) -> None:
    scene.world.refuse_engine = True
    scene.request()
    async with scene.supervisor():
        assert await scene.released() is State.failed
    scene.nothing_is_left()
    row = scene.store.get(scene.number)
    assert row is not None
    assert "attribute --nodes is not allowed" in row.info


@pytest.mark.parametrize("what", ["buffer", "engine"])
async def test_a_job_cancelled_by_somebody_else_fails_the_transfer(scene: Scene, what: str) -> None:
    scene.world.engine_waits = True
    scene.request()
    async with scene.supervisor():
        await scene.until(lambda: scene.state is State.producing, "producing")
        (job,) = scene.world.of(what)
        scene.world.reach(job, JobState.canceled)
        assert await scene.released() is State.failed
    scene.nothing_is_left()
    row = scene.store.get(scene.number)
    assert row is not None
    assert f"the {what} job" in row.info
    assert "was cancelled at the job service" in row.info


async def test_a_job_the_service_has_forgotten_fails_the_transfer(scene: Scene) -> None:
    scene.world.engine_waits = True
    scene.request()
    async with scene.supervisor():
        await scene.until(lambda: scene.state is State.producing, "producing")
        for jobid in [jobid for jobid, job in scene.world.jobs.items() if job in scene.world.of("engine")]:
            del scene.world.jobs[jobid]
        assert await scene.released() is State.failed
    scene.nothing_is_left()


@pytest.mark.parametrize("answer", ["none", "503", "403"])
async def test_a_job_service_that_does_not_tell_is_not_taken_for_an_end(scene: Scene, answer: str) -> None:
    from lclstream.security.errors import ServiceError

    def troubled(name: str, when: str) -> None:
        if answer != "none" and name == "history":
            raise ServiceError("the job service is in trouble", status=int(answer), detail="in trouble")

    scene.world.engine_waits = True
    scene.request()
    async with scene.supervisor():
        await scene.until(lambda: scene.state is State.producing, "producing")
        scene.world.away = answer == "none"
        scene.world.hook = troubled
        await asyncio.sleep(0.3)
        assert scene.state is State.producing
        scene.world.away = scene.world.engine_waits = False
        scene.world.hook = lambda name, when: None
        assert await scene.released() is State.done
    scene.nothing_is_left()


async def test_ports_stay_leased_until_the_jobs_have_really_ended(scene: Scene) -> None:
    scene.world.engine_waits = True
    number = scene.request()
    async with scene.supervisor() as supervisor:
        await scene.until(lambda: scene.state is State.producing, "producing")
        scene.world.away = True
        scene.store.happen(number, Event.cancel, "cancelled")
        supervisor.wake(number)
        await asyncio.sleep(0.2)
        assert scene.state is State.canceled
        assert len(scene.store.leased_ports()) == 3
        scene.world.away = False
        await scene.released()
    scene.nothing_is_left()


async def test_a_lease_that_is_not_renewed_ends_the_transfer(scene: Scene) -> None:
    scene.world.engine_waits = True
    now = scene.store.clock()
    scene.store.clock = lambda: now
    number = scene.request(lease_s=100)
    async with scene.supervisor() as supervisor:
        await scene.until(lambda: scene.state is State.producing, "producing")
        now += 90
        scene.store.renew(number, 100)
        now += 90
        supervisor.wake(number)
        await asyncio.sleep(0.2)
        assert scene.state is State.producing, "it was renewed"
        now += 20
        supervisor.wake(number)
        assert await scene.released() is State.expired
    scene.nothing_is_left()


class Outage:
    """The database, which can be away; and a clock that is put on."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.away = False
        self.refused: list[str] = []
        self.now = scene.store.clock()
        scene.store.clock = lambda: self.now

    def __getattr__(self, name: str) -> Any:
        real = getattr(self.scene.store, name)
        if name == "clock":
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.away:
                self.refused.append(name)
                raise OperationalError(name, None, ConnectionError("the database is away"))
            return real(*args, **kwargs)

        return call

    def moments(self) -> tuple[float | None, float | None]:
        row = self.scene.store.get(self.scene.number)
        assert row is not None
        return row.deadline, row.lease_expires


async def test_what_the_jobs_did_while_the_service_was_away_counts_and_not_the_time(scene: Scene) -> None:
    outage = Outage(scene)
    scene.world.buffer_waits = True
    scene.request()
    async with scene.supervisor():
        await scene.until(lambda: scene.state is State.draining, "draining")
    outage.now += 900
    for job in scene.world.of("buffer"):
        scene.world.reach(job, JobState.completed, "0")
    async with scene.supervisor():
        assert await scene.released() is State.done
    scene.nothing_is_left()


async def test_a_buffer_that_drains_has_its_time_after_an_absence(scene: Scene) -> None:
    outage = Outage(scene)
    scene.world.buffer_waits = True
    number = scene.request()
    async with scene.supervisor() as supervisor:
        await scene.until(lambda: scene.state is State.draining, "draining")
        before, _ = outage.moments()
    outage.now += 900
    reads: list[str] = []
    scene.world.hook = lambda name, when: reads.append(name) if name == "read" else None
    async with scene.supervisor() as supervisor:
        await scene.until(lambda: len(reads) > 3, "rounds of the driver")
        assert scene.state is State.draining
        after, _ = outage.moments()
        assert before is not None
        assert after == before + 900
        outage.now = after
        supervisor.wake(number)
        assert await scene.released() is State.failed, "its time is still limited"
    scene.nothing_is_left()


async def test_a_lease_begins_anew_after_an_absence_of_the_service(scene: Scene) -> None:
    outage = Outage(scene)
    scene.world.engine_waits = True
    number = scene.request(lease_s=60)
    async with scene.supervisor():
        await scene.until(lambda: scene.state is State.producing, "producing")
        scene.store.renew(number, 70)
        outage.now += 65
    outage.now += 900
    reads: list[str] = []
    scene.world.hook = lambda name, when: reads.append(name) if name == "read" else None
    async with scene.supervisor() as supervisor:
        await scene.until(lambda: len(reads) > 3, "rounds of the driver")
        assert scene.state is State.producing
        assert outage.moments()[1] == outage.now + 70, "as long as it was renewed for"
        outage.now += 71
        supervisor.wake(number)
        assert await scene.released() is State.expired, "nobody renewed it, although he could"
    scene.nothing_is_left()


async def test_the_time_without_a_database_counts_against_nobody(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    from lclstream.api import supervisor as module

    monkeypatch.setattr(module, "_RESTART_S", 0.01)
    monkeypatch.setattr(module, "_PRESENT_S", 0.02)
    outage = Outage(scene)
    scene.world.engine_waits = True
    scene.request(lease_s=60)
    async with scene.supervisor(outage) as supervisor:  # type: ignore[arg-type]
        await scene.until(lambda: scene.state is State.producing, "producing")
        limit, _ = outage.moments()
        assert limit is not None
        outage.away = True
        await scene.until(lambda: "present" in outage.refused and "get" in outage.refused, "failed calls")
        outage.now += 90000
        outage.away = False
        await scene.until(lambda: outage.moments() == (limit + 90000, outage.now + 60), "moments moved on")
        assert scene.state is State.producing
        scene.world.engine_waits = False
        supervisor.wake(scene.number)
        assert await scene.released() is State.done
    scene.nothing_is_left()


@pytest.mark.parametrize("limited", ["requested", "buffer_starting", "ready", "producing", "draining"])
async def test_every_state_has_an_end_in_time(
    world: Any,
    store: Store,
    settings: Callable[..., ApiConfig],
    configuration: dict[str, Any],
    limited: str,
) -> None:
    config = settings(limits_s={limited: 100})
    store._limit_s = config.limit_s
    now = store.clock()
    store.clock = lambda: now
    scene = Scene(world, store, config, configuration)
    stuck = {"requested": ("create", "before"), "buffer_starting": ("read", "before"), "ready": ("upload", "before")}

    failures: list[str] = []

    def hook(name: str, when: str) -> None:
        if (name, when) == stuck.get(limited) and scene.state.value == limited:
            failures.append(name)
            raise UnreachableError("the disk is full")

    world.hook = hook
    world.engine_waits = limited == "producing"
    world.buffer_waits = limited == "draining"
    scene.request()
    async with scene.supervisor():
        await scene.until(lambda: scene.state.value == limited and (failures or limited not in stuck), limited)
        now += 101
        assert await scene.released() is State.failed
    scene.nothing_is_left()
    row = store.get(scene.number)
    assert row is not None
    assert f"{limited} for more than 100 s" in row.info
    if limited in stuck:
        assert "the disk is full" in row.info
    if limited == "draining":
        assert "consumers have left 1 messages in the buffer" in row.info


async def test_an_empty_buffer_that_waits_for_more_producers_is_drained(scene: Scene) -> None:
    """The engine's ranks may be fewer than the buffer was told: it would wait for ever."""
    scene.world.buffer_waits = True

    class Empty:
        def __init__(self, reader: Any) -> None:
            self.reader = reader

        async def read(self) -> dict[str, Any]:
            return {**await self.reader.read(), "held": {"messages": 0, "bytes": 0}}

        async def aclose(self) -> None:
            pass

    scene.request()
    supervisor = Supervisor(scene.store, scene.world, scene.config, lambda url: Empty(scene.world.reader(url)))
    async with supervisor:
        assert await scene.released() is State.done
    scene.nothing_is_left()


async def test_a_strangers_buffer_on_the_same_port_is_not_taken_for_ours(scene: Scene) -> None:
    class Stranger:
        async def read(self) -> dict[str, Any]:
            return {"name": "transfer-99-0", "producers": 0}

        async def aclose(self) -> None:
            pass

    scene.config = scene.config.model_copy(update={"limits_s": {State.buffer_starting: 0.3}})
    scene.store._limit_s = scene.config.limit_s
    scene.request()
    async with Supervisor(scene.store, scene.world, scene.config, lambda url: Stranger()):
        assert await scene.released() is State.failed
    row = scene.store.get(scene.number)
    assert row is not None
    assert "somebody else's buffer answers, called 'transfer-99-0'" in row.info
    scene.nothing_is_left()


async def test_a_driver_that_dies_is_started_again(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    from lclstream.api import supervisor as module

    monkeypatch.setattr(module, "_RESTART_S", 0.05)
    died = []

    def hook(name: str, when: str) -> None:
        if name == "upload" and not died:
            died.append(name)
            raise RuntimeError("a mistake in the program")

    scene.world.hook = hook
    scene.request()
    async with scene.supervisor():
        assert await scene.released() is State.done
    assert died
    scene.nothing_is_left()


class Bomb:
    """Kills the driver at the n-th call to the job service or the database, before or after it is done."""

    def __init__(self, scene: Scene, at: int, when: str, also: Callable[[], None]) -> None:
        self.scene, self.left, self.when, self.also = scene, at, when, also
        self.went_off = False

    def tick(self, name: str, when: str) -> None:
        if when != self.when or self.went_off:
            return
        self.left -= 1
        if self.left < 0:
            self.went_off = True
            self.also()
            raise Crash(name)

    def store(self) -> Any:
        bomb = self

        class Fragile:
            def __getattr__(self, name: str) -> Any:
                real = getattr(bomb.scene.store, name)
                if name in ("clock", "get", "jobs", "effects", "unreleased", "log", "present"):
                    return real  # reading changes nothing, and a mark that the service is there nothing of a transfer

                def call(*args: Any, **kwargs: Any) -> Any:
                    bomb.tick(name, "before")
                    answer = real(*args, **kwargs)
                    bomb.tick(name, "after")
                    return answer

                return call

        return Fragile()


@pytest.mark.parametrize(
    ("trouble", "when", "first", "stride"),
    [
        ("none", "before", 0, 1),
        ("none", "after", 0, 1),
        ("cancel", "before", 1, 2),
        ("cancel", "after", 0, 2),
        ("engine fails", "before", 0, 2),
        ("engine fails", "after", 1, 2),
    ],
)
async def test_a_crash_at_any_step_converges_to_the_same_end(
    scene: Scene, trouble: str, when: str, first: int, stride: int
) -> None:
    """The n-th call kills the service, for every n; one that is started again comes to the same end."""
    at = first
    while True:
        scene.world.jobs.clear()
        scene.world.keys.clear()
        scene.world.engine_fails = trouble == "engine fails"
        number = scene.request()

        def cancelled(number: int = number) -> None:
            if trouble == "cancel":
                scene.store.happen(number, Event.cancel, "cancelled in the moment of the crash")

        bomb = Bomb(scene, at, when, cancelled)
        scene.world.hook = bomb.tick
        async with scene.supervisor(bomb.store()) as supervisor:
            task = supervisor._tasks[number]
            await asyncio.wait({task}, timeout=60)
            assert task.done(), f"call {at}: {scene.state}"
        scene.world.hook = lambda name, when: None
        async with scene.supervisor():
            end = await scene.released()
        scene.nothing_is_left()
        assert all(job["starts"] <= 1 for job in scene.world.jobs.values()), "a job was started twice"
        assert len(scene.world.of("engine")) <= 1
        assert len(scene.world.of("buffer")) <= 1
        if trouble == "cancel" and bomb.went_off:
            assert end in (State.canceled, State.done), f"call {at}"
        else:
            assert end is (State.failed if trouble == "engine fails" else State.done), f"call {at}"
        if not bomb.went_off:
            break
        at += stride
    assert at > 15, "the bomb must have gone off at many steps"


class Spilling(Scene):
    """A transfer whose consumers are slow, and which keeps what is left in files."""

    def __init__(self, world: Any, store: Store, config: ApiConfig, configuration: dict[str, Any]) -> None:
        super().__init__(world, store, config, configuration)
        store._limit_s = config.limit_s
        world.buffer_waits = True

    @property
    def info(self) -> str:
        row = self.store.get(self.number)
        assert row is not None
        return row.info


@pytest.fixture
def spilling(world: Any, store: Store, settings: Callable[..., ApiConfig], configuration: dict[str, Any]) -> Spilling:
    config = settings(limits_s={"draining": 0.3, "keeping": 20}, buffer={"spill": "/scratch/spill"})
    return Spilling(world, store, config, configuration)


def account(lost: int) -> dict[str, Any]:
    return {"name": "x", "state": "failed", "held": {"messages": 3 - lost}, "lost": {"messages": lost}}


async def test_what_nobody_pulled_is_kept_in_files_where_that_was_asked_for(spilling: Spilling) -> None:
    spilling.world.summary = account(lost=0)
    number = spilling.request(spill=True)
    async with spilling.supervisor():
        assert await spilling.released() is State.done
    spilling.nothing_is_left()
    (job,) = spilling.world.of("buffer")
    folder = shlex.split(job["spec"]["script"])[-1]
    assert folder.startswith(f"/scratch/spill/transfer-{number}-0")
    assert spilling.info == f"nobody pulled the rest in time: it is kept in {folder}"
    row = spilling.store.get(number)
    assert row is not None
    assert row.buffers == [account(lost=0)]


async def test_a_new_database_does_not_give_out_what_transfers_of_an_older_one_have_left(
    spilling: Spilling, tmp_path: Path
) -> None:
    """Both count from 1, and a buffer offers what it finds in its folder to whoever pulls."""
    later = spilling.store.clock() + 1
    newer = Store(f"sqlite:///{tmp_path}/newer.sqlite", spilling.config.limit_s, lambda: later)
    folders = []
    for store in (spilling.store, newer):
        spilling.store = store
        row = store.get(spilling.request(spill=True))
        assert row is not None
        again = store.get(row.id)
        assert again is not None
        assert launch.spill_folder(again, 0, spilling.config) == launch.spill_folder(row, 0, spilling.config)
        folders.append((row.id, launch.spill_folder(row, 0, spilling.config)))
    newer.close()
    assert folders[0][0] == folders[1][0] == 1
    assert folders[0][1] != folders[1][1]


async def test_a_transfer_is_not_done_before_the_buffer_has_kept_the_rest(spilling: Spilling) -> None:
    spilling.world.buffer_stays = True
    spilling.world.summary = account(lost=0)
    number = spilling.request(spill=True)
    async with spilling.supervisor():
        await spilling.until(lambda: spilling.state is State.keeping, "keeping")
        asked: list[str] = []
        spilling.world.hook = lambda name, when: asked.append(name)
        await spilling.until(lambda: asked.count("history") > 3, "looks at the job")
        assert spilling.state is State.keeping, "it writes"
        assert spilling.state.phase.value == "draining", "clients know this phase"
        assert len(spilling.store.leased_ports()) == 3
    async with spilling.supervisor() as supervisor:
        spilling.world.buffer_stays = False
        supervisor.wake(number)
        assert await spilling.released() is State.done
    spilling.nothing_is_left()


@pytest.mark.parametrize(
    ("summary", "words"),
    [
        (account(lost=2), "2 messages are lost; what is kept is in /scratch/spill/transfer-"),
        (None, "it is not known whether it is kept in /scratch/spill/transfer-"),
    ],
    ids=["full disk", "killed while it wrote"],
)
async def test_what_could_not_be_kept_fails_the_transfer(
    spilling: Spilling, summary: dict[str, Any] | None, words: str
) -> None:
    spilling.world.summary = summary
    spilling.request(spill=True)
    async with spilling.supervisor():
        assert await spilling.released() is State.failed
    spilling.nothing_is_left()
    assert words in spilling.info
    assert any(client == "cache" and "signal 9" in text for client, _, text in spilling.log()), "the job's own words"


async def test_a_buffer_that_keeps_for_ever_fails_the_transfer(spilling: Spilling) -> None:
    spilling.config = spilling.config.model_copy(update={"limits_s": {State.draining: 0.2, State.keeping: 0.2}})
    spilling.store._limit_s = spilling.config.limit_s
    spilling.world.buffer_stays = True
    spilling.request(spill=True)
    async with spilling.supervisor():
        await spilling.until(lambda: spilling.state.final, "an end")
        assert spilling.state is State.failed
        assert "the buffer has not ended within 0.2 s" in spilling.info
        spilling.world.buffer_stays = False
        await spilling.released()
    spilling.nothing_is_left()


async def test_a_job_service_that_is_away_delays_the_account_of_what_is_kept(spilling: Spilling) -> None:
    spilling.world.summary = account(lost=0)
    failures: list[str] = []

    def hook(name: str, when: str) -> None:
        if name == "download" and when == "before" and len(failures) < 3:
            failures.append(name)
            raise UnreachableError("nobody answers at the job service")

    spilling.world.hook = hook
    spilling.request(spill=True)
    async with spilling.supervisor():
        assert await spilling.released() is State.done
    assert len(failures) == 3


async def test_several_buffers_must_all_answer_and_all_end(scene: Scene) -> None:
    scene.world.buffer_waits = True
    number = scene.request(buffers=3)
    async with scene.supervisor():
        await scene.until(lambda: scene.state is State.draining, "draining")
        first, *others = scene.world.of("buffer")
        assert len(others) == 2
        scene.world.reach(first, JobState.completed)
        await asyncio.sleep(0.1)
        assert scene.state is State.draining, "two of three still have messages"
        for job in others:
            scene.world.reach(job, JobState.completed)
        assert await scene.released() is State.done
    scene.nothing_is_left()
    row = scene.store.get(number)
    assert row is not None
    assert len(row.config["data_handlers"][0]["urls"]) == 3
    assert [document and document["state"] for document in row.buffers] == ["done"] * 3


async def test_one_of_several_buffers_that_fails_ends_the_transfer(scene: Scene) -> None:
    scene.world.engine_waits = True
    scene.request(buffers=2)
    async with scene.supervisor():
        await scene.until(lambda: scene.state is State.producing, "producing")
        scene.world.reach(scene.world.of("buffer")[1], JobState.failed, "137")
        assert await scene.released() is State.failed
    scene.nothing_is_left()


async def test_old_transfers_are_forgotten_and_young_and_living_ones_are_not(
    world: Any, store: Store, settings: Callable[..., ApiConfig], configuration: dict[str, Any]
) -> None:
    scene = Scene(world, store, settings(keep_days=1), configuration)
    now = store.clock()
    store.clock = lambda: now - 3 * 86400
    old = scene.request()
    async with scene.supervisor():
        await scene.released()
    living = scene.request()
    store.clock = lambda: now
    world.engine_waits = True
    young = scene.request()
    store.happen(young, Event.cancel, "now")
    store.release(young)
    world.away = True
    async with scene.supervisor():
        await scene.until(lambda: store.get(old) is None, "forgetting")
    assert store.get(living) is not None
    assert store.get(young) is not None
    assert store.log(old) == []
    assert store.jobs(old) == []


async def test_many_transfers_at_once_all_end(scene: Scene) -> None:
    numbers = [scene.request(key=f"{n}") for n in range(20)]
    async with scene.supervisor():
        await scene.until(lambda: scene.store.unreleased() == [], "end of all")
    assert {State(scene.store.get(number).state) for number in numbers} <= {State.done}  # type: ignore[union-attr]
    scene.nothing_is_left()
