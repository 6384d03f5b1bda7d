"""Ports, signatures, configuration, and what a transfer runs."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lclstream.api import callbacks, launch, plan
from lclstream.api.config import ApiConfig, load_config
from lclstream.api.ports import candidates, is_free
from lclstream.api.states import State
from lclstream.api.tables import TransferRow
from lclstream.config_file import ConfigError


def test_a_port_that_is_only_bound_is_not_free() -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        port = squatter.getsockname()[1]
        assert not is_free("127.0.0.1", port)
    assert is_free("127.0.0.1", port)


def test_a_port_somebody_listens_at_is_not_free() -> None:
    with socket.socket() as squatter:
        squatter.bind(("127.0.0.1", 0))
        squatter.listen()
        assert not is_free("127.0.0.1", squatter.getsockname()[1])


@given(first=st.integers(1, 65000), width=st.integers(1, 50), data=st.data())
def test_candidates_are_all_ports_of_the_range_that_are_not_taken(first: int, width: int, data: st.DataObject) -> None:
    last = first + width - 1
    taken = data.draw(st.sets(st.integers(first, last)))
    found = list(candidates(first, last, taken))
    assert sorted(found) == [port for port in range(first, last + 1) if port not in taken]


@given(body=st.binary(), other=st.binary())
def test_a_signature_is_for_exactly_these_bytes_and_this_secret(body: bytes, other: bytes) -> None:
    header = callbacks.signature("secret", body)
    assert callbacks.is_signed("secret", body, header)
    assert not callbacks.is_signed("another", body, header)
    if other != body:
        assert not callbacks.is_signed("secret", other, header)


@given(header=st.none() | st.text())
def test_anything_else_is_no_signature(header: str | None) -> None:
    assert not callbacks.is_signed("secret", b"{}", header)


def test_the_signature_is_the_one_psik_makes() -> None:
    psik_web = pytest.importorskip("psik.web")
    psik_web.verify_signature("{}", "secret", callbacks.signature("secret", b"{}"))


def test_paths_in_a_configuration_are_relative_to_it(tmp_path: Path) -> None:
    file = tmp_path / "api.yaml"
    file.write_text("credentials: api\njob_service: {url: https://localhost:8447}\nbuffer: {credentials: buffer}\n")
    config = load_config(file)
    assert config.credentials == tmp_path / "api"
    assert config.buffer.credentials == tmp_path / "buffer"
    assert config.callback_base == "https://127.0.0.1:8446/v1/callback"


def test_options_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "api.yaml"
    file.write_text("credentials: api\nport: 1\njob_service: {url: https://localhost:8447}\n")
    config = load_config(file, port=2, **{"job_service.url": "https://elsewhere:1"})
    assert (config.port, config.job_service.url) == (2, "https://elsewhere:1")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("credentials: a", "job_service: is missing"),
        ("credentials: a\njob_service: {url: https://x}\ncolour: red", "colour: no such key"),
        ("credentials: a\njob_service: {url: http://x}", "job_service.url: String should match"),
        ("credentials: a\njob_service: {url: https://x}\nports: {first: 5, last: 6}", "fewer than the three"),
        ("credentials: a\njob_service: {url: https://x}\nlimits_s: {done: 5}", "done is an end and has no limit"),
        ("credentials: a\njob_service: {url: https://x}\nbuffer: {script: '{wrong}'}", "unknown placeholder {wrong}"),
        ("credentials: a\njob_service: {url: https://x}\nengine: {ranks: 9, max_ranks: 2}", "more than max_ranks 2"),
        ("credentials: a\njob_service: {url: https://x}\nbuffer: {spill: /s, script: 'true'}", "has no {spill}"),
        ("- a", "must be a mapping of keys to values, at least credentials and job_service"),
        (": :", "no YAML"),
    ],
)
def test_a_wrong_configuration_is_told_with_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "api.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load_config(file)
    assert str(file) in str(error.value)
    assert said in str(error.value)


def test_limits_of_the_configuration_replace_the_defaults(settings: Callable[..., ApiConfig]) -> None:
    config = settings(limits_s={"draining": 5})
    assert config.limit_s(State.draining) == 5
    assert config.limit_s(State.ready) == 3600
    assert config.limit_s(State.done) is None


def test_a_users_data_handlers_are_replaced_by_the_buffer(
    settings: Callable[..., ApiConfig], configuration: dict[str, Any]
) -> None:
    document = launch.with_buffers(configuration, ["tcp://h:1"], settings())
    (handler,) = document["data_handlers"]
    assert (handler["urls"], handler["role"], handler["library"]) == (["tcp://h:1"], "client", "zmq")
    assert configuration["data_handlers"][0]["type"] == "BinaryFileWritingDataHandler", "the request is not changed"
    del configuration["data_handlers"]
    launch.checked(configuration, settings())


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"data_sources": {"x": {"type": "Psana2DetectorInterface", "psana_name": "jf"}}}, "data_sources.x"),
        ({"colour": "red"}, "colour"),
        (
            {"processing_pipeline": {"type": "BatchProcessingPipeline", "batch_size": 0}},
            "processing_pipeline.batch_size",
        ),
        ({"event_source": {"type": "Nonsense"}}, "event_source.type"),
    ],
)
def test_a_wrong_field_is_told_by_its_path(
    settings: Callable[..., ApiConfig], configuration: dict[str, Any], change: dict[str, Any], place: str
) -> None:
    with pytest.raises(launch.RequestRefusedError) as error:
        launch.checked({**configuration, **change}, settings())
    assert f"body.{place}" in ["/".join(path).replace("/", ".") for path, _ in error.value.problems]


def test_older_spellings_are_accepted_and_told(
    settings: Callable[..., ApiConfig], configuration: dict[str, Any]
) -> None:
    configuration["data_serializer"] = {**configuration["data_serializer"], "type": "HDF5Serializer"}
    _, notes = launch.checked(configuration, settings())
    assert any("HDF5BinarySerializer" in note for note in notes)


def test_psanas_own_division_needs_three_ranks_and_two_of_them_do_not_send(
    settings: Callable[..., ApiConfig], configuration: dict[str, Any]
) -> None:
    configuration["event_source"] = {"type": "Psana2EventSource", "division": "psana"}
    configuration["source_identifier"] = "exp=tmox42619,run=7"
    parameters, _ = launch.checked(configuration, settings())
    assert launch.sending_ranks(parameters, 5) == 3
    with pytest.raises(launch.RequestRefusedError, match="at least 3 ranks"):
        launch.sending_ranks(parameters, 2)


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 4), ("float", 8), ("uint16", 2), ("<f8", 8), ("i2", 2), ("double", 8), ("int", 8)]
)
def test_what_an_internal_source_gives_is_known_beforehand(
    settings: Callable[..., ApiConfig], configuration: dict[str, Any], dtype: str, size: int
) -> None:
    configuration["data_sources"] = {
        "random": {"type": "GenericRandomNumpyArray", "array_shape": "3,5", "array_dtype": dtype},
        "one": {"type": "FloatValue", "value": 1.0},
    }
    parameters, _ = launch.checked(configuration, settings())
    # 20 events over 3 ranks are 7, 7 and 6; a batch of 5 makes two messages of each.
    assert plan.estimate(parameters, 3) == plan.Estimate(events=20, messages=6, bytes=20 * (15 * size + 8))


def test_what_only_the_data_can_tell_is_not_guessed(
    settings: Callable[..., ApiConfig], configuration: dict[str, Any]
) -> None:
    configuration["event_source"] = {"type": "Psana2EventSource"}
    configuration["source_identifier"] = "exp=tmox42619,run=7"
    parameters, _ = launch.checked(configuration, settings())
    assert plan.estimate(parameters, 1) == plan.Estimate(None, None, None)
    configuration["source_identifier"] = "exp=tmox42619,run=7,max_events=0"
    parameters, _ = launch.checked(configuration, settings())
    assert plan.estimate(parameters, 1) == plan.Estimate(None, None, None)
    configuration["source_identifier"] = "exp=tmox42619,run=7,max_events=11"
    configuration["data_sources"] = {
        "i": {"type": "Psana2DetectorInterface", "psana_name": "a", "psana_fields": "raw.raw"}
    }
    configuration["data_serializer"]["fields"] = {"i": "/i"}
    parameters, _ = launch.checked(configuration, settings())
    assert plan.estimate(parameters, 1) == plan.Estimate(11, 3, None)


def row(**changes: Any) -> TransferRow:
    endpoint = {"input": "tcp://h:1", "output": "tcp://h:2", "status": "https://h:3"}
    return TransferRow(**{"id": 7, "ranks": 4, "producers": 2, "endpoints": [endpoint], "sentinel": 1, **changes})


def test_the_job_scripts_carry_ports_names_and_ranks_and_quote_everything(settings: Callable[..., ApiConfig]) -> None:
    config = settings(buffer={"capacity": "2 GiB"})
    buffer = launch.buffer_job(row(), 0, config)
    assert "--name transfer-7-0 --in tcp://h:1 --out tcp://h:2 --capacity '2 GiB' --producers 2" in buffer.script
    assert "--status https://h:3" in buffer.script
    assert "--sentinel 1 " in buffer.script
    assert "--sentinel 0 " in launch.buffer_job(row(sentinel=0), 0, config).script
    assert f"--tls-ca {config.credentials}/known_clients/org.crt --summary buffer.json" in buffer.script
    assert buffer.callback == "https://127.0.0.1:8446/v1/callback/forwarder"
    engine = launch.engine_job(row(), config)
    assert "mpiexec -n 4 lclstreamer --config lclstreamer.json" in engine.script
    assert engine.resources.processes == 4
    assert engine.cb_secret != buffer.cb_secret


def test_without_one_clear_issuer_the_service_says_which_key_to_set(
    settings: Callable[..., ApiConfig], tmp_path: Path
) -> None:
    (tmp_path / "known_clients").mkdir()
    for name in ("a.crt", "b.crt"):
        (tmp_path / "known_clients" / name).touch()
    with pytest.raises(ConfigError, match=r"holds 2 issuers .*buffer: \{issuer: PATH\}"):
        launch.issuer_of_status_readers(settings().buffer, tmp_path)
    issuer = tmp_path / "known_clients" / "b.crt"
    assert launch.issuer_of_status_readers(settings(buffer={"issuer": str(issuer)}).buffer, tmp_path) == issuer


def test_encrypted_data_sockets_give_the_engine_paths_of_its_certificate(
    settings: Callable[..., ApiConfig], tmp_path: Path
) -> None:
    (tmp_path / "known_servers").mkdir()
    service = settings(ports={"scheme": "tls+tcp"}, engine={"credentials": str(tmp_path)})
    for name in ("a.crt", "b.crt"):
        (tmp_path / "known_servers" / name).touch()
    with pytest.raises(ConfigError, match=r"known_servers holds 2 issuers .*engine: \{issuer: PATH\}"):
        launch.engine_certificates(service)
    (tmp_path / "known_servers" / "org.crt").touch()
    (handler,) = launch.with_buffers({}, ["tls+tcp://127.0.0.1:1"], service)["data_handlers"]
    assert handler["tls"] == {
        "certificate": str(tmp_path / "id.crt"),
        "key": str(tmp_path / "id.key"),
        "ca": str(tmp_path / "known_servers" / "org.crt"),
    }
    (handler,) = launch.with_buffers({}, ["tcp://127.0.0.1:1"], settings())["data_handlers"]
    assert "tls" not in handler
