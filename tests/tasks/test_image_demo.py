"""demo/image_demo.py for the three tasks, and its error messages."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
TINY = 'vrwkv-tiny_8xb128_in1k'


@pytest.fixture
def demo(load_script):
    return load_script('demo/image_demo.py')


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'image.png')
    return tmp_path / 'image.png'


@pytest.fixture
def run(demo, tmp_path, monkeypatch, capsys):
    """Run the script; give what it prints about the result, and the picture."""

    monkeypatch.chdir(tmp_path)

    def run(*args):
        out = tmp_path / 'out'
        argv = ['image_demo.py', '--device', 'cpu', '--out-dir', str(out), *map(str, args)]
        monkeypatch.setattr('sys.argv', argv)
        capsys.readouterr()
        demo.main()
        text, _, picture = capsys.readouterr().out.rpartition('picture: ')
        return text, Path(picture.strip())

    return run


def save_weights(config, path, seed=0):
    """Write random weights as a training would, with the names of eleven classes."""
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        torch.manual_seed(seed)
        model = MODELS.build(cfg.model)
        model.init_weights()
    names = [f'thing-{index}' for index in range(11)]
    palette = [(20 * index, 0, 0) for index in range(11)]
    meta = dict(dataset_meta=dict(classes=names, palette=palette))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)


def the_small(task):
    """The config of that task that trains in minutes, whatever its length is called."""
    return next((ROOT / f'configs/{task}').glob('*vrwkv-adapter-nano*_digit-scenes*.py'))


def test_classification(run, image, tmp_path):
    text, picture = run(image, TINY)
    assert 'Without --pretrained the weights are random' in text
    shares = [float(share) for share in re.findall(r'([\d.]+)%  \w', text)]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    assert Image.open(picture).size[0] >= 96
    assert picture.parent == tmp_path / 'out' / TINY


def test_classification_with_a_checkpoint(run, image, tmp_path):
    config = ROOT / 'configs/classification/vrwkv-nano_1xb64_digits.py'
    save_weights(config, tmp_path / 'weights.pth')
    first = run(image, config, '--pretrained', tmp_path / 'weights.pth')[0]
    assert 'random' not in first
    assert len(re.findall(r'%  thing-\d\n', first)) == 5
    assert run(image, config, '--pretrained', tmp_path / 'weights.pth')[0] == first
    save_weights(config, tmp_path / 'weights.pth', seed=1)
    assert run(image, config, '--pretrained', tmp_path / 'weights.pth')[0] != first


def test_detection(run, image, tmp_path):
    config, path = the_small('detection'), tmp_path / 'weights.pth'
    save_weights(config, path)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint['state_dict']['roi_head.bbox_head.fc_cls.bias'][3] = 5.0  # it sees nothing but these
    torch.save(checkpoint, path)
    text, picture = run(image, config, '--pretrained', path)
    lines = re.findall(r'([\d.]+)%  thing-3  at (.*)\n', text)
    assert lines
    assert text.count('%  thing-') == len(lines)
    for score, corners in lines:
        assert float(score) >= 30
        left, top, right, bottom = map(float, corners.split(', '))
        assert 0 <= left <= right <= 96
        assert 0 <= top <= bottom <= 64
    assert Image.open(picture).size == (96, 64)
    checkpoint['state_dict']['roi_head.bbox_head.fc_cls.bias'][-1] = 20.0  # background
    torch.save(checkpoint, path)
    assert 'nothing with a score of at least 0.3' in run(image, config, '--pretrained', path)[0]


def test_segmentation(run, image, tmp_path):
    config = the_small('segmentation')
    save_weights(config, tmp_path / 'weights.pth')
    text, picture = run(image, config, '--pretrained', tmp_path / 'weights.pth')
    shares = [float(share) for share in re.findall(r'([\d.]+)%  thing-\d+\n', text)]
    assert sum(shares) == pytest.approx(100, abs=0.06)  # eleven numbers of two digits
    assert Image.open(picture).size == (96, 64)
    # OpenCV reads, but does not write, files of this name.
    foreign = image.rename(tmp_path / 'image.jfif')
    again, picture = run(foreign, config, '--pretrained', tmp_path / 'weights.pth')
    assert again == text
    assert picture.name == 'image.jfif.png'


def test_classes_without_weights_have_no_names(run, image):
    text = run(image, the_small('segmentation'))[0]
    assert re.findall(r'%  (.*)\n', text) == re.findall(r'%  (class \d+)\n', text) != []


@pytest.mark.parametrize('task', ['classification', 'detection', 'segmentation'])
def test_images_of_one_name_keep_their_folders(task, run, image, tmp_path):
    config = TINY if task == 'classification' else the_small(task)
    if task != 'classification':
        save_weights(config, tmp_path / 'weights.pth')
    pictures, options = [], [] if task == 'classification' else ['--pretrained', 'weights.pth']
    for folder, level in (('a', 40), ('b/c', 200)):
        (tmp_path / folder).mkdir(parents=True)
        Image.new('RGB', (64, 64), (level,) * 3).save(tmp_path / folder / 'image.png')
        pictures.append(run(f'{folder}/image.png', config, *options)[1])
    root = tmp_path / 'out' / Path(config).stem
    assert pictures == [root / 'a/image.png', root / 'b/c/image.png']
    first, second = (np.asarray(Image.open(p).convert('L')).mean() for p in pictures)
    assert first < second - 20


def test_paths_of_pictures(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.picture_path(Path('a/b.png'), Path('out'), '.png') == Path('out/a/b.png')
    assert demo.picture_path(Path('a/b.jpg'), Path('out'), '.png') == Path('out/a/b.jpg.png')
    outside = demo.picture_path(Path('/data/x/b.png'), Path('out'), '.png')
    assert outside == Path('out/data/x/b.png')


def test_where_config_and_weights_come_from(demo):
    name = 'mask-rcnn_vrwkv-adapter-tiny_fpn_1x_coco'
    config = ROOT / f'configs/detection/{name}.py'
    weights = (
        'https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/'
        'mask_rcnn_vrwkv_adapter_tiny_fpn_1x_coco.pth'
    )
    for model in (name, str(config)):
        found, url = demo.resolve(model, True)
        assert (found.resolve(), url) == (config, weights)
        assert demo.resolve(model, False)[1] is None
        assert demo.resolve(model, 'file.pth')[1] == 'file.pth'


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('image.png', 'vrwkv-tinny'), "no model 'vrwkv-tinny'. Did you mean vrwkv-tiny"),
        (('image.png', 'none.py'), 'config none.py does not exist'),
        (('none.png', TINY), 'image none.png does not exist'),
        (('text.png', TINY), 'text.png is no image that OpenCV'),
        (('empty.png', TINY), 'empty.png is no image that OpenCV'),
        (('image.png', 'other.py'), "has the default_scope 'mmpose', not one of"),
        (('image.png', 'other.py', '--pretrained'), 'no released weights of other.py'),
        (('image.png', TINY, '--pretrained', 'text.png'), 'is not a PyTorch checkpoint'),
        (('image.png', TINY, '--pretrained', 'none.pth'), "'none.pth' does not exist"),
        (('image.png', TINY, '--device', 'gpu'), '--device gpu cannot be used: '),
        (('image.png', 'mae.py'), 'mae.py is for pre-training: its model predicts nothing'),
    ],
)
def test_mistakes(args, message, run, image, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('text.png').write_text('no image')
    Path('empty.png').touch()
    Path('other.py').write_text("default_scope = 'mmpose'")
    Path('mae.py').write_text("default_scope = 'mmpretrain'")
    with pytest.raises(SystemExit, match=r'^error: ') as caught:
        run(*args)
    assert message in str(caught.value)
