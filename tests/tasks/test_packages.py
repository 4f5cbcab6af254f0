"""Importing the tasks' packages: what they register, and errors for packages that do not fit."""

import importlib
import subprocess
import sys

import pytest

import vrwkv.backbones
from vrwkv import mmcv_ops
from vrwkv._imports import explain_missing


@pytest.mark.parametrize(
    ('module', 'library', 'names'),
    [
        ('vrwkv_cls', 'mmpretrain', ['VRWKV']),
        ('vrwkv_det', 'mmdet', ['VRWKV', 'VRWKVAdapter', 'ViT', 'ViTAdapter']),
        ('vrwkv_seg', 'mmseg', ['VRWKV', 'VRWKVAdapter', 'ViT', 'ViTAdapter']),
    ],
)
def test_libraries_have_the_very_classes(module, library, names):
    importlib.import_module(module)
    models = importlib.import_module(f'{library}.registry').MODELS
    for name in names:
        assert models.module_dict[name] is getattr(vrwkv.backbones, name)


CLASSIFICATION, DETECTION, SEGMENTATION = (
    f"pip install -e '.[{task}]'" for task in ('classification', 'detection', 'segmentation')
)
OPERATORS = 'pip install ./vrwkv_ops'

# A process for each package that is missing, forked where what all need is imported.
IMPORTS = """
import os, sys, torch, mmengine
module, *packages = sys.argv[1:]
for package in packages:
    if os.fork():
        os.wait()
        continue

    class NotInstalled:
        def find_spec(self, name, *_):
            if name == package:
                raise ModuleNotFoundError(f'No module named {name!r}', name=name)

    sys.meta_path.insert(0, NotInstalled())
    try:
        __import__(module)
    except ImportError as error:
        print(package, error, sep=': ', flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize(
    ('module', 'remedies'),
    [
        (
            'vrwkv_cls',
            {'vrwkv_ops': OPERATORS, 'mmpretrain': CLASSIFICATION, 'mmcv': CLASSIFICATION},
        ),
        (
            'vrwkv_det',
            {'vrwkv_ops': OPERATORS, 'mmdet': DETECTION, 'mmcv': DETECTION},
        ),
        (
            'vrwkv_seg',
            {
                'vrwkv_ops': OPERATORS,
                'mmseg': SEGMENTATION,
                'ftfy': SEGMENTATION,
                'mmcv': SEGMENTATION,
            },
        ),
    ],
    ids=['vrwkv_cls', 'vrwkv_det', 'vrwkv_seg'],
)
def test_a_missing_package_is_named_with_its_remedy(module, remedies):
    command = [sys.executable, '-W', 'ignore', '-c', IMPORTS, module, *remedies]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    messages = dict(line.split(': ', 1) for line in process.stdout.splitlines() if ': ' in line)
    for package, remedy in remedies.items():
        assert messages[package].startswith(f'{module} needs the package {package!r}')
        assert remedy in messages[package]


@pytest.mark.parametrize(
    ('failure', 'remedy'),
    [
        (RuntimeError('operator torchvision::nms does not exist'), r'Type: .* torchvision==0\.\d+'),
        (AssertionError('MMCV==2.2.0 is used but incompatible.'), r'Type: .* mmcv-lite==2\.1\.0'),
    ],
)
def test_packages_that_do_not_fit_each_other(failure, remedy):
    with (
        pytest.raises(ImportError, match=remedy),
        explain_missing('vrwkv_cls', 'classification', ('mmpretrain',)),
    ):
        raise failure


def test_other_errors_of_an_import_stay_as_they_are():
    with (
        pytest.raises(RuntimeError, match='CUDA error'),
        explain_missing('vrwkv_cls', 'classification', ('mmpretrain',)),
    ):
        raise RuntimeError('CUDA error')


def test_two_installed_builds_of_mmcv(monkeypatch):
    monkeypatch.setattr(mmcv_ops, 'installed', lambda: {'mmcv': '2.1.0', 'mmcv-lite': '2.1.0'})
    with (
        pytest.raises(ImportError, match=r'mmcv 2\.1\.0 and mmcv-lite 2\.1\.0 .*Type: pip unins'),
        explain_missing('vrwkv_cls', 'classification', ('mmpretrain',)),
    ):
        pass
