"""The wire codecs: whatever comes, in whatever pieces, gives the same messages or a `WireError`, nothing else."""

from __future__ import annotations

import struct
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nngstream.errors import WireError
from nngstream.outlet import translate
from nngstream.wire import Format, Scanner, sp, zmtp

FORMATS = [sp.SP, sp.SP_IPC, zmtp.ZMTP]
parts_of_messages = st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=4), max_size=20)


def encode(wire: Format, messages: list[list[bytes]]) -> bytes:
    out = b""
    for message in messages:
        parts = message if wire.multipart else [b"".join(message)]
        for number, part in enumerate(parts, 1):
            out += wire.header(len(part), number < len(parts)) + part
    return out


def scan_all(
    scanner: Scanner, wire: Format, data: bytes, cuts: list[int]
) -> tuple[list[list[bytes]], int, list[bytes]]:
    """Feed `data` in pieces that end at `cuts`; command frames are skipped as the inlet does."""
    ends: array[int] = array("Q")
    payload = position = 0
    commands = []
    view = memoryview(bytearray(data))
    end = 0
    for cut in [*sorted(min(cut, len(data)) for cut in cuts), len(data)]:
        taken = sum(len(command) for command in commands)
        end = max(end, cut - taken)
        while True:
            scan = scanner.scan(view, position, end, ends)
            assert position <= scan.position <= end
            payload += scan.payload
            position = scan.position
            if scan.command is None:
                assert scan.position + scan.need > end, "it stops only where bytes are missing"
                break
            after = position + scan.command_size
            commands.append(bytes(view[position:after]))
            view[position : len(view) - scan.command_size] = view[after:]
            end -= scan.command_size
    messages = []
    begin = 0
    for stop in ends:
        messages.append([bytes(view[a:b]) for a, b in wire.parts(view, begin, stop)])
        begin = stop
    return messages, payload, commands


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.name)
@given(messages=parts_of_messages, cuts=st.lists(st.integers(0, 3000), max_size=8))
def test_messages_are_found_wherever_the_stream_is_cut(wire, messages, cuts):
    found, payload, _ = scan_all(wire.scanner(), wire, encode(wire, messages), cuts)
    assert found == (messages if wire.multipart else [[b"".join(message)] for message in messages])
    assert payload == sum(len(part) for message in messages for part in message)


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.name)
@settings(deadline=None)
@given(
    runs=st.lists(st.tuples(st.integers(1, 300), st.sampled_from([0, 1, 2, 255, 256])), max_size=4),
    cuts=st.lists(st.integers(0, 40000), max_size=3),
)
def test_long_runs_of_messages_of_one_size_are_found_to_their_last(wire, runs, cuts):
    messages = [[bytes([number % 251]) * size] for number, (count, size) in enumerate(runs) for _ in range(count)]
    found, payload, _ = scan_all(wire.scanner(), wire, encode(wire, messages), cuts)
    assert found == messages
    assert payload == sum(count * size for count, size in runs)


def test_a_wrong_frame_in_a_run_of_equal_ones_is_not_passed_over():
    run = zmtp.ZMTP.header(300, False) + bytes(300)
    for wrong in (b"\x08", b"\x10"):
        with pytest.raises(WireError, match="unknown flags"):
            scan_all(zmtp.ZMTP.scanner(), zmtp.ZMTP, 50 * run + wrong + run[1:] + 50 * run, [])
    messages, _, commands = scan_all(zmtp.ZMTP.scanner(), zmtp.ZMTP, 50 * run + zmtp.ping(1) + 50 * run, [])
    assert (len(messages), len(commands)) == (100, 1)


@given(
    messages=st.lists(st.lists(st.binary(max_size=300), min_size=1, max_size=3), min_size=1, max_size=8),
    where=st.lists(st.integers(0, 30), max_size=5),
    cuts=st.lists(st.integers(0, 3000), max_size=5),
)
def test_commands_between_frames_even_inside_a_message_change_nothing(messages, where, cuts):
    frames = [
        zmtp.ZMTP.header(len(part), number < len(message)) + part
        for message in messages
        for number, part in enumerate(message, 1)
    ]
    ping = zmtp.ping(1.5)
    for index in where:
        frames.insert(min(index, len(frames)), ping)
    found, _, commands = scan_all(zmtp.ZMTP.scanner(), zmtp.ZMTP, b"".join(frames), cuts)
    assert found == messages
    assert commands == [ping] * len(where)


@pytest.mark.parametrize("wire", FORMATS, ids=lambda wire: wire.name)
@given(data=st.binary(max_size=600), cuts=st.lists(st.integers(0, 600), max_size=4))
def test_garbage_is_messages_or_a_wire_error(wire, data, cuts):
    try:
        found, payload, commands = scan_all(wire.scanner(), wire, data, cuts)
    except WireError:
        return
    assert payload == sum(len(part) for message in found for part in message)
    assert payload + sum(map(len, commands)) <= len(data)


@given(data=st.binary(max_size=100))
def test_any_greeting_ready_and_command_is_read_or_refused(data):
    for read in (sp.read_greeting, zmtp.read_greeting, zmtp.read_properties, zmtp.read_command, zmtp.pong):
        try:
            read(data)
        except WireError:
            continue


@given(parts=st.lists(st.binary(max_size=600), min_size=1, max_size=4))
@pytest.mark.parametrize("source", FORMATS, ids=lambda wire: f"from {wire.name}")
@pytest.mark.parametrize("target", FORMATS, ids=lambda wire: f"to {wire.name}")
def test_a_message_keeps_its_bytes_in_every_other_format(source, target, parts):
    data = memoryview(encode(source, [parts]))
    pieces = b"".join(translate(target, data, source.parts(data, 0, len(data))))
    found, _, _ = scan_all(target.scanner(), target, pieces, [])
    assert [b"".join(message) for message in found] == [b"".join(parts)]
    if source.multipart and target.multipart:
        assert found == [parts]


def test_greetings_are_those_of_the_specifications():
    assert sp.greeting(sp.PUSH) == bytes.fromhex("00 53 50 00 00 50 00 00")
    assert sp.read_greeting(bytes.fromhex("00 53 50 00 00 51 00 00")) == sp.PULL
    assert len(zmtp.greeting()) == 64
    assert zmtp.read_greeting(zmtp.greeting()) == (3, 1, "NULL")
    assert zmtp.ready("PULL").startswith(b"\x04\x27\x05READY\x0bSocket-Type\x00\x00\x00\x04PULL")
    assert zmtp.read_properties(zmtp.read_command(zmtp.ready("PUSH", Extra="x")[2:])[1]) == {
        "socket-type": b"PUSH",
        "identity": b"",
        "extra": b"x",
    }


def test_a_ping_is_answered_with_its_context():
    name, data = zmtp.read_command(zmtp.command("PING", b"\x00\x0acontext")[2:])
    assert name == "PING"
    assert zmtp.read_command(zmtp.pong(data)[2:]) == ("PONG", b"context")


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (b"\x08\x00", "unknown flags 0x08"),
        (b"\x05\x00", "unknown flags 0x05"),
        (b"\x02" + struct.pack(">Q", 1 << 63), "more than 2\\^63"),
        (b"\x06" + struct.pack(">Q", 1 << 40), "command of 1099511627776 bytes"),
    ],
)
def test_frames_that_zmtp_forbids_are_refused_by_their_header(frame, message):
    with pytest.raises(WireError, match=message):
        zmtp.ZMTP.scanner().scan(memoryview(frame), 0, len(frame), array("Q"))


def test_ipc_messages_of_another_type_are_refused():
    with pytest.raises(WireError, match="unknown type 0x02"):
        sp.SP_IPC.scan(memoryview(b"\x02" + bytes(8)), 0, 9, array("Q"))


def test_a_length_that_has_not_come_wholly_is_not_guessed():
    ends: array[int] = array("Q")
    assert sp.SP.scan(memoryview(b"\xff" * 7), 0, 7, ends).need == 8
    assert sp.SP.scan(memoryview(b"\xff" * 8), 0, 8, ends).need == 8 + 2**64 - 1
    assert zmtp.ZMTP.scanner().scan(memoryview(b"\x02"), 0, 1, ends).need == 9
    assert not ends
