"""What all tests share: no GPU tests without a GPU, few threads, small data, running the tools."""

import http.server
import importlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import mmengine.config.config
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer
from PIL import Image

import vrwkv.engine  # noqa: F401 (configs inherit from the libraries' without pkg_resources)
from vrwkv.mmcv_ops import serve_mmcv_ops

serve_mmcv_ops()  # before any test file imports mmdet or mmseg


def pytest_configure(config):
    # Runs dump their config; formatting it takes yapf longer than most tests.
    mmengine.config.config.FormatCode = lambda text, **kwargs: (text, True)
    torch.set_num_threads(min(torch.get_num_threads(), 2))


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason='needs an NVIDIA GPU')
    for item in items:
        if 'cuda' in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def global_instances():
    """Undo what a test does to mmengine's default scope and visualizers, which Runners keep.

    A visualizer of a name that is taken would write where the first of that name does.
    """
    scopes = DefaultScope._instance_dict.copy()
    yield
    DefaultScope._instance_dict = scopes
    kinds = [Visualizer]
    for kind in kinds:  # grows on the way
        kinds += kind.__subclasses__()
        kind._instance_dict.clear()


@pytest.fixture(scope='session')
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory) -> Path:
    """Folder with {train,val}/{dark,light}/<class><0-7>.png: 8 images of 32 x 32 pixels in each."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name, level in (('dark', 64), ('light', 192)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(8):
                pixels = rng.integers(level - 60, level + 60, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{name}{index}.png')
    return root


@pytest.fixture
def run(repository, tmp_path):
    """Run a tool in a process of its own, in a folder other than the checkout."""

    def run(tool, *args, check=True, **environment):
        command = [str(repository / 'tools' / tool), *map(str, args)]
        if tool.endswith('.py'):
            command.insert(0, sys.executable)
        path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
        result = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, 'PATH': path, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        assert not check or result.returncode == 0, result.stdout
        return result

    return run


@pytest.fixture
def free_port():
    """A port for processes that train together."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        return str(free.getsockname()[1])


@pytest.fixture
def load():
    """Read a checkpoint written by a test."""

    return lambda path: torch.load(path, weights_only=True)


@pytest.fixture
def load_script(repository, monkeypatch) -> Callable[[str], ModuleType]:
    """Import a script by its path in the checkout; it and its processes find those beside it."""

    def load(path: str) -> ModuleType:
        monkeypatch.syspath_prepend((repository / path).parent)
        return importlib.import_module(Path(path).stem)

    return load


@pytest.fixture
def training_environment(monkeypatch):
    """Processes that tests start have one thread each, and no launcher started this one."""
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    monkeypatch.delenv('LOCAL_RANK', raising=False)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[tuple[Path, str]]:
    """Serve a folder over HTTP on this machine; PyTorch's cache is empty, in ``tmp_path/cache``."""
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'cache'))
    folder = tmp_path / 'served'
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f'http://127.0.0.1:{server.server_port}'
    server.shutdown()
    server.server_close()
