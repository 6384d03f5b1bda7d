from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from lclstream.security.credentials import Credentials
from lclstream.security.errors import UnreachableError
from lclstream_airflow.hooks.elog import ElogHook
from lclstream_airflow.hooks.lclstream import LCLStreamHook
from lclstream_airflow.hooks.psik import PsikHook
from lclstream_airflow.hooks.service import ConnectionDefinitionError


def define(monkeypatch: pytest.MonkeyPatch, **document: Any) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_LCLSTREAM_DEFAULT", json.dumps({"conn_type": "lclstream", **document}))


def test_a_connection_gives_blocking_and_async_clients(transfers: Any) -> None:
    transfers.add()
    with LCLStreamHook().get_conn() as client:
        assert client.info(1).id == 1

    async def ask() -> int:
        async with await LCLStreamHook().get_async_conn() as aclient:
            return (await aclient.info(1)).id

    assert asyncio.run(ask()) == 1
    assert LCLStreamHook().transfer_url(1) == f"{transfers.url}/v1/transfers/1"


def test_the_test_button_says_who_answers(transfers: Any) -> None:
    transfers.add()
    assert LCLStreamHook().test_connection() == (
        True,
        f"The transfer service at {transfers.url} answers; the latest transfer is 1 (requested).",
    )


def test_the_test_button_says_what_is_wrong(transfers: Any, connection: Callable[..., None], sites: Any) -> None:
    connection("lclstream_default", "lclstream", transfers.url, sites["olcf"].member("stranger").folder)
    works, words = LCLStreamHook().test_connection()
    assert not works
    assert "known_servers" in words
    connection("lclstream_default", "lclstream", "https://127.0.0.1:9", sites["s3df"].member("airflow").folder)
    works, words = LCLStreamHook().test_connection()
    assert not works
    assert "cannot be reached" in words
    connection("elog_default", "elog", "https://127.0.0.1:9", "/nowhere")
    works, words = ElogHook().test_connection()
    assert (works, words.split(":")[0]) == (False, "certificate folder /nowhere does not exist")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"extra": {"credentials": "/c"}}, "connection 'lclstream_default': host is ''"),
        ({"host": "http://h", "extra": {"credentials": "/c"}}, "host is 'http://h'"),
        ({"host": "https://h/path", "extra": {"credentials": "/c"}}, "without a path"),
        ({"host": "h", "extra": {}}, r"credentials \(extra\) is None"),
        ({"host": "h", "extra": {"credentials": "/c", "prefix": "v1"}}, r"prefix \(extra\) is 'v1'"),
    ],
)
def test_a_wrong_connection_is_explained(monkeypatch: pytest.MonkeyPatch, document: Any, message: str) -> None:
    define(monkeypatch, **document)
    with pytest.raises(ConnectionDefinitionError, match=message):
        LCLStreamHook().endpoint()


@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("dtn", None, "https://dtn:8446"),
        ("https://dtn:7", None, "https://dtn:7"),
        ("https://dtn", 9, "https://dtn:9"),
        ("::1", 9, "https://[::1]:9"),
    ],
)
def test_host_and_port_make_the_address(
    monkeypatch: pytest.MonkeyPatch, airflow_identity: Credentials, host: str, port: int | None, expected: str
) -> None:
    define(monkeypatch, host=host, port=port, extra={"credentials": str(airflow_identity.folder), "prefix": "/x/"})
    endpoint = LCLStreamHook().endpoint()
    assert (endpoint.base_url, endpoint.prefix) == (expected, "/x")


def test_a_connection_nobody_has_defined_is_named() -> None:
    with pytest.raises(ConnectionDefinitionError, match="connection 'nowhere' is not defined: add one of type 'psik'"):
        PsikHook("nowhere").endpoint()
    with pytest.raises(ConnectionDefinitionError, match="'nowhere'"):
        asyncio.run(PsikHook("nowhere").aendpoint())


def test_an_event_loop_goes_on_while_a_certificate_folder_does_not_answer(
    monkeypatch: pytest.MonkeyPatch, connection: Callable[..., None], airflow_identity: Credentials
) -> None:
    connection("psik_default", "psik", "https://127.0.0.1:9", airflow_identity.folder)
    asked, answers = threading.Event(), threading.Event()
    check = Credentials.check_key

    def slow(credentials: Credentials) -> None:
        asked.set()
        assert answers.wait(60), "nothing went on meanwhile"
        check(credentials)

    monkeypatch.setattr(Credentials, "check_key", slow)

    async def meanwhile() -> None:
        assert await asyncio.to_thread(asked.wait, 60)
        answers.set()

    async def work() -> None:
        endpoint, _ = await asyncio.gather(PsikHook().aendpoint(), meanwhile())
        assert endpoint.credentials.folder == airflow_identity.folder

    asyncio.run(work())


def test_a_missing_service_is_unreachable(connection: Callable[..., None], airflow_identity: Credentials) -> None:
    connection("psik_default", "psik", "https://127.0.0.1:9", airflow_identity.folder)
    with PsikHook().get_conn() as client, pytest.raises(UnreachableError):
        client.state("1.1")


def test_airflow_knows_the_connection_types_with_their_forms() -> None:
    from airflow.providers_manager import ProvidersManager
    from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime

    manager = ProvidersManager()
    hooks = ProvidersManagerTaskRuntime().hooks
    for kind, name in {"lclstream": "LCLStream transfers", "psik": "Psi-k jobs", "elog": "Elog"}.items():
        hook = hooks[kind]
        assert hook is not None
        assert (hook.hook_name, hook.connection_testable) == (name, True)
        assert f"extra__{kind}__credentials" in manager.connection_form_widgets
        assert "password" in manager.field_behaviours[kind]["hidden_fields"]
    for kind, field in {"superfacility": "key_file", "jid": "token_file"}.items():
        hook = hooks[kind]
        assert hook is not None
        assert hook.connection_testable
        assert f"extra__{kind}__{field}" in manager.connection_form_widgets
        assert "password" in manager.field_behaviours[kind]["hidden_fields"]
    assert "lclstream_airflow.links.TransferLink" in manager.extra_links_class_names


def test_a_connection_makes_its_hook(transfers: Any) -> None:
    hook = LCLStreamHook.get_hook("lclstream_default")
    assert isinstance(hook, LCLStreamHook)
    assert hook.conn_id == "lclstream_default"


def test_no_key_or_token_is_in_the_connection_form() -> None:
    from lclstream_airflow.provider import get_provider_info

    # Only paths of what is secret, and addresses.
    known = {"credentials", "prefix", "key_file", "token_file", "token_url", "machine", "job_page"}
    for kind in get_provider_info()["connection-types"]:
        assert set(kind["conn-fields"]) <= known
