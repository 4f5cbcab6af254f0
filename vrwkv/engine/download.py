"""Download whole files: resume after an interruption, check the length and the hash."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch

try:
    import fcntl
except ImportError:  # Windows has no file locks: download a file in one process only
    fcntl = None

#: Seconds without a byte after which a connection counts as broken.
TIMEOUT = 60
_CHUNK = 1 << 20


class DownloadError(RuntimeError):
    """The file could not be downloaded whole."""


class AbsentError(DownloadError):
    """The server has no such file."""


class _InterruptedError(DownloadError):
    """The download was interrupted."""


def download(
    url: str, path: str | os.PathLike, sha256: str | None = None, progress: bool = True
) -> None:
    """Download a file, unless it is there.

    The file appears under its name once it is whole. Until then it is ``<name>.part``. An
    interrupted download, of this process or an earlier one, resumes if the server supports that
    (HTTP ranges with an ``ETag`` or ``Last-Modified``, so that a changed file is downloaded anew).
    If several processes want the same file, one downloads it and the others wait.

    Args:
        url: An ``http://`` or ``https://`` address.
        path: Path of the file to write.
        sha256: The file's SHA-256 in hexadecimal, or its first digits.
        progress: Whether to show a progress bar.

    Raises:
        DownloadError: If the server cannot be reached or refuses, the connection is lost and the
            download cannot be resumed at once, the disk is full, or the hash is wrong. The
            received part is kept as ``<name>.part`` if the download can be resumed later.
    """
    path = Path(path)
    part, tag = (path.with_name(path.name + suffix) for suffix in ('.part', '.part.tag'))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_alone(part) as stream:
        keep = False
        try:
            if path.is_file():
                return
            _fetch(url, stream, tag, progress)
            _check_hash(stream, sha256)
            if fcntl is None:
                stream.close()  # Windows renames no open file
            part.replace(path)
        except _InterruptedError as error:
            keep = tag.is_file() and _size(stream) > 0
            if not keep:
                raise
            raise DownloadError(
                f'{error}. The received {_size(stream):,} bytes are kept: the next attempt '
                'continues from there'
            ) from error
        except KeyboardInterrupt:
            keep = tag.is_file()
            raise
        finally:
            if not keep:
                tag.unlink(missing_ok=True)
                part.unlink(missing_ok=True)


@contextmanager
def _open_alone(part: Path) -> Iterator[BinaryIO]:
    """Open a file for appending after no other process holds it open through this function."""
    while True:
        with part.open('a+b', buffering=0) as stream:
            if fcntl is not None:
                fcntl.flock(stream, fcntl.LOCK_EX)
                # The previous process may have renamed or removed it.
                own = os.fstat(stream.fileno())
                if not part.is_file() or not os.path.samestat(own, part.stat()):
                    continue
            yield stream
            return


def _fetch(url: str, stream: BinaryIO, tag: Path, progress: bool) -> None:
    """Request the file until it is whole; stop when an attempt makes no progress."""
    furthest = _size(stream)
    while True:
        try:
            _fetch_rest(url, stream, tag, progress)
        except HTTPError as error:
            if error.code == 416:  # no bytes beyond these: the file is whole, or has changed
                if error.headers.get('Content-Range') == f'bytes */{_size(stream)}':
                    return
                stream.truncate(0)
                continue
            passing = error.code >= 500 or error.code == 429
            kind = AbsentError if error.code == 404 else DownloadError
            raise (_InterruptedError if passing else kind)(
                f'the server answers {error.code} {error.reason}'
            ) from error
        except (_InterruptedError, http.client.HTTPException, OSError) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DownloadError(
                    f'the disk of {tag.parent} is full. Make room there, or choose another cache '
                    'with the environment variable TORCH_HOME'
                ) from error
            if _size(stream) > furthest:
                furthest = _size(stream)
                continue
            if isinstance(error, URLError):
                host = urlparse(url).hostname
                raise _InterruptedError(
                    f'there is no connection to {host} ({error.reason})'
                ) from error
            raise _InterruptedError(f'the connection was lost ({error})') from error
        else:
            return


def _fetch_rest(url: str, stream: BinaryIO, tag: Path, progress: bool) -> None:
    """Request the missing part of the file, once."""
    headers = {'User-Agent': 'vision-rwkv', 'Accept-Encoding': 'identity'}
    if _size(stream) and tag.is_file():
        headers |= {'Range': f'bytes={_size(stream)}-', 'If-Range': tag.read_text()}
    with urlopen(Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status == 206:
            served = response.headers.get('Content-Range', '')
            if not re.match(rf'bytes {_size(stream)}-', served):
                stream.truncate(0)
                raise DownloadError(f'the server sent a wrong part of the file: {served!r}')
        else:
            stream.truncate(0)
            tag.unlink(missing_ok=True)
            validator = response.headers.get('ETag') or response.headers.get('Last-Modified', '')
            # A weak validator says nothing about single bytes.
            if response.headers.get('Accept-Ranges') == 'bytes' and validator[:2] not in ('', 'W/'):
                tag.write_text(validator)
        start = _size(stream)
        length = response.headers.get('Content-Length')
        total = None if length is None else start + int(length)
        with torch.hub.tqdm(
            total=total,
            initial=start,
            disable=not progress,
            unit='B',
            unit_scale=True,
            unit_divisor=1024,
        ) as bar:
            # read1 returns the received bytes; read would lose them if the connection breaks.
            while chunk := response.read1(_CHUNK):
                _write(stream, chunk)
                bar.update(len(chunk))
        os.fsync(stream.fileno())
    if total is not None and _size(stream) != total:
        raise _InterruptedError(f'received {_size(stream):,} of {total:,} bytes')


def _write(stream: BinaryIO, chunk: bytes) -> None:
    """Write a whole chunk: an unbuffered stream may write less in one call."""
    rest = memoryview(chunk)
    while rest:
        rest = rest[stream.write(rest) :]


def _check_hash(stream: BinaryIO, expected: str | None) -> None:
    if expected is None:
        return
    digest = hashlib.sha256()
    stream.seek(0)
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    actual = digest.hexdigest()
    if not actual.startswith(expected.lower()):
        raise DownloadError(
            f'its SHA-256 is wrong: expected "{expected}", got "{actual[: len(expected)]}". The '
            'file was damaged or replaced in transfer'
        )


def _size(stream: BinaryIO) -> int:
    return os.fstat(stream.fileno()).st_size
