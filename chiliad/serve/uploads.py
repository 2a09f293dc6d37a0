"""An adapter's two files from a multipart body, straight to disk.

A folder appears under `uploads` complete or not at all: parts go to a hidden folder, which is
renamed when both files are there. Folders are named by chance, never by what a client says.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from chiliad.errors import InvalidRequest, PayloadTooLarge

FILES = {"config": "adapter_config.json", "model": "adapter_model.safetensors"}  # part name -> file
FIELDS = ("name", "replace")
MAX_CONFIG = 2**20  # bytes
MAX_FIELD = 1024  # bytes
_HIDDEN = "incoming-"
_STALE = 3600  # seconds after which nobody is writing any more


@dataclass(slots=True)
class Upload:
    folder: Path
    fields: dict[str, str]


def sweep(uploads: Path) -> None:
    """Remove what an upload left behind when its process died."""
    for folder in uploads.glob(f"{_HIDDEN}*"):
        if time.time() - folder.stat().st_mtime > _STALE:
            shutil.rmtree(folder, ignore_errors=True)


async def receive_upload(request: Request, uploads: Path, limit: int) -> Upload:
    """Read the body into a new folder of `uploads`. Raises InvalidRequest or PayloadTooLarge."""
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest("send multipart/form-data with the parts name, config and model")
    limit += MAX_CONFIG
    too_large = PayloadTooLarge(f"the upload is larger than {limit} bytes")
    if int(request.headers.get("content-length", 0)) > limit:
        raise too_large
    token = secrets.token_hex(12)
    hidden, folder = uploads / (_HIDDEN + token), uploads / token
    hidden.mkdir(parents=True)
    try:
        parts = _Parts(hidden)
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": parts.begin,
                "on_header_field": parts.header_field,
                "on_header_value": parts.header_value,
                "on_header_end": parts.header_end,
                "on_headers_finished": parts.open,
                "on_part_data": parts.data,
                "on_part_end": parts.end,
                "on_end": parts.finish,
            },
        )
        received = 0
        try:
            async for piece in request.stream():
                received += len(piece)
                if received > limit:
                    raise too_large
                parser.write(piece)
        except MultipartParseError as error:
            raise InvalidRequest(f"the multipart body is broken: {error}") from None
        finally:
            parts.close()
        parts.check()
        await asyncio.to_thread(_publish, hidden, folder)
        return Upload(folder, parts.fields)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def _publish(hidden: Path, folder: Path) -> None:
    """Atomic and durable: after a crash the folder is whole or absent."""
    for path in (*hidden.iterdir(), hidden):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    hidden.rename(folder)
    descriptor = os.open(folder.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


@dataclass(slots=True)
class _Parts:
    """Callbacks of the parser: known parts only, each once."""

    folder: Path
    fields: dict[str, str] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _header: bytes = b""
    _value: bytes = b""
    _disposition: bytes = b""
    _name: str = ""
    _file: BinaryIO | None = None
    _field: bytes = b""
    _written: int = 0
    _ended: bool = False

    def begin(self) -> None:
        self._disposition = b""

    def header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def open(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("latin-1")
        filename = options.get(b"filename", b"").decode("latin-1")
        for part, wanted in FILES.items():
            if filename == wanted:
                name = part
        if name not in FILES and name not in FIELDS:
            raise InvalidRequest(
                f"unknown part {name[:80]!a}: send name, replace, config ({FILES['config']}) "
                f"and model ({FILES['model']})"
            )
        if name in self._seen:
            raise InvalidRequest(f"part {name!r} comes twice", param=name)
        self._seen.add(name)
        self._name, self._field, self._written = name, b"", 0
        if name in FILES:
            self._file = (self.folder / FILES[name]).open("xb")

    def data(self, data: bytes, start: int, end: int) -> None:
        self._written += end - start
        limit = {"config": MAX_CONFIG, "model": 2**62}.get(self._name, MAX_FIELD)
        if self._written > limit:
            raise PayloadTooLarge(f"part {self._name!r} is larger than {limit} bytes", param=self._name)
        if self._file is not None:
            self._file.write(data[start:end])
        else:
            self._field += data[start:end]

    def end(self) -> None:
        if self._file is not None:
            self.close()
            return
        try:
            self.fields[self._name] = self._field.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"part {self._name!r} is not UTF-8", param=self._name) from None

    def finish(self) -> None:
        self._ended = True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def check(self) -> None:
        if not self._ended:
            raise InvalidRequest("the multipart body ends too early")
        for name in ("name", *FILES):
            if name not in self._seen:
                raise InvalidRequest(f"part {name!r} is missing", param=name)
