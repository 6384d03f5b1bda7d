"""A run as a data set for training: streamed once, read from a local cache ever after.

::

    dataset = StreamDataset("peaknet.yaml", "/scratch/cache", server="https://dtn.example.org:8446",
                            credentials="~/.certified", shuffle_seed=1)
    for epoch in range(10):
        for batch in dataset:                 # lclstream.client.batch.Batch: path -> array, first axis the event
            step(batch["/data/images"])

The first epoch gives batches as they arrive and stores each message. When it is interrupted - by the program, a broken
stream, a signal - the next one gives what is stored, asks for the stream again, and continues with the events that are
not stored yet (told by their exact times, or, without those, by whole messages that are equal). Later epochs do not
touch the network.

With PyTorch, which this module does not need, workers read a filled cache in shares::

    class Frames(StreamDataset, torch.utils.data.IterableDataset):
        def __iter__(self):
            info = torch.utils.data.get_worker_info()
            return self.batches(shard=(info.id, info.num_workers) if info else (0, 1))

    frames = Frames(...); frames.fill()       # once, before the workers start
    loader = torch.utils.data.DataLoader(frames, batch_size=None, num_workers=4)
    for epoch in range(10):
        frames.set_epoch(epoch)               # for `shuffle_seed`: the workers live for one epoch and cannot count
        for batch in loader:
            ...

A cache is a folder ``<cache_dir>/<key>`` with the files ``000000.h5`` and so on (messages as they came; ``.cbor`` for
the Simplon formats, with ``head-000000.cbor`` for what begins and ends a series and says what its images are),
``index.jsonl`` (a line for each of them), ``source.json`` (what it was made from) and, once the end of the stream was
seen, ``complete.json``. Only one process at a time fills it (a lock on ``lock``); any number reads.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml

from lclstream.client.batch import HDF5_SIGNATURE, Batch
from lclstream.client.decoding import Decoder
from lclstream.client.encryption import context_for
from lclstream.client.errors import StreamError
from lclstream.client.pulling import TIMEOUT_S, pull
from lclstream.client.saving import write_whole
from lclstream.consumers.fields import choose, nanoseconds

_URL_SCHEMES = ("tcp://", "ipc://", "tls+tcp://")


class CacheError(StreamError):
    """The cache cannot be used; the message says what to do."""


class StreamDataset:
    """Batches of a run; iterating is one epoch.

    Args:
        source: the engine's configuration (a mapping, or the path of a YAML or JSON file), or a stream's URL.
        cache_dir: folder in which caches lie; made when missing.
        key: name of the cache. Default for a configuration: its SHA-256, so that another configuration never finds
            this data. A URL says nothing about the data behind it, so it needs a key.
        server: transfer service for a configuration.
        credentials: folder of our certificate, for that service and for encrypted streams (``tls+tcp://``).
        library: protocol of the stream.
        timeout_s: longest silence of the stream, in seconds.
        ranks: MPI ranks of the engine; None: the service's default.
        shuffle_seed: order the messages of a complete cache anew in each epoch, reproducibly; None: as they came. With
            workers call :meth:`set_epoch`.

    Raises:
        CacheError: arguments that do not go together, or a configuration that cannot be read.
    """

    def __init__(
        self,
        source: Mapping[str, Any] | Path | str,
        cache_dir: Path | str,
        *,
        key: str | None = None,
        server: str | None = None,
        credentials: Path | str | None = None,
        library: Literal["nng", "zmq"] = "nng",
        timeout_s: float = TIMEOUT_S,
        ranks: int | None = None,
        shuffle_seed: int | None = None,
    ) -> None:
        self._url = source if isinstance(source, str) and source.startswith(_URL_SCHEMES) else None
        self._config = None if self._url else _configuration(source)
        if self._url and key is None:
            raise CacheError(f"{self._url}: give the cache of a URL a key, such as key='mfx101332224-r0007'")
        if self._config is not None and (server is None or credentials is None):
            raise CacheError("a configuration needs server= and credentials= to ask for its stream")
        self.key = key or configuration_key(self._config or {})
        if not self.key or "/" in self.key or self.key.startswith("."):
            raise CacheError(f"key {self.key!r} is no name of a folder")
        self.folder = Path(cache_dir) / self.key
        self._server = server
        self._credentials = credentials
        self._library = library
        self._timeout_s = timeout_s
        self._ranks = ranks
        self._shuffle_seed = shuffle_seed
        self._epoch = 0
        self._decoders: dict[int, Decoder] = {}

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next, for its order with `shuffle_seed`.

        A data set counts the epochs it gives itself. Workers that live for one epoch, as those of a DataLoader without
        ``persistent_workers``, begin each time with the count of the data set they were copied from: without this call
        all epochs would have the same order. Workers that stay count themselves, and do not hear of it.

        Args:
            epoch: its number; the same number gives the same order.
        """
        self._epoch = epoch

    @property
    def complete(self) -> bool:
        """Whether the cache holds the whole stream."""
        return (self.folder / "complete.json").is_file()

    @property
    def cached_events(self) -> int:
        """Events in the cache now."""
        return sum(entry["events"] for entry in self._entries())

    def __iter__(self) -> Iterator[Batch]:
        """One epoch; see :meth:`batches`."""
        return self.batches()

    def batches(self, *, shard: tuple[int, int] = (0, 1)) -> Iterator[Batch]:
        """One epoch of batches.

        Args:
            shard: (which, of how many): only every so many-th message, for workers that share a complete cache.

        Raises:
            CacheError: the cache is damaged, is being filled by another process, or is to be shared and not complete.
            StreamError: the stream broke; what had come is kept, and iterating again continues.
        """
        which, of = shard
        if self.complete:
            entries = self._entries()
            if self._shuffle_seed is not None:
                np.random.default_rng([self._shuffle_seed, self._epoch]).shuffle(entries)
            self._epoch += 1
            for entry in entries[which::of]:
                yield self._read(entry)
            return
        if of > 1:
            raise CacheError(f"cache {self.folder} is not complete: call fill() before several workers read it")
        yield from self._filling()

    def fill(self) -> int:
        """Complete the cache without using the batches; returns the number of events in it.

        Raises:
            StreamError: as :meth:`batches`.
        """
        if not self.complete:
            for _ in self._filling():
                pass
        return self.cached_events

    def _filling(self) -> Iterator[Batch]:
        """Give what is stored, then what the stream has beyond it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            source = {"url": self._url} if self._url else {"configuration": self._config}
            write_whole(self.folder / "source.json", json.dumps(source, indent=2, default=str).encode())
            entries, heads = self._entries(), len(self._heads())
            known = _Known()
            for entry in entries:
                batch = self._read(entry)
                known.add(batch, entry["sha256"])
                yield batch
            total = len(entries)
            for message, content in _decoded(self._stream()):
                if content is None:
                    self._store_head(heads, message)
                    heads += 1
                    continue
                digest = hashlib.sha256(message).hexdigest()
                keep = known.new(content, digest)
                if keep is not None and not len(keep):
                    continue
                stored = content if keep is None else content.only(keep)
                self._store(total, message, digest, stored.events, keep, heads)
                known.add(stored, digest)
                total += 1
                yield stored
            marker = {"key": self.key, "messages": total, "events": self.cached_events}
            write_whole(self.folder / "complete.json", json.dumps(marker).encode())
        self._epoch += 1

    def _stream(self) -> Iterator[bytes]:
        if self._url is not None:
            folder = None if self._credentials is None else Path(self._credentials)
            tls = context_for([self._url], folder, listen=False)
            with pull(self._url, library=self._library, timeout_s=self._timeout_s, tls=tls) as puller:
                yield from puller
            return
        from lclstream.api.client import TransferClient
        from lclstream.client.transferring import Transfer

        assert self._server is not None
        assert self._credentials is not None
        assert self._config is not None
        with (
            TransferClient(self._server, self._credentials) as api,
            Transfer(
                api,
                dict(self._config),
                ranks=self._ranks,
                library=self._library,
                timeout_s=self._timeout_s,
                credentials=self._credentials,
            ) as transfer,
        ):
            yield from transfer.messages()

    def _store(
        self, number: int, message: bytes, digest: str, events: int, keep: npt.NDArray[np.int64] | None, heads: int
    ) -> None:
        hdf5 = message.startswith(HDF5_SIGNATURE)
        name = f"{number:06d}.{'h5' if hdf5 else 'cbor'}"
        entry: dict[str, Any] = {
            "file": name,
            "bytes": len(message),
            "sha256": digest,
            "events": events,
            "keep": None if keep is None else keep.tolist(),
        }
        if not hdf5:
            entry["heads"] = heads
        self._write(name, message, entry)

    def _store_head(self, number: int, message: bytes) -> None:
        """Keep what images after it cannot be read without; it has no events of its own."""
        name = f"head-{number:06d}.cbor"
        self._write(name, message, {"head": name, "bytes": len(message)})

    def _write(self, name: str, message: bytes, entry: Mapping[str, Any]) -> None:
        write_whole(self.folder / name, message)
        # The line comes after the file: a crash between the two leaves a file that is written again, never a line
        # without its file.
        with (self.folder / "index.jsonl").open("a") as index:
            index.write(json.dumps(entry) + "\n")

    def _entries(self) -> list[dict[str, Any]]:
        """What is known of each message with events."""
        return [entry for entry in self._index() if "file" in entry]

    def _heads(self) -> list[dict[str, Any]]:
        return [entry for entry in self._index() if "head" in entry]

    def _index(self) -> list[dict[str, Any]]:
        path = self.folder / "index.jsonl"
        if not path.exists():
            return []
        text = path.read_text()
        if not text.endswith("\n") and not self.complete:
            # A crash cut the last line: its message comes again.
            text = text[: text.rfind("\n") + 1]
            write_whole(path, text.encode())
        try:
            return [json.loads(line) for line in text.splitlines()]
        except ValueError as error:
            raise CacheError(f"{path} is damaged ({error}): delete {self.folder} to stream again") from error

    def _read(self, entry: Mapping[str, Any]) -> Batch:
        decoder = self._decoder(entry.get("heads", 0))
        (batch,) = decoder.feed(self._bytes(entry["file"], entry["bytes"]), name=str(self.folder / entry["file"]))
        return batch if entry["keep"] is None else batch.only(np.array(entry["keep"], np.int64))

    def _decoder(self, heads: int) -> Decoder:
        """A decoder that knows what the stream had said when a message came."""
        if heads not in self._decoders:
            decoder = Decoder()
            for entry in self._heads()[:heads]:
                decoder.feed(self._bytes(entry["head"], entry["bytes"]), name=str(self.folder / entry["head"]))
            self._decoders[heads] = decoder
        return self._decoders[heads]

    def _bytes(self, name: str, size: int) -> bytes:
        path = self.folder / name
        try:
            message = path.read_bytes()
        except OSError as error:
            raise CacheError(f"{path}: {error}; delete {self.folder} to stream again") from error
        if len(message) != size:
            raise CacheError(f"{path} has {len(message)} bytes instead of {size}: delete {self.folder} to stream again")
        return message

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self.folder / "lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise CacheError(
                    f"cache {self.folder} is being filled by process {file.read().strip() or '?'}: wait until it is "
                    "complete, or use another cache_dir"
                ) from error
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield


def _decoded(messages: Iterable[bytes]) -> Iterator[tuple[bytes, Batch | None]]:
    """Messages with what is in them; None for one that has no events and only says what others mean.

    Simplon 1.8 images that come before the start message, which says their shape, are given after it.
    """
    decoder = Decoder()
    waiting: list[bytes] = []
    for number, message in enumerate(messages):
        batches = decoder.feed(message, name=f"message {number}")
        if message[:1] == b"m" and not batches:
            waiting.append(message)
        elif message[:1] == b"c" or not batches:
            yield message, None
            if batches:  # a stop message may come before the start message, or without one
                yield from zip(waiting, batches, strict=True)
                waiting.clear()
        else:
            yield message, batches[0]
    decoder.end()


class _Known:
    """Which events are stored: by their exact times where messages have them, else by whole messages."""

    def __init__(self) -> None:
        self._times: set[int] = set()
        self._messages: set[str] = set()

    def add(self, batch: Batch, digest: str) -> None:
        self._messages.add(digest)
        times = _times(batch)
        if times is not None:
            self._times.update(times.tolist())

    def new(self, batch: Batch, digest: str) -> npt.NDArray[np.int64] | None:
        """Events of the batch that are not stored, as indices; None for all of them."""
        if digest in self._messages:
            return np.empty(0, np.int64)
        times = _times(batch)
        if times is None:
            return None
        fresh = np.array([time not in self._times for time in times.tolist()], bool)
        return None if fresh.all() else np.nonzero(fresh)[0]


def _times(batch: Batch) -> npt.NDArray[np.int64] | None:
    fields = choose(batch)
    return nanoseconds(batch[fields.timestamp]) if fields.timestamp is not None and fields.exact else None


def configuration_key(config: Mapping[str, Any]) -> str:
    """The cache key of a configuration: SHA-256 of its canonical JSON.

    `data_handlers` does not count: it says where the data go, not what they are, and the transfer service sets its own.
    """
    relevant = {name: value for name, value in config.items() if name != "data_handlers"}
    text = json.dumps(relevant, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _configuration(source: Mapping[str, Any] | Path | str) -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    path = Path(source)
    try:
        config = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise CacheError(f"configuration {path}: {error}") from error
    if not isinstance(config, dict):
        raise CacheError(f"configuration {path} holds {type(config).__name__}, not a mapping of sections")
    return config
