"""Importing the tasks' packages: what they register, and errors for packages that do not fit."""

import copy
import importlib
import itertools
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import mmengine.config.config
import mmengine.hub.hub
import mmengine.utils
import mmseg
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

import vrwkv.backbones
from vrwkv import _imports, mmcv_ops
from vrwkv._imports import explain_missing
from vrwkv.engine import patches


@pytest.mark.parametrize(
    ('module', 'library', 'names'),
    [
        ('vrwkv_cls', 'mmpretrain', ['VRWKV', 'VRWKV6']),
        (
            'vrwkv_det',
            'mmdet',
            ['VRWKV', 'VRWKVAdapter', 'VRWKV6', 'VRWKV6Adapter', 'ViT', 'ViTAdapter'],
        ),
        (
            'vrwkv_seg',
            'mmseg',
            ['VRWKV', 'VRWKVAdapter', 'VRWKV6', 'VRWKV6Adapter', 'ViT', 'ViTAdapter'],
        ),
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
import os, sys, torch
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
            {
                'vrwkv_ops': OPERATORS,
                'mmengine': CLASSIFICATION,
                'mmpretrain': CLASSIFICATION,
                'mmcv': CLASSIFICATION,
            },
        ),
        (
            'vrwkv_det',
            {
                'vrwkv_ops': OPERATORS,
                'mmengine': DETECTION,
                'mmdet': DETECTION,
                'mmcv': DETECTION,
            },
        ),
        (
            'vrwkv_seg',
            {
                'vrwkv_ops': OPERATORS,
                'mmengine': SEGMENTATION,
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
        if 'onedl-mmcv' in mmcv_ops.installed() and remedy != OPERATORS:
            remedy = f'pip install {"onedl-mmengine" if package.startswith("mm") else package}'
        assert remedy in messages[package]


@pytest.mark.parametrize(
    ('failure', 'remedy'),
    [
        (RuntimeError('operator torchvision::nms does not exist'), r'Type: .* torchvision==0\.\d+'),
        (
            AssertionError('MMCV==2.2.0 is used but incompatible.'),
            r'Type: .* (mmcv-lite==2\.1\.0|onedl-mmcv)',
        ),
    ],
)
def test_packages_that_do_not_fit_each_other(failure, remedy):
    with (
        pytest.raises(ImportError, match=remedy),
        explain_missing('vrwkv_cls', 'classification', ('mmpretrain',)),
    ):
        raise failure


def test_remedies_where_the_onedl_forks_are_installed(monkeypatch):
    """The extras and mmcv-lite would install the original packages over them."""
    for module in (mmcv_ops, _imports):
        monkeypatch.setattr(module, 'installed', lambda: {'onedl-mmcv': '2.3.6'})
    assert mmcv_ops.how_to_compile().startswith('make install-mmcv OPENMMLAB=onedl (')
    assert mmcv_ops.how_to_install().endswith('pip install --no-cache-dir onedl-mmcv')
    with (
        pytest.raises(ImportError, match=r'pip install onedl-mmengine .* onedl-mmdetection'),
        explain_missing('vrwkv_det', 'detection', ('mmdet',)),
    ):
        raise ModuleNotFoundError("No module named 'mmdet'", name='mmdet')
    with (
        pytest.raises(ImportError, match=r'checkout: pip install onnx$'),
        explain_missing('to_onnx', 'deployment', ('onnx',)),
    ):
        raise ModuleNotFoundError("No module named 'onnx'", name='onnx')


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


# --- three tasks in one process -----------------------------------------------------------------

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
TASKS = ('classification', 'detection', 'segmentation')


@pytest.fixture(scope='module')
def models(tiny_config):
    """Functions that make a model by each library's two interfaces, and return its prediction."""
    # Import our packages first, as users do.
    for package in ('vrwkv_cls', 'vrwkv_det', 'vrwkv_seg'):
        importlib.import_module(package)
    from mmdet.apis import DetInferencer, inference_detector, init_detector
    from mmpretrain import ImageClassificationInferencer, get_model
    from mmseg.apis import MMSegInferencer, inference_model, init_model

    cfgs = {task: tiny_config(task) for task in TASKS}

    def functions(task):
        cfg = copy.deepcopy(cfgs[task])
        torch.manual_seed(0)
        if task == 'classification':
            model = get_model(cfg, device='cpu')
            return lambda image: ImageClassificationInferencer(model)(image)[0]['pred_scores']
        if task == 'detection':
            model = init_detector(cfg, device='cpu')
            return lambda image: inference_detector(model, image).pred_instances.scores
        model = init_model(cfg, device='cpu')
        return lambda image: inference_model(model, image).pred_sem_seg.data

    def inferencers(task):
        cfg = copy.deepcopy(cfgs[task])
        torch.manual_seed(0)
        if task == 'classification':
            inferencer = ImageClassificationInferencer(cfg, False, 'cpu')
            return lambda image: inferencer(image)[0]['pred_scores']
        if task == 'detection':
            inferencer = DetInferencer(cfg, device='cpu', show_progress=False)
            return lambda image: inferencer(image, no_save_pred=True)['predictions'][0]['scores']
        inferencer = MMSegInferencer(cfg, device='cpu')
        return lambda image: inferencer(image)['predictions']

    return functions, inferencers


@pytest.fixture(scope='module')
def alone(models):
    """The prediction of each task where it is the only one."""
    results = {}
    for make, task in itertools.product(models, TASKS):
        DefaultScope._instance_dict.clear()
        results[make, task] = np.asarray(make(task)(IMAGE.copy()))
    return results


@pytest.mark.parametrize('order', list(itertools.permutations(TASKS)), ids='-'.join)
def test_three_tasks_work_in_one_process_in_any_order(models, alone, order):
    DefaultScope._instance_dict.clear()
    predict = {(make, task): make(task) for make in models for task in order}
    for key, function in predict.items():
        np.testing.assert_array_equal(function(IMAGE.copy()), alone[key], str(key[1]))


# A new environment has no pkg_resources; mmdet and mmcv.cnn may have been imported before us.
WITHOUT_PKG_RESOURCES = """
import contextlib, sys

class Missing:
    def find_spec(self, name, *_):
        if name.partition('.')[0] == 'pkg_resources':
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

sys.meta_path.insert(0, Missing())
import mmcv.cnn, mmdet, mmseg
with contextlib.suppress(ImportError):  # mmcv-lite
    import mmdet.apis
with contextlib.suppress(ImportError):
    import mmseg.apis
import vrwkv_cls, vrwkv_det, vrwkv_seg
import torch
from mmdet.apis import DetInferencer
from mmengine.config import Config
from mmpretrain import get_model
from mmseg.apis import MMSegInferencer
from mmseg.models.decode_heads import point_head

assert point_head.point_sample is not None
image = torch.zeros(48, 64, 3, dtype=torch.uint8).numpy()
get_model('vrwkv-tiny_8xb128_in1k')
DetInferencer(sys.argv[1], device='cpu', show_progress=False)(image, no_save_pred=True)
MMSegInferencer(sys.argv[2], device='cpu')(image)
print('done')
"""


def test_no_pkg_resources_and_mmdet_imported_first(tiny_config, tmp_path):
    paths = []
    for task in ('detection', 'segmentation'):
        paths.append(str(tmp_path / f'{task}.py'))
        tiny_config(task).dump(paths[-1])
    command = [sys.executable, '-W', 'ignore', '-c', WITHOUT_PKG_RESOURCES, *paths]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout.endswith('done\n')


@pytest.mark.parametrize('onedl', [False, True])
def test_mmengine_finds_packages(monkeypatch, onedl):
    """By distribution or module; under onedl, no distribution has OpenMMLab's name."""
    if onedl:
        monkeypatch.setattr(patches, '_is_distribution', lambda name: False)
    for package in ('mmsegmentation', 'mmseg'):
        assert mmengine.utils.is_installed(package)
        assert mmengine.utils.get_installed_path(package) == str(Path(mmseg.__file__).parent)
    assert not mmengine.utils.is_installed('no-such-package')
    with pytest.raises(PackageNotFoundError, match='no-such-package'):
        mmengine.utils.get_installed_path('no-such-package')
    for module in (mmengine.config.config, mmengine.hub.hub):
        assert module.get_installed_path is patches.get_installed_path


def test_each_replacement_is_made_once():
    for package in ('vrwkv_cls', 'vrwkv_det', 'vrwkv_seg'):
        importlib.import_module(package)
    from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor

    before = SingleRoIExtractor.forward, BaseDenseHead.predict_by_feat
    patches.extract_regions_from_any_map()
    patches.predict_in_float32()
    assert (SingleRoIExtractor.forward, BaseDenseHead.predict_by_feat) == before
