"""Checkpoints load safely, wherever mmengine loads them; what cannot be loaded is explained."""

import hashlib
import io
import os
import pickle
import shutil
import zipfile
from argparse import Namespace
from functools import partial

import numpy as np
import pytest
import torch
from mmengine.fileio import PetrelBackend
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModule, ExponentialMovingAverage
from mmengine.runner import CheckpointLoader
from PIL import Image

from vrwkv.engine import CheckpointError, read_checkpoint

WEIGHTS = {'head.weight': torch.arange(6.0).reshape(2, 3)}


@pytest.fixture
def checkpoint(tmp_path):
    """Path of a small checkpoint such as mmengine writes."""
    history = HistoryBuffer([1.5, 2.5], [1, 1])
    content = dict(
        state_dict=WEIGHTS,
        meta=dict(epoch=3, best=np.float64(0.5), count=np.int64(2), flags=np.array([True, False])),
        message_hub=dict(log_scalars={'loss': history}),
    )
    path = tmp_path / 'good.pth'
    torch.save(content, path)
    return path


def load(path, **kwargs):
    """Load as all of OpenMMLab does."""
    return CheckpointLoader.load_checkpoint(str(path), map_location='cpu', **kwargs)


def test_what_mmengine_saves(checkpoint):
    loaded = load(checkpoint)
    torch.testing.assert_close(loaded['state_dict'], WEIGHTS, rtol=0, atol=0)
    history = loaded['message_hub']['log_scalars']['loss']
    assert history.mean() == 2
    assert history.statistics('max') == 2.5
    assert loaded['meta']['best'] == 0.5
    assert loaded['meta']['count'] == 2
    assert loaded['meta']['flags'].tolist() == [True, False]


@pytest.mark.parametrize('other', [('numpy.core', 'numpy._core'), ('numpy._core', 'numpy.core')])
def test_files_of_numpy_1_and_2(checkpoint, other, tmp_path):
    """Rename numpy's module in the pickle as the other major release of numpy has it."""
    old, new = (f'c{name}.multiarray'.encode() for name in other)
    path = tmp_path / 'renamed.pth'
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(path, 'w') as target:
        for item in source.infolist():
            data = source.read(item)
            target.writestr(item.filename, data.replace(old, new))
    loaded = load(path)
    assert loaded['meta']['best'] == 0.5
    assert loaded['message_hub']['log_scalars']['loss'].current() == 2.5


class Boobytrap:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Getattr:
    """Asks for an attribute through ``getattr``, which HistoryBuffer needs."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


@pytest.mark.parametrize('old_format', [False, True])
def test_a_pickle_cannot_run_code(old_format, tmp_path):
    path = tmp_path / 'trap.pth'
    trap = tmp_path / 'executed'
    content = dict(state_dict=WEIGHTS, meta=Boobytrap(trap))
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(
        CheckpointError,
        match=r"trap\.pth' holds a Python object .*: (posix|nt)\.mkdir\. .*safe_globals",
    ):
        load(path)
    assert not trap.exists()
    torch.save(dict(state_dict=WEIGHTS, meta=Getattr()), path)
    with pytest.raises(CheckpointError, match='__init__'):
        load(path)


def not_a_checkpoint(kind, path, good):
    """Write a bad file to ``path``."""
    data = good.read_bytes()
    if kind == 'text':
        path.write_text('<html><title>404: Not Found</title></html>')
    elif kind == 'image':
        Image.new('RGB', (8, 8)).save(path, format='PNG')
    elif kind == 'other zip':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('readme.txt', 'hello')
    elif kind == 'empty':
        path.write_bytes(b'')
    elif kind == 'half':
        path.write_bytes(data[: len(data) // 2])
    elif kind == 'all but the end':
        path.write_bytes(data[:-1])
    elif kind == 'half of the old format':
        stream = io.BytesIO()
        torch.save(
            dict(state_dict={'w': torch.ones(999)}), stream, _use_new_zipfile_serialization=False
        )
        path.write_bytes(stream.getvalue()[:2000])
    elif kind == 'flipped bits':
        path.write_bytes(data.replace(b'state_dict', b'st\xffte_dict', 1))
    elif kind == 'other pickle':
        path.write_bytes(pickle.dumps([1, 2, 3]))
    elif kind == 'tensor':
        torch.save(torch.ones(3), path)
    elif kind == 'no weights':
        torch.save(dict(epoch=1, model=dict(depth=3)), path)
    elif kind == 'folder':
        path.mkdir()


@pytest.mark.parametrize(
    ('kind', 'message'),
    {
        'text': r'is not a PyTorch checkpoint: it begins with b.<html>',
        'image': r'is not a PyTorch checkpoint: it begins with .*PNG',
        'other zip': 'it is a zip archive of something else',
        'empty': r'\(0 bytes\) is empty',
        'half': 'is truncated',
        'all but the end': 'is truncated',
        'half of the old format': 'is truncated',
        'flipped bits': 'is damaged',
        'other pickle': 'is truncated, or a pickle that PyTorch did not write',
        'tensor': 'holds a Tensor, not a dict of weights',
        'no weights': r"holds no weights: .*'state_dict', .* its keys are \['epoch', 'model'\]",
        'folder': 'is a directory',
    }.items(),
)
def test_bad_file_is_named_and_explained(kind, message, checkpoint, tmp_path):
    path = tmp_path / 'bad.pth'
    not_a_checkpoint(kind, path, checkpoint)
    with pytest.raises(CheckpointError, match=rf"(?s)bad\.pth' .*{message}"):
        load(path)


@pytest.mark.parametrize('old_format', [False, True])
def test_truncated_anywhere(old_format, tmp_path):
    path = tmp_path / 'cut.pth'
    content = dict(state_dict={'w': torch.ones(999)}, meta=dict(epoch=1))
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    data = path.read_bytes()
    load(path)
    for length in range(4, len(data), 61):
        path.write_bytes(data[:length])
        # A class name cut in the middle reads as another name, which may be refused for that.
        reason = '(is truncated|cannot be loaded safely)' if old_format else 'is truncated'
        with pytest.raises(CheckpointError, match=rf"cut\.pth'.*{reason}"):
            load(path)


@pytest.mark.parametrize('wrap', ['averaged', 'compiled', 'both', 'mmengine'])
def test_weights_of_wrapped_models(wrap, tmp_path):
    model = torch.nn.Linear(2, 1)
    wrapped = model
    if wrap in ('compiled', 'both'):
        wrapped = torch.compile(wrapped)
    if wrap in ('averaged', 'both'):
        wrapped = torch.optim.swa_utils.AveragedModel(wrapped)
    if wrap == 'mmengine':
        wrapped = ExponentialMovingAverage(wrapped)
    torch.save(wrapped.state_dict(), tmp_path / 'w.pth')
    weights = read_checkpoint(tmp_path / 'w.pth')['state_dict']
    assert set(weights) == {'weight', 'bias'}
    assert torch.equal(weights['weight'], model.weight)


def test_another_library_ends_its_own_permission(tmp_path):
    """As timm does when it has read a file."""
    torch.save(dict(model=dict(a=torch.ones(1)), args=Namespace(lr=0.1)), tmp_path / 'in.pth')
    for _ in range(2):
        assert set(read_checkpoint(tmp_path / 'in.pth')['state_dict']) == {'a'}
        with torch.serialization.safe_globals([Namespace]):
            pass


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth' does not exist"):
        load(tmp_path / 'none.pth')


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / 'weights.safetensors'
    save_file(WEIGHTS, path)
    torch.testing.assert_close(load(path)['state_dict'], WEIGHTS, rtol=0, atol=0)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors' is truncated"):
        load(path)


def test_object_store(checkpoint, tmp_path, monkeypatch):
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / 'good.safetensors')
    (tmp_path / 'bad.safetensors').write_bytes(b'none')
    monkeypatch.setattr(PetrelBackend, '__init__', lambda self, **kwargs: None)
    monkeypatch.setattr(PetrelBackend, 'isfile', lambda self, path: True)
    monkeypatch.setattr(
        PetrelBackend, 'get', lambda self, path: (tmp_path / path[12:]).read_bytes()
    )
    for name in ('good.pth', 'good.safetensors'):
        weights = load(f's3://bucket/{name}')['state_dict']
        torch.testing.assert_close(weights, WEIGHTS, rtol=0, atol=0)
    with pytest.raises(CheckpointError, match=r"'s3://bucket/bad\.safetensors' is truncated"):
        load('s3://bucket/bad.safetensors')


def test_init_cfg_and_load_from_use_it(checkpoint, tmp_path):
    class Module(BaseModule):
        def __init__(self, init_cfg):
            super().__init__(init_cfg)
            self.weight = torch.nn.Parameter(torch.zeros(2, 3))

    pretrained = partial(dict, type='Pretrained', prefix='head.')
    module = Module(pretrained(checkpoint=str(checkpoint)))
    module.init_weights()
    torch.testing.assert_close(module.weight.data, WEIGHTS['head.weight'], rtol=0, atol=0)
    (tmp_path / 'bad.pth').write_text('text')
    with pytest.raises(CheckpointError, match='is not a PyTorch checkpoint'):
        Module(pretrained(checkpoint=str(tmp_path / 'bad.pth'))).init_weights()


def test_download(server, checkpoint, tmp_path):
    folder, url = server
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:8]
    names = [f'right-{digest}.pth', 'plain.pth', 'date-20240131.pth']
    for name in names:
        shutil.copy(checkpoint, folder / name)
        torch.testing.assert_close(load(f'{url}/{name}')['state_dict'], WEIGHTS, rtol=0, atol=0)
        (folder / name).unlink()
        load(f'{url}/{name}')  # from the cache
    assert sorted(path.name for path in tmp_path.glob('cache/checkpoints/*')) == sorted(names)


def test_failed_download(server, checkpoint, tmp_path):
    folder, url = server
    shutil.copy(checkpoint, folder / 'wrong-0123abcd.pth')
    with pytest.raises(
        CheckpointError, match=r'Cannot download .*wrong-0123abcd\.pth: .*expected "0123abcd"'
    ):
        load(f'{url}/wrong-0123abcd.pth')
    with pytest.raises(CheckpointError, match=r'Cannot download .*absent\.pth: .*404'):
        load(f'{url}/absent.pth')
    assert not list(tmp_path.glob('cache/checkpoints/*'))
    torch.save(dict(state_dict=WEIGHTS, meta=Boobytrap(tmp_path / 'executed')), folder / 'trap.pth')
    with pytest.raises(CheckpointError, match='cannot be loaded safely'):
        load(f'{url}/trap.pth')
    assert not (tmp_path / 'executed').exists()
