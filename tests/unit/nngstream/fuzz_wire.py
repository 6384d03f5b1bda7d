"""Fuzz the wire parsers: whatever comes, in whatever pieces, they find what a slow and simple reading of it finds.

    python tests/unit/nngstream/fuzz_wire.py -max_total_time=600 CORPUS_FOLDER

The arguments are libFuzzer's; inputs that broke something are written as ``crash-*``, and give it again when named as
the only argument. Needs ``atheris``.
"""

from __future__ import annotations

import sys
from array import array
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[3]))
with atheris.instrument_imports(include=["nngstream.wire"]):
    from nngstream.wire import Format, sp, zmtp
import contextlib

from nngstream.errors import WireError

FORMATS: tuple[Format, ...] = (sp.SP, sp.SP_IPC, zmtp.ZMTP)
#: Where each message ends, payload bytes, bodies of commands, and what is refused (if anything).
Found = tuple[list[int], int, list[bytes], bool]


def read_simply(wire: Format, data: bytes) -> Found:
    """What the specifications say, a frame at a time; ends count the bytes of commands taken out."""
    ends: list[int] = []
    commands: list[bytes] = []
    position = payload = partial = removed = 0
    while True:
        rest = data[position:]
        if isinstance(wire, sp.SpFormat):
            head = wire.header_size
            if len(rest) < head:
                return ends, payload, commands, False
            if head == 9 and rest[0] != 1:
                return ends, payload, commands, True
            flags, length = 0, int.from_bytes(rest[head - 8 : head], "big")
        else:
            if len(rest) < 2:
                return ends, payload, commands, False
            flags, head = rest[0], 9 if rest[0] & zmtp.LONG else 2
            if head == 9 and len(rest) < 9 and flags <= 7 and flags & 5 != 5:
                return ends, payload, commands, False
            length = int.from_bytes(rest[1:head], "big")
            if flags > 7 or flags & 5 == 5 or length >> 63 or (flags & zmtp.COMMAND and length > zmtp.MAX_COMMAND):
                return ends, payload, commands, True
        if len(rest) < head + length:
            return ends, payload, commands, False
        position += head + length
        if flags & zmtp.COMMAND:
            commands.append(rest[head : head + length])
            removed += head + length
            continue
        partial += length
        if not flags & zmtp.MORE:
            ends.append(position - removed)
            payload += partial
            partial = 0


def read_in_pieces(wire: Format, data: bytes, step: int) -> Found:
    """The scanner, fed as a connection feeds it."""
    scanner = wire.scanner()
    memory = bytearray(len(data))
    view = memoryview(memory)
    ends: array[int] = array("Q")
    commands: list[bytes] = []
    position = end = payload = 0
    for begin in range(0, len(data), step):
        piece = data[begin : begin + step]
        view[end : end + len(piece)] = piece
        end += len(piece)
        while True:
            before = list(ends)
            try:
                scan = scanner.scan(view, position, end, ends)
            except WireError:
                return list(ends), -1, commands, True
            if list(ends[: len(before)]) != before or not position <= scan.position <= end:
                raise AssertionError("a scanner changed what it had found, or went out of its bytes")
            payload += scan.payload
            position = scan.position
            if scan.command is None:
                if scan.position + scan.need <= end:
                    raise AssertionError("a scanner stopped where nothing was missing")
                break
            commands.append(scan.command)
            after = position + scan.command_size
            view[position : end - scan.command_size] = view[after:end]
            end -= scan.command_size
    return list(ends), payload, commands, False


def one_input(data: bytes) -> None:
    """A byte for the format, one for the size of the pieces, one for how often the rest is repeated, the rest."""
    if len(data) < 3:
        return
    wire = FORMATS[data[0] % len(FORMATS)]
    body = (data[3:] * (1 + data[2] % 48))[: 1 << 16]
    ends, payload, commands, refused = read_simply(wire, body)
    got_ends, got_payload, got_commands, got_refused = read_in_pieces(wire, body, 1 + data[1] * data[1])
    if (got_ends, got_commands, got_refused) != (ends, commands, refused):
        raise AssertionError(f"{wire.name}: {got_ends, got_commands, got_refused} instead of {ends, commands, refused}")
    if not refused and got_payload != payload:
        raise AssertionError(f"{wire.name}: {got_payload} bytes of payload instead of {payload}")
    if not commands:
        view, begin, total = memoryview(body), 0, 0
        for stop in ends:
            total += sum(last - first for first, last in wire.parts(view, begin, stop))
            begin = stop
        if total != payload:
            raise AssertionError(f"{wire.name}: the parts have {total} bytes, the messages {payload}")
    for read in (sp.read_greeting, zmtp.read_greeting, zmtp.read_command, zmtp.read_properties, zmtp.pong):
        for size in (8, 64, len(body)):
            with contextlib.suppress(WireError):
                read(body[:size])


def main() -> None:
    """Run libFuzzer."""
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
