"""Downloads: resumed where they broke off, checked, and whole or not there at all."""

import errno
import hashlib
import http.server
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vrwkv.engine import download as module
from vrwkv.engine.download import DownloadError, download

DATA = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(DATA).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves ``data``, and breaks off each reply after as many bytes as ``cuts`` says."""

    def __init__(self):
        super().__init__(('127.0.0.1', 0), Handler)
        self.data, self.tag, self.ranges, self.status = DATA, '"one"', True, None
        self.cuts, self.requests = [], []
        self.url = f'http://127.0.0.1:{self.server_port}/file.pth'


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = self.headers.get('Range')
        server.requests.append(wanted)
        if server.status:
            self.send_error(server.status)
            return
        data, start = server.data, 0
        partial_reply = server.ranges and wanted and self.headers.get('If-Range') == server.tag
        if partial_reply:
            start = int(wanted.removeprefix('bytes=').removesuffix('-'))
        if partial_reply and start >= len(data):
            self.send_response(416)
            self.send_header('Content-Range', f'bytes */{len(data)}')
            self.send_header('Content-Length', '0')
            self.end_headers()
            return
        self.send_response(206 if partial_reply else 200)
        if partial_reply:
            self.send_header('Content-Range', f'bytes {start}-{len(data) - 1}/{len(data)}')
        if server.ranges:
            self.send_header('Accept-Ranges', 'bytes')
            self.send_header('ETag', server.tag)
        self.send_header('Content-Length', str(len(data) - start))
        self.end_headers()
        cut = server.cuts.pop(0) if server.cuts else len(data)
        self.wfile.write(data[start : start + cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / 'cache' / 'file.pth'


def fetch(server, path, digest=DIGEST):
    download(server.url, path, digest, progress=False)


def files(path):
    return sorted(os.listdir(path.parent))


def test_whole(server, path):
    fetch(server, path)
    assert path.read_bytes() == DATA
    assert files(path) == ['file.pth']
    fetch(server, path)
    assert server.requests == [None]  # it was there


def test_goes_on_where_the_connection_broke_off(server, path):
    server.cuts = [300_000, 500_000]
    fetch(server, path)
    assert path.read_bytes() == DATA
    assert server.requests == [None, 'bytes=300000-', 'bytes=800000-']
    assert files(path) == ['file.pth']


def test_a_later_attempt_goes_on(server, path):
    server.cuts = [300_000, 0]
    with pytest.raises(DownloadError, match=r'was lost .*300,000 bytes are kept: the next'):
        fetch(server, path)
    assert files(path) == ['file.pth.part', 'file.pth.part.tag']
    fetch(server, path)
    assert path.read_bytes() == DATA
    assert server.requests[-1] == 'bytes=300000-'
    assert files(path) == ['file.pth']


def test_goes_on_after_the_process_was_interrupted(server, path, monkeypatch):
    def interrupt(stream, chunk):
        stream.write(chunk[:1000])
        raise KeyboardInterrupt

    monkeypatch.setattr(module, '_write', interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(server, path)
    monkeypatch.undo()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    fetch(server, path)
    assert path.read_bytes() == DATA
    assert server.requests == [None, 'bytes=1000-']


def test_a_file_that_changed_is_fetched_anew(server, path):
    server.cuts = [300_000, 0]
    with pytest.raises(DownloadError):
        fetch(server, path)
    server.data, server.tag = DATA[::-1], '"two"'
    fetch(server, path, digest=None)
    assert path.read_bytes() == DATA[::-1]


def test_what_is_whole_but_not_yet_renamed_is_not_fetched_again(server, path):
    server.cuts = [300_000, 0]
    with pytest.raises(DownloadError):
        fetch(server, path)
    path.with_name('file.pth.part').write_bytes(DATA)
    fetch(server, path)
    assert path.read_bytes() == DATA
    server.data = DATA[:-1]  # now shorter than what is there, under the same tag
    path.rename(path.with_name('file.pth.part'))
    path.with_name('file.pth.part.tag').write_text(server.tag)
    fetch(server, path, digest=None)
    assert path.read_bytes() == DATA[:-1]


@pytest.mark.parametrize('tag', ['"one"', 'W/"one"'])  # a weak tag is not of the bytes
def test_truncated_by_a_server_that_cannot_resume(tag, server, path):
    server.tag, server.ranges, server.cuts = tag, tag[0] == 'W', [300_000, 300_000]
    with pytest.raises(DownloadError, match='received 300,000 of 1,048,576 bytes') as caught:
        fetch(server, path)
    assert 'kept' not in str(caught.value)
    assert files(path) == []


def test_wrong_hash(server, path):
    with pytest.raises(DownloadError, match=r'SHA-256 is wrong: expected "0123abcd", got'):
        fetch(server, path, '0123abcd')
    assert files(path) == []
    fetch(server, path, DIGEST[:8].upper())


@pytest.mark.parametrize('status', [404, 403, 503])
def test_refused(status, server, path):
    server.status = status
    with pytest.raises(DownloadError, match=f'the server answers {status}'):
        fetch(server, path)
    assert files(path) == []


def test_no_network(path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with pytest.raises(DownloadError, match=r'there is no connection to 127\.0\.0\.1 \(.*refused'):
        # Nobody listens on the port of discarded data.
        download('http://127.0.0.1:9/file.pth', path, progress=False)
    assert files(path) == []


@pytest.mark.parametrize('status', [429, 503])
def test_a_busy_server_costs_no_bytes(status, server, path):
    server.cuts = [300_000, 0]
    with pytest.raises(DownloadError):
        fetch(server, path)
    server.status = status
    with pytest.raises(DownloadError, match=f'answers {status} .*300,000 bytes are kept'):
        fetch(server, path)
    server.status = None
    fetch(server, path)
    assert server.requests[-1] == 'bytes=300000-'


def test_full_disk(server, path, monkeypatch):
    def full(stream, chunk):
        stream.write(chunk[:1000])
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(module, '_write', full)
    with pytest.raises(DownloadError, match=r'the disk of .*cache is full\. Make room.*TORCH_HOME'):
        fetch(server, path)
    assert files(path) == []


def test_several_at_once_download_once(server, path):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: fetch(server, path), range(4)))  # raises what a thread raises
    assert path.read_bytes() == DATA
    assert server.requests == [None]
    assert files(path) == ['file.pth']


def test_without_file_locks(server, path, monkeypatch):
    """As on Windows, which renames no open file."""
    monkeypatch.setattr(module, 'fcntl', None)
    fetch(server, path)
    assert path.read_bytes() == DATA
    assert files(path) == ['file.pth']
