"""Importing the tasks' packages: what it registers, and what it says where something is missing."""

import importlib
import subprocess
import sys

import pytest

import vrwkv.backbones

# mmcv-lite lacks mmcv._ext.
WITH_OPERATORS = 'pip uninstall -y mmcv-lite mmcv && pip install --no-build-isolation mmcv'


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


@pytest.mark.parametrize(
    ('module', 'package', 'command'),
    [
        ('vrwkv_cls', 'vrwkv_ops', 'pip install ./vrwkv_ops'),
        ('vrwkv_cls', 'mmpretrain', "pip install -e '.[classification]'"),
        ('vrwkv_cls', 'mmcv', "pip install -e '.[classification]'"),
        ('vrwkv_det', 'vrwkv_ops', 'pip install ./vrwkv_ops'),
        ('vrwkv_det', 'mmdet', "pip install -e '.[detection]'"),
        ('vrwkv_det', 'mmcv._ext', WITH_OPERATORS),
        ('vrwkv_seg', 'vrwkv_ops', 'pip install ./vrwkv_ops'),
        ('vrwkv_seg', 'mmseg', "pip install -e '.[segmentation]'"),
        ('vrwkv_seg', 'ftfy', "pip install -e '.[segmentation]'"),
        ('vrwkv_seg', 'mmcv._ext', WITH_OPERATORS),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(module, package, command):
    code = f"""
import sys

class NotInstalled:
    def find_spec(self, name, *_):
        if name == {package!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, NotInstalled())
import {module}
"""
    process = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert process.returncode == 1
    message = process.stderr.strip().split('\n')[-1]
    assert message.startswith(f'ImportError: {module} needs the package {package!r}')
    assert command in message
