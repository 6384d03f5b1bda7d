"""Transfers with the real job service, the real buffer and the real engine under mpiexec."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
import zmq
from certified import Certified
from zmq.utils.monitor import recv_monitor_message

from lclstream.api.client import TransferClient
from lclstream.api.models import ClientName, JobState, TransferInfo, TransferPhase
from lclstream.client import StreamError, pull
from lclstream.jobs.client import JobClient
from lclstream.security import http
from lclstream.security.errors import PeerError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(180)]


def configuration(events: int = 20, batch_size: int = 5, shape: str = "20,2") -> dict[str, Any]:
    return {
        "source_identifier": "",
        "skip_incomplete_events": False,
        "event_source": {"type": "InternalEventSource", "number_of_events_to_generate": events},
        "data_sources": {"random": {"type": "GenericRandomNumpyArray", "array_shape": shape, "array_dtype": "float32"}},
        "processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": batch_size},
        "data_serializer": {"type": "HDF5BinarySerializer", "fields": {"random": "/data/random"}},
    }


#: Runs until somebody stops it: nobody counts that many events.
ENDLESS = configuration(events=10**9, batch_size=1, shape="64,64")


class Service:
    """A process in a group of its own, with its output in a file."""

    def __init__(self, log: Path, *command: object) -> None:
        self.log = log
        bin_folder = str(Path(sys.executable).parent)
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [f"{bin_folder}/{command[0]}", *map(str, command[1:])],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]])},
            )

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


class Site:
    """A job service and a transfer service, each a process of its own, that can be killed and started again."""

    def __init__(
        self, folder: Path, authority: Any, free_port: Callable[..., int], wait_until: Callable[..., None]
    ) -> None:
        self.folder, self._wait_until = folder, wait_until
        self.usual = True
        self.jobs_url = f"https://127.0.0.1:{free_port()}"
        self.url = f"https://127.0.0.1:{free_port()}"
        self.first = free_port(12)
        self.client = TransferClient(self.url, authority.member("alice"))
        self.jobs = JobClient(self.jobs_url, authority.member("transfer-api"))
        self.jobs_config: dict[str, Any] = {
            "listen": {"port": int(self.jobs_url.rpartition(":")[2])},
            "credentials": str(authority.member("jobs").folder),
            "prefix": str(folder / "prefix"),
            "callbacks": {"allow": [f"{self.url}/v1/callback"]},
            "backends": {"default": {"type": "local", "kill_grace_s": 4}},
        }
        self.api_config: dict[str, Any] = {
            "port": int(self.url.rpartition(":")[2]),
            "credentials": str(authority.member("transfer-api").folder),
            "database": f"sqlite:///{folder}/transfers.sqlite",
            "job_service": {"url": self.jobs_url},
            "ports": {"first": self.first, "last": self.first + 11},
            "buffer": {"credentials": str(authority.member("buffer").folder), "capacity": "64MiB", "grace_s": 0.5},
            "engine": {"ranks": 2},
            "poll_s": 1,
            "status_s": 0.2,
            "settle_s": 2,
        }

    def _write(self, name: str, document: dict[str, Any]) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump(document))
        return path

    def start_jobs(self, **changes: Any) -> None:
        self.usual = self.usual and not changes
        config = self._write("jobs.yaml", {**self.jobs_config, **changes})
        self.jobs_process = Service(self.folder / "jobs.log", "lclstream", "jobs", "--config", config)

    def start_api(self, **changes: Any) -> None:
        self.usual = self.usual and not changes
        config = self._write("api.yaml", {**self.api_config, **changes})
        self.api_process = Service(self.folder / "api.log", "lclstream", "api", "--config", config)

    def ready(self) -> None:
        self._wait_until(self._answers(self.jobs.list, self.jobs_process), 60, "job service")
        self._wait_until(self._answers(self.client.list, self.api_process), 60, "transfer service")

    def restart_api(self, **changes: Any) -> None:
        assert self.api_process.stop() == 0, self.api_process.output()[-3000:]
        self.start_api(**changes)
        self.ready()

    @staticmethod
    def _answers(call: Callable[[], object], process: Any) -> Callable[[], bool]:
        def answers() -> bool:
            assert process.process.poll() is None, process.output()[-3000:]
            try:
                call()
            except PeerError:
                return False
            return True

        return answers

    def until(
        self, number: int, what: Callable[[TransferInfo], object], name: str, timeout: float = 60
    ) -> TransferInfo:
        seen: list[TransferInfo] = []

        def look() -> bool:
            try:
                seen.append(self.client.info(number))
            except PeerError:
                return False
            return bool(what(seen[-1]))

        try:
            self._wait_until(look, timeout, name)
        except AssertionError as error:
            raise AssertionError(f"{error}: {seen[-1:]}\n{self.api_process.output()[-3000:]}") from None
        return seen[-1]

    def phase(self, number: int, phase: TransferPhase) -> TransferInfo:
        """Wait until the transfer is that far, or farther: it may be so for less time than between two looks."""
        order = list(TransferPhase)
        return self.until(number, lambda info: order.index(info.phase) >= order.index(phase), phase.value)

    def released(self, number: int) -> TransferInfo:
        return self.until(number, lambda info: info.released, "release")

    def processes(self, word: str = "") -> list[psutil.Process]:
        """Processes of our jobs with that word in their command line."""
        found = []
        for process in psutil.process_iter():
            try:
                if self._is_ours(process) and any(word in part for part in process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        prefix = f"{self.folder}/prefix/"
        return process.environ().get("base", "").startswith(prefix) or any(prefix in part for part in process.cmdline())

    def nothing_is_left(self) -> None:
        """No job lives, no process of one is there, and every port of the range can be taken."""
        living = [job for job in self.jobs.list() if not job.state.is_final]
        assert living == []
        self._wait_until(lambda: not self.processes(), 60, "end of all processes")
        for port in range(self.first, self.first + 12):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))


class Consumer:
    """Pulls a stream in a thread, from a buffer that may not listen yet."""

    def __init__(self, url: str, library: Any) -> None:
        self.messages = 0
        self.error: Exception | None = None
        self._stream = pull(url, library=library, timeout_s=60)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            with self._stream as stream:
                for _ in stream:
                    self.messages += 1
        except StreamError as error:
            self.error = error

    def end(self) -> int:
        self.thread.join(60)
        assert not self.thread.is_alive(), "the consumer waits for the end of the stream"
        return self.messages


@pytest.fixture(scope="module")
def the_site(
    tmp_path_factory: pytest.TempPathFactory, sites: dict[str, Any], free_port: Callable[..., int]
) -> Iterator[Site]:
    def wait_until(condition: Callable[[], object], timeout: float, what: str) -> None:
        deadline = time.monotonic() + timeout
        late = False
        while not condition():
            assert not late, f"no {what} within {timeout} s"
            time.sleep(0.05)
            late = time.monotonic() > deadline

    site = Site(tmp_path_factory.mktemp("site"), sites["s3df"], free_port, wait_until)
    site.start_jobs()
    site.start_api()
    yield site
    site.client.close()
    site.jobs.close()
    site.api_process.kill()
    site.jobs_process.kill()


@pytest.fixture
def site(the_site: Site) -> Iterator[Site]:
    """The services, as configured above, whatever the test before did to them."""
    if not the_site.usual:
        the_site.api_process.stop()
        the_site.jobs_process.stop()
        the_site.usual = True
    if the_site.api_process.process.poll() is not None:
        the_site.start_api()
    if the_site.jobs_process.process.poll() is not None:
        the_site.start_jobs()
    the_site.ready()
    yield the_site
    # Jobs outlive their service: a test that failed must not leave them behind.
    for process in the_site.processes():
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def test_every_event_arrives_once_at_consumers_of_both_kinds_and_nothing_is_left(site: Site) -> None:
    status = site.client.request(configuration(events=60), ranks=2)
    site.phase(status.id, TransferPhase.ready)
    consumers = [Consumer(status.url, "nng"), Consumer(status.url, "zmq")]
    info = site.released(status.id)
    assert info.phase is TransferPhase.done, info
    assert sum(consumer.end() for consumer in consumers) == 12
    assert (info.metrics.recvd, info.metrics.sent, info.metrics.buffered) == (12, 12, 0)
    assert info.buffer is not None
    assert info.buffer["state"] == "done"
    assert info.buffer["producers_seen"] == 2
    for client in (ClientName.cache, ClientName.producer):
        states = [entry.state for entry in info.log if entry.client is client]
        assert states == [JobState.new, JobState.queued, JobState.active, JobState.completed]
    site.nothing_is_left()


def test_several_buffers_share_the_events_of_one_transfer(site: Site) -> None:
    status = site.client.request(configuration(events=200, batch_size=1), ranks=2, buffers=2)
    assert len(set(status.urls)) == 2
    site.phase(status.id, TransferPhase.ready)
    consumers = [Consumer(url, "nng") for url in status.urls]
    info = site.released(status.id)
    assert info.phase is TransferPhase.done, info
    counts = [consumer.end() for consumer in consumers]
    assert sum(counts) == 200
    assert all(counts), "both carry a part"
    assert (info.metrics.recvd, info.metrics.sent) == (200, 200), "figures are of both together"
    assert [document["sent"]["messages"] for document in info.buffers if document] == counts
    site.nothing_is_left()


def test_a_killed_engine_rank_fails_the_transfer_with_its_reason(site: Site) -> None:
    status = site.client.request(ENDLESS, ranks=2)
    site.phase(status.id, TransferPhase.producing)
    consumer = Consumer(status.url, "nng")
    site.until(status.id, lambda info: info.metrics.recvd > 10, "data")
    ranks = [one for one in site.processes("lclstreamer") if "python" in one.name() or one.name() == "lclstreamer"]
    assert len(ranks) == 2, [(one.name(), one.cmdline()) for one in site.processes()]
    ranks[-1].kill()
    info = site.released(status.id)
    assert info.phase is TransferPhase.failed
    assert "the engine job" in info.info
    assert "failed (exit status" in info.info
    told = [entry.info for entry in info.log if entry.client is ClientName.producer and entry.state is JobState.failed]
    assert any("killed" in text.lower() for text in told), told
    assert "killed" in info.info.lower()
    consumer.end()
    site.nothing_is_left()


def test_a_killed_buffer_is_blamed_although_the_engine_fails_with_it(site: Site) -> None:
    status = site.client.request(ENDLESS, ranks=2)
    site.phase(status.id, TransferPhase.producing)
    site.until(status.id, lambda info: info.metrics.recvd > 10, "data")
    (buffer,) = [one for one in site.processes("nngstream") if "--in" in one.cmdline()]
    buffer.kill()
    info = site.released(status.id)
    assert info.phase is TransferPhase.failed
    assert info.info.startswith("the buffer job"), info
    assert info.metrics.recvd > 10, "the figures asked for last are kept"
    site.nothing_is_left()


def test_what_nobody_pulls_is_kept_in_files_and_can_be_given_out_later(
    site: Site, tmp_path: Path, start: Callable[..., Any]
) -> None:
    site.restart_api(buffer={**site.api_config["buffer"], "spill": str(tmp_path / "spill")}, limits_s={"draining": 3})
    status = site.client.request(configuration(events=10), ranks=1, on_no_consumer="spill")
    info = site.released(status.id)
    assert info.phase is TransferPhase.done, info
    (folder,) = (tmp_path / "spill").glob(f"transfer-{status.id}-0-*")
    assert str(folder) in info.info
    site.nothing_is_left()
    url = f"tcp://127.0.0.1:{site.first}"
    start("nngstream", "--in", f"ipc://{tmp_path}/i", "--out", url, "--spill", folder, "--producers", "0")
    assert Consumer(url, "nng").end() == 2


def test_a_missing_file_fails_with_the_engines_own_words(site: Site) -> None:
    config = configuration()
    config["event_source"] = {"type": "Psana2EventSource"}
    config["source_identifier"] = "files=/nowhere/none.xtc2"
    status = site.client.request(config, ranks=1)
    info = site.released(status.id)
    assert info.phase is TransferPhase.failed
    assert "/nowhere/none.xtc2" in info.info, info
    site.nothing_is_left()


def test_a_port_in_use_is_not_leased_and_one_taken_later_fails_with_the_reason(site: Site) -> None:
    taken = site.first + 1
    # The buffer finds its output port taken, as if somebody else had been quicker.
    script = f"#!/bin/sh\nexec nngstream --in {{input}} --out tcp://127.0.0.1:{taken}\n"
    site.restart_api(
        ports={"first": site.first, "last": site.first + 3}, buffer={**site.api_config["buffer"], "script": script}
    )
    with socket.socket() as squatter:
        squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        squatter.bind(("127.0.0.1", taken))
        squatter.listen()
        status = site.client.request(ENDLESS, ranks=1)
        assert status.url != f"tcp://127.0.0.1:{taken}"
        info = site.released(status.id)
    assert info.phase is TransferPhase.failed
    assert "the buffer job" in info.info
    assert "in use" in info.info, info
    site.nothing_is_left()


@pytest.mark.parametrize("phase", [TransferPhase.requested, TransferPhase.ready, TransferPhase.producing])
def test_delete_leaves_nothing(site: Site, phase: TransferPhase) -> None:
    status = site.client.request(ENDLESS)
    if phase is not TransferPhase.requested:
        site.phase(status.id, phase)
    site.client.cancel(status.id)
    info = site.released(status.id)
    assert info.phase is TransferPhase.canceled, info
    site.nothing_is_left()


def test_delete_while_draining_tells_what_nobody_pulled(site: Site) -> None:
    status = site.client.request(configuration(events=10), ranks=1)
    site.phase(status.id, TransferPhase.draining)
    site.until(status.id, lambda info: info.metrics.buffered == 2, "held messages")
    site.client.cancel(status.id)
    info = site.released(status.id)
    assert info.phase is TransferPhase.canceled
    assert info.buffer is not None
    assert info.buffer["lost"]["messages"] == 2, "the buffer's own last figures are kept"
    site.nothing_is_left()


def test_a_lease_that_is_not_renewed_ends_everything(site: Site) -> None:
    status = site.client.request(ENDLESS, lease_s=60)
    site.phase(status.id, TransferPhase.producing)
    site.client.renew(status.id, 0.5)
    assert site.released(status.id).phase is TransferPhase.expired
    site.nothing_is_left()


def test_a_transfer_outlives_a_kill_of_both_services(site: Site) -> None:
    """Both services are killed in the middle; the data flow on, and the end is known after the restart."""
    status = site.client.request(configuration(events=100, batch_size=1), ranks=2)
    site.phase(status.id, TransferPhase.producing)
    site.api_process.kill()
    site.jobs_process.kill()
    assert Consumer(status.url, "zmq").end() == 100, "data need neither service"
    site.start_jobs()
    site.start_api()
    info = site.released(status.id)
    assert info.phase is TransferPhase.done, info
    assert info.metrics.sent == 100
    site.nothing_is_left()


@pytest.mark.parametrize("delay", [0.0, 0.2])
def test_a_kill_at_any_moment_and_a_request_again_after_the_restart(site: Site, delay: float) -> None:
    key = f"again-{delay}"
    before = len(site.jobs.list())
    status = site.client.request(ENDLESS, idempotency_key=key)
    time.sleep(delay)  # wherever it is then: each moment must do
    site.api_process.kill()
    site.start_api()
    site.ready()
    assert site.client.request(ENDLESS, idempotency_key=key).id == status.id
    site.phase(status.id, TransferPhase.producing)
    assert len(site.jobs.list()) == before + 2, "each job was made once"
    site.client.cancel(status.id)
    assert site.released(status.id).phase is TransferPhase.canceled
    site.nothing_is_left()


def test_callbacks_bring_news_long_before_the_next_poll(site: Site) -> None:
    site.restart_api(poll_s=600, status_s=600)
    status = site.client.request(configuration(events=10), ranks=1)
    site.phase(status.id, TransferPhase.ready)
    consumer = Consumer(status.url, "nng")
    info = site.released(status.id)
    assert info.phase is TransferPhase.done
    assert consumer.end() == 2
    site.nothing_is_left()


def test_lost_callbacks_are_made_up_for_by_polling(site: Site) -> None:
    site.jobs_process.stop()
    site.start_jobs(callbacks={"allow": ["https://127.0.0.1:1"], "retry_first_s": 60})
    site.restart_api(public_url="https://127.0.0.1:1", poll_s=0.5)
    status = site.client.request(configuration(events=10), ranks=1)
    site.phase(status.id, TransferPhase.ready)
    consumer = Consumer(status.url, "nng")
    info = site.released(status.id)
    assert info.phase is TransferPhase.done
    assert consumer.end() == 2
    site.nothing_is_left()


def test_a_stopped_service_exits_well_and_goes_on_later(site: Site) -> None:
    status = site.client.request(ENDLESS)
    site.phase(status.id, TransferPhase.producing)
    assert site.api_process.stop() == 0
    assert site.processes("lclstreamer.json"), "jobs go on"
    site.start_api()
    site.ready()
    assert site.client.info(status.id).phase is TransferPhase.producing
    site.client.cancel(status.id)
    site.released(status.id)
    site.nothing_is_left()


def plain_zeromq(url: str, most: int | None = None) -> list[bytes]:
    """Pull as the published client does: dial at once, take what comes, and end a second after the sender has gone."""
    context = zmq.Context.instance()
    with (
        context.socket(zmq.PULL) as pull,
        pull.get_monitor_socket(zmq.EVENT_CONNECTED | zmq.EVENT_DISCONNECTED) as seen,
    ):
        pull.linger = 0
        pull.connect(url)
        messages: list[bytes] = []
        connected = gone = 0
        deadline = time.monotonic() + 60
        while connected == 0 or connected > gone or pull.poll(1000):
            assert time.monotonic() < deadline, f"{connected} connections, {gone} gone, {len(messages)} messages"
            if pull.poll(20):
                messages.append(pull.recv())
            if len(messages) == most:
                break
            while seen.poll(0):
                event = recv_monitor_message(seen)["event"]
                connected += event == zmq.EVENT_CONNECTED
                gone += event == zmq.EVENT_DISCONNECTED
        pull.disable_monitor()
        return messages


@pytest.fixture
def published(site: Site, sites: dict[str, Any]) -> Iterator[Any]:
    """The HTTP client that the published clients get from the published package `certified`."""
    headers = {"user-agent": "lclstream/2.0.0", "Accept": "application/json"}
    with Certified(sites["s3df"].member("alice").folder).Client(site.url, headers=headers) as client:
        yield client


def test_a_published_client_gets_its_stream_and_nothing_else(site: Site, published: Any) -> None:
    answer = published.post("/v1/transfers", json=configuration(events=50))
    assert answer.status_code // 100 == 2
    document = answer.json()
    assert document.keys() >= {"id", "url", "user", "time", "jobndx", "state", "info"}
    messages = plain_zeromq(document["url"])
    assert len(messages) == 10
    assert all(message.startswith(b"\x89HDF") for message in messages), "it makes a file of each message"
    assert site.released(document["id"]).phase is TransferPhase.done
    assert published.get(f"/v1/transfers/{document['id']}").json().keys() >= {"user", "log", "metrics"}
    site.nothing_is_left()


def test_a_published_client_that_is_stopped_deletes_its_transfer(site: Site, published: Any) -> None:
    document = published.post("/v1/transfers", json=ENDLESS).json()
    assert len(plain_zeromq(document["url"], most=20)) == 20
    assert published.delete(f"/v1/transfers/{document['id']}").status_code == 200
    assert site.released(document["id"]).phase is TransferPhase.canceled
    site.nothing_is_left()


def test_the_published_program_itself_works_unchanged(site: Site, sites: dict[str, Any], tmp_path: Path) -> None:
    program = os.environ.get("PUBLISHED_LCLSTREAM")
    if program is None:
        pytest.skip("set PUBLISHED_LCLSTREAM to the `lclstream` of the published client, which no registry has")
    config = tmp_path / "lclstreamer.yaml"
    config.write_text(yaml.safe_dump(configuration(events=50)))
    environment = {**os.environ, "CERTIFIED_CONFIG": str(sites["s3df"].member("alice").folder)}
    done = subprocess.run(
        [program, "get", str(config), "--server", site.url], env=environment, capture_output=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        sizes = [member.size for member in archive]
    assert len(sizes) == 10
    assert all(sizes)
    site.nothing_is_left()


def test_requests_beyond_the_services_limits_are_refused(site: Site, sites: dict[str, Any]) -> None:
    site.restart_api(requests={"rate": {"per_s": 0.01, "burst": 50}}, max_request_bytes=2048)
    with http.client(site.url, sites["s3df"].member("bob")) as bob:
        large = bob.post("/v1/transfers", content=b" " * 3000)
        assert large.status_code == 413
        assert "rule: body_bytes" in large.text
        answers = [bob.get("/v1/transfers") for _ in range(50)]
    assert [answer.status_code for answer in answers] == [200] * 49 + [429]
    assert int(answers[-1].headers["retry-after"]) > 10
    assert site.client.list(limit=1) is not None, "others are served"


def test_what_makes_no_sense_is_told_before_anything_starts(
    start: Callable[..., Any], sites: dict[str, Any], tmp_path: Path
) -> None:
    credentials = str(sites["s3df"].member("transfer-api").folder)
    common = ["--credentials", credentials, "--job-service", "https://127.0.0.1:1"]
    folder = tmp_path / "folder.sqlite"
    folder.mkdir()
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        port = str(squatter.getsockname()[1])
        attempts = {
            "credentials: is missing": (2, start("lclstream", "api")),
            "does not exist": (2, start("lclstream", "api", *common, "--credentials", tmp_path / "none")),
            "cannot listen at": (3, start("lclstream", "api", *common, "--port", port, cwd=tmp_path)),
            "database cannot be opened": (3, start("lclstream", "api", *common, "--database", f"sqlite:///{folder}")),
        }
        for said, (code, child) in attempts.items():
            assert child.wait(60) == code, child.output()
            assert said in child.output()
