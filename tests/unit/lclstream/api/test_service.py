"""The routes, over mutual TLS, in front of jobs in memory."""

from __future__ import annotations

import json
import socket
import ssl
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from lclstream.api import callbacks, cli
from lclstream.api.client import AsyncTransferClient, TransferClient
from lclstream.api.config import ApiConfig
from lclstream.api.models import ClientName, JobState, TransferPhase
from lclstream.api.store import Store
from lclstream.security import http
from lclstream.security.errors import AuthenticationError, ServiceError
from lclstream.security.identity import Identity


@pytest.fixture
def config(settings: Callable[..., ApiConfig]) -> ApiConfig:
    return settings(max_lease_s=3600, max_request_bytes=20_000)


@pytest.fixture
def url(serving: Callable[[ApiConfig], str], config: ApiConfig) -> str:
    return serving(config)


@pytest.fixture
def alice(url: str, sites: dict[str, Any]) -> Iterator[TransferClient]:
    with TransferClient(url, sites["s3df"].member("alice")) as client:
        yield client


@pytest.fixture
def bob(url: str, sites: dict[str, Any]) -> Iterator[TransferClient]:
    with TransferClient(url, sites["s3df"].member("bob")) as client:
        yield client


@pytest.fixture
def raw(url: str, sites: dict[str, Any]) -> Iterator[httpx.Client]:
    with http.client(url, sites["s3df"].member("alice")) as client:
        yield client


def ended(client: TransferClient, number: int, wait_until: Callable[..., None]) -> Any:
    wait_until(lambda: client.info(number).released, 60, "release")
    return client.info(number)


def test_a_transfer_from_request_to_end(
    alice: TransferClient, configuration: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    status = alice.request(configuration, name="my-run", ranks=2)
    assert status.phase is TransferPhase.requested
    assert status.state is JobState.new
    assert (status.user, status.name, status.lease_expires) == ("alice", "my-run", None)
    assert status.url.startswith("tcp://127.0.0.1:21")
    info = ended(alice, status.id, wait_until)
    assert (info.phase, info.state, info.user, info.url) == (
        TransferPhase.done,
        JobState.completed,
        "alice",
        status.url,
    )
    assert (info.metrics.recvd, info.metrics.sent, info.metrics.buffered) == (4, 4, 0)
    assert {entry.client.value for entry in info.log} == {"cache", "producer", "consumer"}


def test_figures_are_live_while_it_runs(
    alice: TransferClient, world: Any, configuration: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    world.buffer_waits = True
    number = alice.request(configuration).id
    wait_until(lambda: alice.info(number).metrics.recvd == 4, 60, "figures")
    info = alice.info(number)
    assert (info.metrics.sent, info.metrics.buffered) == (3, 1)
    assert info.buffer is not None
    assert info.buffer["held"]["bytes"] == 100
    alice.cancel(number)
    info = ended(alice, number, wait_until)
    assert info.phase is TransferPhase.canceled
    assert info.metrics.recvd == 4, "the last figures are kept"


@pytest.mark.parametrize("phase", ["requested", "buffer_starting", "ready", "producing", "draining", "done"])
def test_delete_ends_it_in_any_phase_and_leaves_nothing(
    alice: TransferClient,
    world: Any,
    store: Store,
    configuration: dict[str, Any],
    wait_until: Callable[..., None],
    phase: str,
) -> None:
    from lclstream.security.errors import UnreachableError

    stuck = {"requested": "create", "buffer_starting": "read", "ready": "upload"}.get(phase)

    def hook(name: str, when: str) -> None:
        if stuck == name and when == "before" and not store.unreleased() == [] and held:
            raise UnreachableError("not yet")

    held = True  # until the cancellation
    world.hook = hook
    world.engine_waits, world.buffer_waits = phase == "producing", phase == "draining"
    number = alice.request(configuration).id
    wait_until(lambda: alice.info(number).phase.value == phase, 60, phase)
    held = False
    alice.cancel(number)
    alice.cancel(number)
    info = ended(alice, number, wait_until)
    assert info.phase.value == ("done" if phase == "done" else "canceled")
    assert world.running() == []
    assert store.leased_ports() == {}


def test_somebody_elses_transfer_is_not_there(
    alice: TransferClient, bob: TransferClient, configuration: dict[str, Any]
) -> None:
    number = alice.request(configuration).id
    for call in (lambda: bob.info(number), lambda: bob.cancel(number), lambda: bob.renew(number, 5)):
        with pytest.raises(ServiceError, match="you \\(bob\\) have no transfer") as error:
            call()
        assert error.value.status == 404
    assert bob.list() == []
    assert [status.id for status in alice.list()] == [number]
    alice.cancel(number)


def test_a_user_is_who_his_certificate_says(raw: httpx.Client, configuration: dict[str, Any]) -> None:
    answer = raw.post("/v1/transfers", params={"user": "root"}, json=configuration)
    assert answer.json()["user"] == "alice"


def test_nobody_without_our_certificate_gets_in(url: str, sites: dict[str, Any]) -> None:
    with (
        TransferClient(url, sites["olcf"].member("mallory")) as stranger,
        pytest.raises(AuthenticationError, match="known_servers"),
    ):
        stranger.list()
    context = ssl.create_default_context(cadata=sites["s3df"].certificate_pem.decode())
    with pytest.raises((OSError, urllib.request.URLError)):
        urllib.request.urlopen(f"{url}/v1/transfers", context=context, timeout=30)


def test_lists_are_newest_first_and_filtered_by_state(
    alice: TransferClient, world: Any, configuration: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    first = alice.request(configuration).id
    ended(alice, first, wait_until)
    world.engine_waits = True
    second = alice.request(configuration).id
    third = alice.request(configuration).id
    assert [one.id for one in alice.list()] == [third, second, first]
    assert [one.id for one in alice.list(index=1, limit=1)] == [second]
    assert [one.id for one in alice.list(state=JobState.completed)] == [first]
    assert alice.list(limit=0) == []
    for number in (second, third):
        alice.cancel(number)


def test_the_same_key_gives_the_same_transfer(
    alice: TransferClient, bob: TransferClient, world: Any, configuration: dict[str, Any]
) -> None:
    world.engine_waits = True
    first = alice.request(configuration, idempotency_key="dag/run/task")
    again = alice.request(configuration, idempotency_key="dag/run/task", lease_s=60)
    assert again.id == first.id
    assert again.lease_expires is not None, "the one who asks again is alive"
    assert bob.request(configuration, idempotency_key="dag/run/task").id != first.id
    with pytest.raises(ServiceError, match="was used for transfer 1 with another configuration") as error:
        alice.request({**configuration, "skip_incomplete_events": True}, idempotency_key="dag/run/task")
    assert error.value.status == 409
    for client in (alice, bob):
        for status in client.list():
            client.cancel(status.id)


def test_the_same_key_at_the_same_moment_makes_one_transfer(
    alice: TransferClient, world: Any, configuration: dict[str, Any], url: str, sites: dict[str, Any]
) -> None:
    world.engine_waits = True

    def ask(_: int) -> int:
        with TransferClient(url, sites["s3df"].member("alice")) as client:
            return client.request(configuration, idempotency_key="one").id

    with ThreadPoolExecutor(8) as threads:
        assert len(set(threads.map(ask, range(8)))) == 1
    alice.cancel(alice.list()[0].id)


def test_a_dry_run_tells_what_would_be_started_and_starts_nothing(
    alice: TransferClient, world: Any, store: Store, configuration: dict[str, Any]
) -> None:
    plan = alice.plan(configuration, ranks=3, buffers=2)
    assert (plan.ranks, plan.producers, plan.buffers, plan.ports, plan.ports_free) == (3, 3, 2, 6, 1000)
    assert (plan.events, plan.messages, plan.bytes) == (20, 6, 20 * 20 * 2 * 4)
    assert "mpiexec -n 3 lclstreamer" in plan.scripts["engine"]
    assert "nngstream" in plan.scripts["buffer"]
    assert plan.config["data_handlers"][0]["urls"] == ["INPUT-0", "INPUT-1"]
    assert world.jobs == {}
    assert alice.list() == []
    assert store.leased_ports() == {}
    with pytest.raises(ServiceError, match="missing"):
        alice.plan({})


def test_the_end_is_marked_for_our_clients_and_for_others_as_the_site_has_it(
    alice: TransferClient, raw: httpx.Client, configuration: dict[str, Any]
) -> None:
    """The published clients keep each message as a file: an empty one at the end would be one too many."""

    def script(**params: str) -> str:
        answer = raw.post("/v1/transfers", json=configuration, params={"dry_run": "true", **params})
        return str(answer.json()["scripts"]["buffer"])

    assert "--sentinel 0 " in script()
    assert "--sentinel 3 " in script(sentinel="3")
    assert "--sentinel 1 " in alice.plan(configuration).scripts["buffer"]


def test_a_transfer_with_several_buffers_gives_all_their_addresses(
    alice: TransferClient, configuration: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    status = alice.request(configuration, buffers=2)
    assert len(set(status.urls)) == 2
    assert status.url == status.urls[0]
    info = ended(alice, status.id, wait_until)
    assert info.phase is TransferPhase.done
    assert len(info.buffers) == 2
    assert info.metrics.sent == 8, "figures are of both together"
    with pytest.raises(ServiceError, match="5 buffers are more than the 4"):
        alice.request(configuration, buffers=5)


def test_files_are_kept_only_where_the_site_offers_it(alice: TransferClient, configuration: dict[str, Any]) -> None:
    with pytest.raises(ServiceError, match="this service keeps nothing in files"):
        alice.request(configuration, on_no_consumer="spill")
    alice.cancel(alice.request(configuration, on_no_consumer="wait").id)


def test_nobody_gets_more_than_his_quota(
    serving: Callable[[ApiConfig], str],
    settings: Callable[..., ApiConfig],
    sites: dict[str, Any],
    world: Any,
    configuration: dict[str, Any],
    wait_until: Callable[..., None],
) -> None:
    world.engine_waits = True
    url = serving(settings(quota={"transfers": 2, "ranks": 5}))
    with TransferClient(url, sites["s3df"].member("alice")) as alice, TransferClient(
        url, sites["s3df"].member("bob")
    ) as bob:  # fmt: skip
        first = alice.request(configuration, ranks=3, idempotency_key="one").id
        with pytest.raises(ServiceError, match="alice uses 3 engine ranks, and with 3 more") as error:
            alice.request(configuration, ranks=3)
        assert error.value.status == 429
        assert error.value.retry
        alice.request(configuration, ranks=2)
        with pytest.raises(ServiceError, match="alice has 2 transfers, and may have 2"):
            alice.request(configuration, ranks=1)
        assert alice.request(configuration, ranks=3, idempotency_key="one").id == first, "asking again costs nothing"
        bob.request(configuration, ranks=5)
        alice.cancel(first)
        ended(alice, first, wait_until)
        alice.request(configuration, ranks=1)
        for client in (alice, bob):
            for status in client.list():
                client.cancel(status.id)


def test_operators_and_members_of_the_experiment_by_the_roles_file(
    serving: Callable[[ApiConfig], str],
    settings: Callable[..., ApiConfig],
    sites: dict[str, Any],
    world: Any,
    configuration: dict[str, Any],
    tmp_path: Any,
    wait_until: Callable[..., None],
) -> None:
    world.engine_waits = True
    issuer = Identity.of_certificate(
        ssl.PEM_cert_to_DER_cert((sites["s3df"].member("alice").folder / "id.crt").read_text())
    ).issuer
    roles = tmp_path / "roles.yaml"
    document = {
        "issuers": {"s3df": issuer},
        "home": "s3df",
        "operators": ["root"],
        "experiments": {"tmox1": ["alice", "bob"]},
    }
    roles.write_text(json.dumps(document))
    url = serving(settings(roles=str(roles)))
    alice, bob, root, eve = (TransferClient(url, sites["s3df"].member(who)) for who in ("alice", "bob", "root", "eve"))
    with alice, bob, root, eve:
        configuration["source_identifier"] = "exp=tmox1,run=1"
        shared = alice.request(configuration).id
        configuration["source_identifier"] = ""
        private = alice.request(configuration).id
        assert bob.info(shared).user == "alice"
        for call in (lambda: bob.cancel(shared), lambda: bob.renew(shared, 5)):
            with pytest.raises(ServiceError, match="one must be its owner") as error:
                call()
            assert error.value.status == 403
        for stranger in (lambda: bob.info(private), lambda: eve.info(shared), lambda: eve.cancel(private)):
            with pytest.raises(ServiceError, match="have no transfer"):
                stranger()
        assert [one.id for one in bob.list()] == []
        assert [one.id for one in bob.list(others=True)] == [shared]
        assert [one.id for one in root.list(others=True)] == [private, shared]
        assert eve.list(others=True) == []
        root.cancel(private)
        assert ended(alice, private, wait_until).info == "cancelled by root"
        alice.cancel(shared)


def test_leases(
    alice: TransferClient, world: Any, configuration: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    world.engine_waits = True
    number = alice.request(configuration, lease_s=60).id
    before = alice.info(number).lease_expires
    assert before is not None
    assert alice.renew(number, 120) > before + 50
    assert alice.renew(number, 0.1) < before
    info = ended(alice, number, wait_until)
    assert info.phase is TransferPhase.expired
    assert world.running() == []
    with pytest.raises(ServiceError, match="has ended") as error:
        alice.renew(number, 5)
    assert error.value.status == 409
    for call in (lambda: alice.renew(number, 4000), lambda: alice.request(configuration, lease_s=4000)):
        with pytest.raises(ServiceError, match="longer than the 3600 s") as error:
            call()
        assert error.value.status == 422


def test_a_wrong_field_is_named_by_its_path(
    alice: TransferClient, raw: httpx.Client, configuration: dict[str, Any]
) -> None:
    configuration["data_sources"] = {"image": {"type": "Psana2DetectorInterface", "psana_name": "jungfrau"}}
    with pytest.raises(ServiceError, match=r"body\.data_sources\.image.*psana_fields is missing") as error:
        alice.request(configuration)
    assert error.value.status == 422
    answer = raw.post("/v1/transfers", json=configuration)
    assert answer.json()["detail"][0]["loc"][:3] == ["body", "data_sources", "image"]
    assert alice.list() == [], "nothing was started"


@pytest.mark.parametrize(
    ("body", "params", "said"),
    [
        (b"", {}, "not JSON"),
        (b"{", {}, "not JSON"),
        (b"[1]", {}, "not list"),
        (b'{"a": NaN}', {}, "not JSON"),
        (b"{}", {}, "missing"),
        (None, {"ranks": "0"}, "ranks"),
        (None, {"ranks": "129"}, "129 ranks are more than the 128"),
        (None, {"lease_s": "-1"}, "lease_s"),
        (None, {"lease_s": "nan"}, "lease_s"),
        (None, {"name": "../evil"}, "name"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    raw: httpx.Client, configuration: dict[str, Any], body: bytes | None, params: dict[str, str], said: str
) -> None:
    content = json.dumps(configuration).encode() if body is None else body
    answer = raw.post("/v1/transfers", params=params, content=content)
    assert answer.status_code == 422
    assert said in answer.text


def test_a_huge_request_is_not_read(raw: httpx.Client) -> None:
    answer = raw.post("/v1/transfers", content=b" " * 30_000)
    assert answer.status_code == 413


def test_without_free_ports_a_request_is_told_to_wait(
    serving: Callable[[ApiConfig], str],
    settings: Callable[..., ApiConfig],
    sites: dict[str, Any],
    world: Any,
    store: Store,
    configuration: dict[str, Any],
    wait_until: Callable[..., None],
    free_port: Callable[..., int],
) -> None:
    world.engine_waits = True
    # Not of the range in which other tests look for free ones, which takes a port for a moment.
    first_port = free_port(5)
    with socket.socket() as squatter, socket.socket() as another:
        squatter.bind(("127.0.0.1", first_port + 1))
        another.bind(("127.0.0.1", first_port + 3))
        url = serving(settings(ports={"first": first_port, "last": first_port + 4}))
        with TransferClient(url, sites["s3df"].member("alice")) as alice:
            first = alice.request(configuration)
            free = [first_port, first_port + 2, first_port + 4]
            assert sorted(store.leased_ports()) == free, "ports in use are left out"
            needed = f"3 ports are needed, and of {first_port} to {first_port + 4}"
            with pytest.raises(ServiceError, match=needed) as error:
                alice.request(configuration)
            assert error.value.status == 503
            assert error.value.retry
            alice.cancel(first.id)
            ended(alice, first.id, wait_until)
            second = alice.request(configuration)
            alice.cancel(second.id)
            ended(alice, second.id, wait_until)


def callback_of(world: Any, role: str, state: str, **changes: Any) -> tuple[bytes, str]:
    (job,) = world.of(role)
    jobid = next(jobid for jobid, known in world.jobs.items() if known is job)
    body = json.dumps({"jobid": jobid, "jobndx": 1, "state": state, "info": "0", **changes}).encode()
    return body, callbacks.signature(job["spec"]["cb_secret"], body)


def test_callbacks(
    alice: TransferClient,
    raw: httpx.Client,
    sites: dict[str, Any],
    world: Any,
    configuration: dict[str, Any],
    wait_until: Callable[..., None],
) -> None:
    world.engine_waits = True
    number = alice.request(configuration).id
    wait_until(lambda: alice.info(number).phase is TransferPhase.producing, 60, "producing")
    body, signature = callback_of(world, "engine", "completed")
    header = {callbacks.HEADER: signature}
    forged = {callbacks.HEADER: callbacks.signature("guess", body)}
    for headers in ({}, forged, {callbacks.HEADER: "sha256="}, {callbacks.HEADER: signature.replace("sha256", "sha1")}):
        assert raw.post("/v1/callback/producer", content=body, headers=headers).status_code == 403
    assert raw.post("/v1/callback/producer", content=body + b" ", headers=header).status_code == 403
    assert raw.post("/v1/callback/forwarder", content=body, headers=header).status_code == 403, "it is no buffer job"
    unknown = body.replace(b'"jobid": "', b'"jobid": "9')
    assert raw.post("/v1/callback/producer", content=unknown, headers=header).status_code == 403
    assert raw.post("/v1/callback/producer", content=b"{}", headers=header).status_code == 422
    assert alice.info(number).phase is TransferPhase.producing, "none of them had an effect"

    answer = raw.post("/v1/callback/producer", content=body, headers=header)
    assert (answer.status_code, answer.json()) == (200, True)
    # Draining goes on by itself meanwhile.
    on_the_way = (TransferPhase.draining, TransferPhase.done)
    wait_until(lambda: alice.info(number).phase in on_the_way, 60, "draining")

    def of_the_engine() -> list[object]:
        return [entry for entry in alice.info(number).log if entry.client is ClientName.producer]

    logged = of_the_engine()
    again = raw.post("/v1/callback/producer", content=body, headers=header)
    assert (again.status_code, again.json()) == (200, True), "the answer may have been lost: its sender is not in error"
    with http.client(str(raw.base_url), sites["s3df"].member("eve")) as eve:
        replay = eve.post("/v1/callback/producer", content=body, headers=header)
    assert replay.status_code == 403
    assert "from another sender" in replay.text
    assert of_the_engine() == logged, "neither had an effect"
    late, signature = callback_of(world, "engine", "active", info="late")
    assert raw.post("/v1/callback/producer", content=late, headers={callbacks.HEADER: signature}).status_code == 200
    assert alice.info(number).phase in on_the_way, "late news do not turn it back"
    body, signature = callback_of(world, "buffer", "completed")
    assert raw.post("/v1/callback/forwarder", content=body, headers={callbacks.HEADER: signature}).status_code == 200
    assert ended(alice, number, wait_until).phase is TransferPhase.done
    for job in world.of("engine"):
        world.reach(job, JobState.completed)


def test_callbacks_come_from_the_services_of_the_roles_file(
    serving: Callable[[ApiConfig], str],
    settings: Callable[..., ApiConfig],
    sites: dict[str, Any],
    world: Any,
    configuration: dict[str, Any],
    tmp_path: Any,
    wait_until: Callable[..., None],
) -> None:
    world.engine_waits = True
    issuer = Identity.of_certificate(
        ssl.PEM_cert_to_DER_cert((sites["s3df"].member("alice").folder / "id.crt").read_text())
    ).issuer
    roles = tmp_path / "roles.yaml"
    roles.write_text(json.dumps({"issuers": {"s3df": issuer}, "home": "s3df", "services": ["jobs"]}))
    url = serving(settings(roles=str(roles)))
    with TransferClient(url, sites["s3df"].member("alice")) as alice:
        number = alice.request(configuration).id
        wait_until(lambda: alice.info(number).phase is TransferPhase.producing, 60, "producing")
        body, signature = callback_of(world, "engine", "failed")
        header = {callbacks.HEADER: signature}
        with http.client(url, sites["s3df"].member("alice")) as stranger:
            answer = stranger.post("/v1/callback/producer", content=body, headers=header)
        assert answer.status_code == 403
        assert "(rule: call_back)" in answer.text
        assert alice.info(number).phase is TransferPhase.producing
        with http.client(url, sites["s3df"].member("jobs")) as service:
            assert service.post("/v1/callback/producer", content=body, headers=header).status_code == 200
        assert ended(alice, number, wait_until).phase is TransferPhase.failed


@pytest.mark.parametrize("scheme", ["tcp", "tls+tcp"])
def test_a_broken_roles_file_is_told_at_the_start(
    sites: dict[str, Any], tmp_path: Any, scheme: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "roles.yaml").write_text("operators: [nobody@nowhere]")
    folder = sites["s3df"].member("api").folder
    document = {"credentials": str(folder), "job_service": {"url": "https://127.0.0.1:1"}, "roles": "roles.yaml"}
    document |= {"ports": {"scheme": scheme}, "database": f"sqlite:///{tmp_path}/t.sqlite"}
    (tmp_path / "api.yaml").write_text(json.dumps(document))
    with pytest.raises(SystemExit) as caught:
        cli.app(["--config", str(tmp_path / "api.yaml")])
    assert caught.value.code == 2
    assert "roles.yaml" in capsys.readouterr().err


def test_secrets_are_not_shown(
    alice: TransferClient, raw: httpx.Client, world: Any, configuration: dict[str, Any], wait_until: Callable[..., None]
) -> None:
    number = alice.request(configuration).id
    ended(alice, number, wait_until)
    shown = raw.get(f"/v1/transfers/{number}").text + raw.get("/v1/transfers").text
    for job in world.jobs.values():
        assert job["spec"]["cb_secret"] not in shown


def test_the_openapi_document_has_the_engines_models_and_the_published_routes(
    raw: httpx.Client, configuration: dict[str, Any]
) -> None:
    document = raw.get("/openapi.json").json()
    for path, methods in {
        "/v1/transfers": {"get", "post"},
        "/v1/transfers/{id}": {"get", "delete"},
        "/v1/callback/producer": {"post"},
        "/v1/callback/forwarder": {"post"},
        "/v1/transfers/{id}/lease": {"post"},
    }.items():
        assert set(document["paths"][path]) == methods
    schemas = document["components"]["schemas"]
    assert "data_handlers" not in schemas["EngineConfiguration"]["required"]
    assert "Psana2DetectorInterface" in schemas
    for name, fields in {
        "TransferStatus": {"id", "url", "user", "time", "jobndx", "state", "info"},
        "TransferInfo": {"user", "log", "metrics"},
        "CacheMetrics": {"time", "producers", "recvd", "sent", "buffered"},
        "PortTransition": {"time", "client", "state", "info", "jobndx"},
    }.items():
        assert fields <= set(schemas[name]["required"])


def test_the_published_clients_requests_work(raw: httpx.Client, configuration: dict[str, Any], world: Any) -> None:
    """What `lclstream get` of the public package sends and reads, and what its users send with `message`."""
    world.engine_waits = True
    answer = raw.post("/v1/transfers", json=configuration, headers={"Accept": "application/json"})
    assert answer.status_code // 100 == 2
    document = answer.json()
    assert document["url"].startswith("tcp://")
    assert document["id"] > 0
    assert raw.post("/v1/transfers/", json=configuration).status_code == 200
    assert raw.get("/v1/transfers/").status_code == 200
    cancelled = raw.delete(f"/v1/transfers/{document['id']}")
    assert (cancelled.status_code, cancelled.json()) == (200, None)
    assert raw.get(f"/v1/transfers/{document['id']}").json()["metrics"].keys() >= {"time", "producers", "recvd"}


@pytest.mark.asyncio
async def test_the_async_client_says_the_same(url: str, sites: dict[str, Any], configuration: dict[str, Any]) -> None:
    async with AsyncTransferClient(url, sites["s3df"].member("alice")) as alice:
        status = await alice.request(configuration, lease_s=60, idempotency_key="k", name="n", ranks=1)
        assert (await alice.list())[0].id == status.id
        assert await alice.renew(status.id, 90) > 0
        assert (await alice.info(status.id)).id == status.id
        await alice.cancel(status.id)
        with pytest.raises(ServiceError, match="body"):
            await alice.request({})
        with pytest.raises(ServiceError, match="no transfer"):
            await alice.info(999)


def test_a_database_in_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="must survive a restart"):
        Store("sqlite://", lambda state: None)


def test_the_database_file_is_private(store: Store, settings: Callable[..., ApiConfig]) -> None:
    from pathlib import Path

    path = Path(settings().database.removeprefix("sqlite:///"))
    assert path.stat().st_mode & 0o077 == 0
