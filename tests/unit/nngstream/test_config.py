"""Options: sizes, addresses, and what contradicts itself."""

from __future__ import annotations

import subprocess
import sys

import pytest

from nngstream.config import BufferConfig, checked, parse_size
from nngstream.errors import ConfigurationError
from nngstream.url import parse

ENDS = {"in": ["tcp://127.0.0.1:0"], "out": ["tcp://127.0.0.1:0"]}


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("512 MB", 512_000_000), ("1.5kB", 1500), ("4096", 4096), (4096, 4096), ("64KiB", 65536)],
)
def test_sizes_are_read_with_their_units(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "8Gb", "-1", "1e9", True, "8 GiB each"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "meaning"),
    [
        ("tcp://127.0.0.1:5000", "tcp://127.0.0.1:5000"),
        ("tcp://*:5000", "tcp://0.0.0.0:5000"),
        ("tcp://[::1]:5000", "tcp://[::1]:5000"),
        ("tls+tcp://dtn.example.org:1", "tls+tcp://dtn.example.org:1"),
        ("ipc:///run/x", "ipc:///run/x"),
        ("dial+tls+tcp://h:2", "dial+tls+tcp://h:2"),
        ("dial+ipc:///run/x", "dial+ipc:///run/x"),
    ],
)
def test_addresses_are_read_and_written(text, meaning):
    assert str(parse(text)) == meaning


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5000", "must begin with one of"),
        ("tcp://host", "HOST:PORT"),
        ("tcp://host:99999", "HOST:PORT"),
        ("tcp://:5000", "HOST:PORT"),
        ("ipc://x", "absolute path"),
        ("ipc:///" + "x" * 200, "at most 107 bytes"),
        ("dial+tcp://host:0", "port 0"),
        ("http://127.0.0.1:1", "must begin with one of"),
    ],
)
def test_what_is_no_address_is_refused(text, message):
    with pytest.raises(ConfigurationError, match=message):
        parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in": []}, "options: in: List should have at least 1 item"),
        ({"colour": "red"}, "options: colour: Extra inputs are not permitted \\(given: 'red'\\)"),
        ({"capacity": 100}, "capacity: Input should be greater than or equal to 65536"),
        ({"grace": -1}, "grace"),
        ({"status": "http://192.168.0.1:5002"}, "use https:// or 127.0.0.1"),
        ({"status": "https://127.0.0.1:5002"}, "needs certificates"),
        ({"tls": {"certificate": "a", "key": "b", "ca": "c"}}, "no tls\\+tcp:// or https:// address uses them"),
        ({"route": "8:u32le"}, "at least two of --out"),
        ({"route": "8:u24", "out": ["tcp://h:1", "tcp://h:2"]}, "route: '8:u24' is no route: write OFFSET:TYPE"),
        ({"in": ["tcp://h:1"], "out": ["tcp://h:1"]}, "given twice"),
    ],
)
def test_wrong_options_are_named(change, message):
    with pytest.raises(ConfigurationError, match=message):
        checked(ENDS | change, "options")


def test_the_model_is_written_and_read_back():
    config = checked(ENDS | {"capacity": "2GiB", "sentinel": 3}, "options")
    assert BufferConfig.model_validate(config.model_dump(by_alias=True)) == config


def test_importing_the_model_needs_nothing_of_the_buffer():
    code = "import nngstream.config, sys; print(sorted(m for m in sys.modules if m.startswith('nngstream')))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "['nngstream', 'nngstream.config', 'nngstream.errors', 'nngstream.route', 'nngstream.url']"


TLS = {"certificate": "/c", "key": "/k", "ca": "/a"}
TLS_ENDS = {"in": ["tls+tcp://127.0.0.1:0"], "out": ["tls+tcp://127.0.0.1:0"]}


@pytest.mark.parametrize(
    ("text", "login", "issuer"),
    [
        ("ada", "ada", None),
        (" ada ", "ada", None),
        ("ada@CN=site", "ada", "CN=site"),
        (
            "ada@2.5.4.65=Signing Certificate,OU=lclstream,O=s3df",
            "ada",
            "2.5.4.65=Signing Certificate,OU=lclstream,O=s3df",
        ),
        ("ada@site.example@CN=site,1.2.3=x@y", "ada@site.example", "CN=site,1.2.3=x@y"),
        ("ada@site.example", "ada@site.example", None),
    ],
)
def test_who_may_come_is_a_login_or_a_login_of_an_issuer(text, login, issuer):
    config = checked({**TLS_ENDS, "tls": {**TLS, "consumers": [text]}}, "x.yaml")
    assert config.tls is not None
    ((one,),) = [config.tls.allowed("out")]
    assert (one.login, one.issuer) == (login, issuer)
    assert config.tls.allowed("in") is None


@pytest.mark.parametrize("empty", [None, [], "ada", {}])
def test_a_list_that_names_nobody_is_refused_instead_of_letting_everybody_in(empty):
    with pytest.raises(ConfigurationError, match=r"x.yaml: tls.consumers: list at least one `login`"):
        checked({**TLS_ENDS, "tls": {**TLS, "consumers": empty}}, "x.yaml")


@pytest.mark.parametrize(("key", "side"), [("producers", "in"), ("consumers", "out")])
@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "ipc:///run/x"])
def test_a_list_for_a_side_that_asks_nobody_who_he_is_is_refused(key, side, address):
    with pytest.raises(ConfigurationError, match=rf"tls.{key} says who may come, but {address} asks nobody"):
        checked({**TLS_ENDS, side: [*TLS_ENDS[side], address], "tls": {**TLS, key: ["ada"]}}, "x.yaml")
