"""The model index: complete, true, and found by mmpretrain and mim, from a wheel too."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mmpretrain
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load
from mmpretrain.apis.model import ModelHub

import vrwkv_cls  # noqa: F401
from vrwkv.engine.model_index import find_model, index_folder, list_models

ROOT = Path(__file__).resolve().parents[2]
TINY = 'vrwkv-tiny_8xb128_in1k'
# The files that upstream has released, and the paper's results: top-1, box and mask AP, mIoU. For
# VRWKV6, which is not in the paper, the results are those of upstream's README.
RELEASED = {
    TINY: ('vrwkv_t_in1k_224', [75.1]),
    'vrwkv-small_8xb128_in1k': ('vrwkv_s_in1k_224', [80.1]),
    'vrwkv-base_16xb64_in1k': ('vrwkv_b_in1k_224', [82.0]),
    'vrwkv6-tiny_8xb128_in1k': ('vrwkv6_t_in1k_224', [76.6]),
    'vrwkv6-small_8xb128_in1k': ('vrwkv6_s_in1k_224', [81.1]),
    'vrwkv6-base_16xb64_in1k': ('vrwkv6_b_in1k_224', [82.6]),
    'vrwkv-large_32xb128-90e_in21k-192px': ('vrwkv_l_in22k_192', []),
    'vrwkv-large_in21k-pre_16xb64_in1k-384px': ('vrwkv_l_22kto1k_384', [86.0]),
    **{
        f'mask-rcnn_vrwkv-adapter-{size}_fpn_1x_coco': (
            f'mask_rcnn_vrwkv_adapter_{size}_fpn_1x_coco',
            results,
        )
        for size, results in {
            'tiny': [41.7, 38.0],
            'small': [44.8, 40.2],
            'base': [46.8, 41.7],
            'large': [50.6, 44.9],
        }.items()
    },
    **{
        f'upernet_vrwkv-adapter-{size}_8xb2-160k_ade20k-512x512': (
            f'upernet_vrwkv_adapter_{size}_512_160k_ade20k',
            [result],
        )
        for size, result in {'tiny': 43.3, 'small': 47.2, 'base': 49.2, 'large': 53.5}.items()
    },
}
CLASSIFIERS = [name for name in RELEASED if name.startswith('vrwkv')]


def entries():
    """Yield collection and entry of every model, as YAML has them."""
    for metafile in load(ROOT / 'model-index.yml')['Import']:
        content = load(ROOT / metafile)
        collections = {collection['Name']: collection for collection in content['Collections']}
        for model in content['Models']:
            yield collections[model['In Collection']], model


def test_every_released_model_is_there_with_the_results_of_the_paper():
    found = {}
    for collection, model in entries():
        source = "upstream's README" if collection['Name'] == 'VRWKV6' else 'the paper'
        assert collection['Metadata']['Source of Results'] == f'{source}, not measured here'
        assert (ROOT / collection['README']).is_file()
        assert (ROOT / collection['Code']['URL']).is_file()
        metrics = [value for result in model['Results'] for value in result['Metrics'].values()]
        found[model['Name']] = (model['Weights'], metrics)
    folder = 'https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main'
    assert found == {
        name: (f'{folder}/{file}.pth', results) for name, (file, results) in RELEASED.items()
    }


@pytest.mark.parametrize('name', RELEASED)
def test_a_model_is_called_like_its_config(name):
    info = find_model(name.upper())
    assert info.name == info.config.stem == name
    assert info.config.is_file()


def test_mmpretrain_lists_them():
    assert mmpretrain.list_models('*vrwkv*') == sorted(CLASSIFIERS)
    assert mmpretrain.list_models('vrwkv-base', task='Image Classification') == [
        'vrwkv-base_16xb64_in1k'
    ]


def test_get_model_and_inference(image_folder):
    torch.manual_seed(0)
    model = mmpretrain.get_model(TINY, head=dict(init_cfg=None))
    image = str(next(image_folder.glob('val/*/*.png')))
    result = mmpretrain.inference_model(model, image)
    assert result['pred_scores'].shape == (1000,)
    assert result['pred_class'] == mmpretrain.datasets.categories.IMAGENET_CATEGORIES[
        result['pred_label']
    ]  # fmt: skip


@pytest.mark.parametrize('look_up', [find_model, ModelHub.get, mmpretrain.get_model])
@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('vrwkv-tiny', f"no model 'vrwkv-tiny'. Did you mean {TINY}?"),
        ('vrwkv_base_16xb64_in1k', 'Did you mean vrwkv-base_16xb64_in1k'),
        ('qqq', "there is no model 'qqq'."),
    ],
)
def test_an_unknown_name_gets_the_nearest(look_up, name, message):
    with pytest.raises(ValueError, match='there is no model') as caught:
        look_up(name)
    assert message in str(caught.value)


def test_mmpretrain_keeps_its_own_models():
    assert ModelHub.get('deit-tiny_4xb256_in1k').config.model.backbone.arch == 'deit-tiny'
    with pytest.raises(ValueError, match='Did you mean deit-tiny_4xb256_in1k'):
        ModelHub.get('deit_tiny_4xb256_in1k')


def test_a_broken_installation_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr('vrwkv.engine.model_index.__file__', str(tmp_path / 'a/b/c.py'))
    with pytest.raises(FileNotFoundError, match=r'no model-index\.yml in .*install'):
        index_folder()


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """Build a wheel, as `pip install .` does, and unpack it."""
    folder = tmp_path_factory.mktemp('wheel')
    ignore = shutil.ignore_patterns('__pycache__', '*.egg-info')
    for name in ('vrwkv', 'classification', 'detection', 'segmentation', 'configs', 'tools'):
        shutil.copytree(ROOT / name, folder / 'source' / name, ignore=ignore)
    for name in ('pyproject.toml', 'setup.py', 'MANIFEST.in', 'model-index.yml', 'README.md',
                 'LICENSE'):  # fmt: skip
        shutil.copy(ROOT / name, folder / 'source' / name)
    command = 'from setuptools import build_meta; print(build_meta.build_wheel("../dist"))'
    subprocess.run([sys.executable, '-c', command], cwd=folder / 'source', check=True)
    (wheel,) = (folder / 'dist').iterdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / 'site')
    return folder / 'site'


def test_mim_finds_index_and_configs(installed):
    """mim looks below the first package of the distribution."""
    (metadata,) = installed.glob('*.dist-info')
    package = (metadata / 'top_level.txt').read_text().split('\n')[0]
    mim = installed / package / '.mim'
    from modelindex.load_model_index import load as load_index  # as mim does

    models = load_index(str(mim / 'model-index.yml')).models
    assert {model.name for model in models} == set(RELEASED)
    for model in models:
        assert (mim / model.config).is_file()
    config = f'configs/classification/{TINY}.py'
    assert Config.fromfile(mim / config).model == Config.fromfile(ROOT / config).model
    assert (mim / 'tools/train.py').is_file()


def test_mmpretrain_finds_the_models_of_a_wheel(installed):
    code = """
import vrwkv, vrwkv_cls, mmpretrain
from vrwkv.engine.model_index import index_folder
print(index_folder())
print(*mmpretrain.list_models('*vrwkv*'))
"""
    process = subprocess.run(
        [sys.executable, '-c', code],
        env={'PYTHONPATH': str(installed), 'OMP_NUM_THREADS': '1'},
        cwd=installed,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    *_, folder, names = process.stdout.splitlines()  # mmpretrain of onedl prints, too
    assert Path(folder) == installed / 'vrwkv/.mim'
    assert names.split() == sorted(CLASSIFIERS)


def test_the_index_of_the_checkout_has_no_other_models():
    assert set(list_models()) == set(RELEASED)
