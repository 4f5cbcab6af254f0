"""The analysis tools: their numbers, tables, pictures and error messages."""

import json
import re
import runpy
import sys
import types
from functools import partial
from pathlib import Path

import mmpretrain
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch import nn

from vrwkv.analysis import area_of_share, complexity, effective_receptive_field
from vrwkv.analysis.models import build_model, load_model, read_config
from vrwkv.analysis.report import distinct_names
from vrwkv.backbones import VRWKV, VRWKV6
from vrwkv_ops.benchmarking import markdown_table

NANO = 'configs/classification/vrwkv-nano_1xb64_digits.py'


@pytest.fixture
def tool(load_script):
    """Import a tool by its name."""
    return lambda name: load_script(f'tools/analysis_tools/{name}.py')


@pytest.fixture
def nano(repository):
    return str(repository / NANO)


def printed_rows(text):
    """Read the body of the Markdown table in a printed text."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]


def check_picture(path):
    """A picture is not empty: many colours, and not one of them nearly everywhere."""
    pixels = np.array(Image.open(path).convert('RGB')).reshape(-1, 3)
    _, counts = np.unique(pixels, axis=0, return_counts=True)
    assert len(counts) > 20
    assert counts.max() < 0.98 * len(pixels)


def test_table():
    assert markdown_table(
        ('name', 'n'), [('a', '1.5'), ('long', '10'), ('b', None)]
    ).splitlines() == [
        '| name |   n |',
        '| ---- | --: |',
        '| a    | 1.5 |',
        '| long |  10 |',
        '| b    |   - |',
    ]


def test_distinct_names():
    paths = ['a/x.py', 'b/x.py', 'c/b/x.py', 'c.py', 'c.py', 'lib::d/e.py']
    names = ['a/x', 'b/x', 'c/b/x', 'c (1)', 'c (2)', 'e']
    assert distinct_names(paths) == names
    assert distinct_names([]) == []


@pytest.fixture
def write_config(nano, tmp_path):
    """Write a config of a tiny model for images of some channels."""

    def write(channels, name='channels'):
        path = tmp_path / f'{name}.py'
        mean = f'mean={[0.0] * channels}, std={[255.0] * channels}'
        path.write_text(
            f"""_base_ = [{nano!r}]
model = dict(
    backbone=dict(in_channels={channels}, embed_dims=8, depth=1), head=dict(in_channels=8))
data_preprocessor = dict({mean}, to_rgb=False)
"""
        )
        return str(path)

    return write


@pytest.mark.parametrize('channels', [1, 4])
def test_get_flops_counts_the_channels_of_the_model(tool, write_config, channels, tmp_path):
    configs = [write_config(channels), write_config(3, 'colours')]
    tool('get_flops').main([*configs, '--shape', '32', '--out', str(tmp_path)])
    models = json.loads((tmp_path / 'flops.json').read_text())['models']
    patches, patch = (32 // 8) ** 2, 8**2
    assert models['channels']['operators']['conv'] == patches * patch * channels * 8
    assert models['colours']['operators']['conv'] == patches * patch * 3 * 8


def test_get_flops_of_configs_of_one_name(tool, write_config, tmp_path, capsys):
    configs = []
    for channels in (1, 3):
        folder = tmp_path / str(channels)
        folder.mkdir()
        configs.append(str(Path(write_config(channels)).rename(folder / 'channels.py')))
    tool('get_flops').main([*configs, configs[0], '--shape', '32', '--out', str(tmp_path)])
    rows = printed_rows(capsys.readouterr().out)
    assert [row[0].rpartition('/')[2] for row in rows] == [
        'channels (1)',
        'channels',
        'channels (2)',
    ]
    assert len(json.loads((tmp_path / 'flops.json').read_text())['models']) == 3


def test_get_flops(tool, nano, tmp_path, capsys):
    deit = 'mmpretrain::deit/deit-tiny_4xb256_in1k.py'
    tool('get_flops').main([nano, deit, '--shape', '64', '--out', str(tmp_path)])
    rows = printed_rows(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [
        ['vrwkv-nano_1xb64_digits', '64x64'],
        ['deit-tiny_4xb256_in1k', '64x64'],
    ]
    model = build_model(Config.fromfile(nano))
    cost = complexity(model, torch.zeros(1, 3, 64, 64))
    backbone = sum(p.numel() for p in model.backbone.parameters())
    expected = (cost.parameters / 1e6, backbone / 1e6, cost.flops / 1e9)
    assert rows[0][2:5] == [f'{n:.2f}' for n in expected]
    written = json.loads((tmp_path / 'flops.json').read_text())
    assert written['models']['vrwkv-nano_1xb64_digits']['flops'] == cost.flops
    check_picture(tmp_path / 'flops.png')


def test_mmpretrains_own_tool_counts_alike(nano, monkeypatch, capsys):
    """It counts everything up to the neck, since it runs extract_feat."""
    path = Path(mmpretrain.__file__).parent / '.mim/tools/analysis_tools/get_flops.py'
    monkeypatch.setattr(sys, 'argv', ['get_flops.py', nano, '--shape', '64', '96'])
    runpy.run_path(str(path), run_name='__main__')
    printed = capsys.readouterr().out
    model = build_model(Config.fromfile(nano))
    flops = complexity(model, torch.zeros(1, 3, 64, 96)).flops
    head = model.head.fc.weight.numel()
    # It prints three digits behind the point of millions.
    (found,) = re.findall(r'^Flops: ([\d.]+)M$', printed, re.MULTILINE)
    assert float(found) == pytest.approx((flops - head) / 1e6, abs=6e-4)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere.py'], "config 'nowhere.py' does not exist"),
        (['mmpretrain::nowhere.py'], "config 'mmpretrain::nowhere.py' does not exist"),
        (['mmnone::x.py'], 'a config of mmnone, which is not installed'),
        ([NANO, '--shape', '1', '2', '3'], 'one or two numbers'),
        ([NANO, '--shape', '0'], 'one or two numbers'),
    ],
)
def test_get_flops_refuses(tool, arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        tool('get_flops').main(arguments)
    assert message in f'{error.value}{capsys.readouterr().err}'


def test_config_without_a_model(tmp_path):
    path = tmp_path / 'data.py'
    path.write_text('batch_size = 1')
    with pytest.raises(ValueError, match='has no model'):
        read_config(str(path))


def test_detector_counts_its_heads(tool):
    """The proposals of a two-stage detector need a description of the image."""
    flops = tool('get_flops')
    cfg = read_config('mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    cost = flops.count(cfg, (64, 96))
    alone = flops.count(cfg, (64, 96), backbone_only=True)
    assert cost.backbone_flops == alone.flops == alone.backbone_flops
    # The neck and the head of the proposals alone cost more than that.
    assert cost.flops > 2 * cost.backbone_flops


def test_rows_of_the_papers_tables_agree(tool, repository):
    """Parameters, without memory for them, and FLOPs where they are few.

    Of tables 3 and 4 those of Tiny, since reading such a config takes a second: the tests of the
    configs, and tests/models/test_adapter_flops.py for FLOPs, hold all sizes.
    """
    paper = tool('paper_tables')
    rows = [row for make in paper.TABLES.values() for row in make()]
    held = [row for row in rows if row.held]
    assert len(held) == 4 + 7 + 11 + 8
    for row in rows:
        path = repository / f'configs/{row.config}.py'
        assert row.config is None or '::' in row.config or path.is_file(), row
    for row in held:
        if row.table > 2 and '-tiny' not in row.config:
            continue
        if row.table == 2 and row.flops < 5:
            result = paper.compare(row)
        else:
            with torch.device('meta'):
                model = build_model(paper.read_row_config(row), backbone_only=row.table > 2)
            count = sum(p.numel() for p in model.parameters())
            result = paper.Comparison(row._replace(flops=None), count / 1e6, None)
        assert result.agrees, (row, result)


def test_comparison_with_the_paper(tool):
    paper = tool('paper_tables')
    row = paper.Row(2, 'X', 'x', (224, 224), 100.0, 1.0)
    assert paper.Comparison(row, 101.4, 1.04).agrees  # 1.5 %, half a unit of the last digit
    assert not paper.Comparison(row, 101.6, 1.0).agrees
    assert not paper.Comparison(row, 100.0, 0.94).agrees
    assert paper.Comparison(row, 102.0, 1.0).differences == pytest.approx((0.02, 0.0))


def test_paper_tables(tool, tmp_path, capsys, monkeypatch):
    paper = tool('paper_tables')
    rows = [row for row in paper.TABLES[2]() if row.model in ('VRWKV-T', 'DeiT-T')]
    monkeypatch.setitem(paper.TABLES, 2, lambda: rows)
    paper.main(['--tables', '2', '--out', str(tmp_path)])
    printed = printed_rows(capsys.readouterr().out.replace('\r', '\n'))
    # Ours, and their differences: 6.16 of 6.2 million, 1.17 of 1.2 billion.
    assert printed[1] == [
        *('2', 'VRWKV-T', '224x224', '6.2', '6.16', '-0.7 %', '1.2', '1.17', '-2.1 %', 'yes')
    ]
    check_picture(tmp_path / 'paper_tables.png')
    assert len(json.loads((tmp_path / 'paper_tables.json').read_text())['rows']) == 2

    monkeypatch.setitem(paper.TABLES, 2, lambda: [rows[1]._replace(flops=2.0)])
    with pytest.raises(SystemExit, match=r"must agree with the paper and do not: \['VRWKV-T'\]"):
        paper.main(['--tables', '2', '--out', str(tmp_path)])


def test_receptive_field_of_a_convolution():
    """Known by hand: the positive weights around the centre, for a positive output."""
    conv = nn.Conv2d(3, 2, 3, padding=1, bias=False)
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[0, 0] = torch.tensor([[0.0, 1.0, 0.0], [2.0, 4.0, -4.0], [0.0, 1.0, 0.0]])
        conv.weight[1] = -1.0  # negative on these images, so the token is 0 there
    images = [torch.ones(2, 3, 5, 5), 3 * torch.ones(1, 3, 5, 5)]
    field = effective_receptive_field(conv, images)
    expected = torch.zeros(5, 5, dtype=torch.float64)
    expected[1:4, 1:4] = torch.tensor([[0, 1, 0], [2, 4, 0], [0, 1, 0]]) / 8
    torch.testing.assert_close(field, expected)


def test_causal_attention_sees_nothing_below():
    torch.manual_seed(0)
    images = torch.rand(1, 1, 3, 80, 80)
    shares = {}
    for causal in (False, True):
        model = VRWKV(embed_dims=16, depth=2, shift_mode='none', causal=causal).eval()
        field = effective_receptive_field(model, images)
        assert field.sum().item() == pytest.approx(1)
        shares[causal] = field[48:].sum().item()  # below the third row of five
    assert shares[True] == 0 < shares[False]


def test_area_of_share():
    field = torch.tensor([[8.0, 4.0], [2.0, 2.0]])
    assert area_of_share(field, 0.5) == 1 / 4
    assert area_of_share(field, 0.51) == 2 / 4
    assert area_of_share(field, 1.0) == 1.0
    assert area_of_share(torch.tensor([[1.0, 0.0]]), 1.0) == 1 / 2
    for share in (0, 1.1):
        with pytest.raises(ValueError, match='must lie in'):
            area_of_share(field, share)


def test_receptive_field_refuses():
    images = [torch.rand(1, 3, 4, 4)]
    for model, batches, message in (
        (lambda x: x.mean((2, 3)), images, r"got \(1, 3\).*out_type='featmap'"),
        (lambda x: x, [], 'at least one image'),
        (lambda x: -x.abs(), images, 'no pixel'),
    ):
        with pytest.raises(ValueError, match=message):
            effective_receptive_field(model, batches)


def test_receptive_field_tool(tool, nano, image_folder, tmp_path, capsys):
    """With weights of a file and random ones, on a folder and on the photographs."""
    erf = tool('effective_receptive_field')
    torch.save(load_model(read_config(nano)).state_dict(), tmp_path / 'weights.pth')
    models = [f'trained={nano},{tmp_path / "weights.pth"}', nano]
    common = ['--size', '40', '--count', '2', '--device', 'cpu', '--out', str(tmp_path / 'out')]
    erf.main([*models, '--images', str(image_folder / 'val'), *common])
    rows = printed_rows(capsys.readouterr().out)
    assert [row[0] for row in rows] == ['trained', 'vrwkv-nano_1xb64_digits']
    facts = json.loads((tmp_path / 'out/receptive_field.json').read_text())
    for name, row in zip(facts['models'], rows, strict=True):
        fact = facts['models'][name]
        assert row[1:] == [f'{100 * fact[key]:.2f} %' for key in ('half', 'most', 'above', 'below')]
        assert 0 < fact['half'] < fact['most'] <= 1
        assert 0 < fact['above'] + fact['below'] < 1
    check_picture(tmp_path / 'out/receptive_field.png')

    deit = 'ViT=mmpretrain::deit/deit-tiny_4xb256_in1k.py'
    erf.main([deit, *common])
    assert printed_rows(capsys.readouterr().out)[0][0] == 'ViT'


@pytest.mark.parametrize('channels', [1, 2, 4])
def test_receptive_field_of_other_channels(tool, write_config, channels, tmp_path, capsys):
    """On photographs, and on files with that many channels; others are refused."""
    erf = tool('effective_receptive_field')
    config = write_config(channels)
    common = [config, '--size', '32', '--count', '1', '--out', str(tmp_path), '--device', 'cpu']
    erf.main(common)
    (image,) = erf.read_images(None, 1, 32, 0, channels)
    (colours,) = erf.read_images(None, 1, 32, 0, 3)
    assert image.shape == (32, 32, channels)
    grey = np.array(Image.fromarray(colours[..., ::-1].copy()).convert('L'))
    assert (image[..., -1] == grey).all()
    if channels == 4:
        assert (image[..., :3] == colours).all()

    folder = tmp_path / 'images'
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(256, size=(32, 32, 4), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / 'image.png')
    if channels == 2:
        with pytest.raises(SystemExit, match=r"image.png' has 4 channels, the model takes 2"):
            erf.main([*common, '--images', str(folder)])
        return
    erf.main([*common, '--images', str(folder)])
    (image,) = erf.read_images(folder, 1, 32, 0, channels)
    if channels == 4:  # in OpenCV's order
        assert (image == pixels[..., [2, 1, 0, 3]]).all()
    assert capsys.readouterr().out.count('Picture: ') == 2


def test_receptive_field_defaults_are_the_papers(tool, repository):
    erf = tool('effective_receptive_field')
    assert list(erf.DEFAULTS) == ['VRWKV', 'No shift', 'Causal', 'ViT']
    arguments = {
        name: {key: backbone.get(key) for key in ('type', 'shift_mode', 'causal')}
        for name, config in erf.DEFAULTS.items()
        for backbone in [read_config(config).model.backbone]
    }
    assert arguments == {
        'VRWKV': dict(type='VRWKV', shift_mode=None, causal=None),
        'No shift': dict(type='VRWKV', shift_mode='none', causal=None),
        'Causal': dict(type='VRWKV', shift_mode=None, causal=True),
        'ViT': dict(type='VisionTransformer', shift_mode=None, causal=None),
    }


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--images', 'EMPTY'], 'no image'),
        (['--images', 'BROKEN'], 'cannot be read as an image'),
        (['a=x.py', 'a=y.py'], 'a name of its own'),
        (['--count', '0'], 'must be above 0'),
        (['x.py', '--count', '1', '--size', '64'], "config 'x.py' does not exist"),
    ],
)
def test_receptive_field_tool_refuses(tool, arguments, message, tmp_path, capsys):
    (tmp_path / 'EMPTY').mkdir()
    (tmp_path / 'BROKEN').mkdir()
    (tmp_path / 'BROKEN/a.png').write_bytes(b'no image')
    arguments = [str(tmp_path / a) if a in ('EMPTY', 'BROKEN') else a for a in arguments]
    with pytest.raises(SystemExit) as error:
        tool('effective_receptive_field').main(arguments)
    assert message in f'{error.value}{capsys.readouterr().err}'


def test_pipelines_are_scaled(tool):
    scale = tool('resolution_accuracy').scale_pipeline
    load, pack = dict(type='LoadImageFromFile'), dict(type='PackInputs')
    imagenet = [load, dict(type='ResizeEdge', scale=256), dict(type='CenterCrop', crop_size=224)]
    result = scale([*imagenet, pack], 448)
    assert [step.get('scale') or step.get('crop_size') for step in result[1:3]] == [512, 448]
    assert imagenet[1]['scale'] == 256
    assert scale([*imagenet, pack], 224) == [*imagenet, pack]
    resized = scale([load, dict(type='Resize', scale=(32, 32)), pack], 48)
    assert resized == [load, dict(type='Resize', scale=48), pack]
    added = scale([load, pack], 48)
    assert added == [load, dict(type='Resize', scale=48, interpolation='bicubic'), pack]
    with pytest.raises(ValueError, match=r'Resize has scale=\(32, 64\), expected one number'):
        scale([load, dict(type='Resize', scale=(32, 64)), pack], 48)


@pytest.fixture
def classifier(nano, image_folder, tmp_path):
    """A config and random weights of a classifier.

    It separates dark images from light ones, but names them wrongly.
    """
    path = tmp_path / 'classifier.py'
    changes = f"""
_base_ = [{nano!r}]
model = dict(backbone=dict(embed_dims=8, depth=1), head=dict(num_classes=2, in_channels=8))
data_preprocessor = dict(num_classes=2)
data_root = {str(image_folder)!r}
train_dataloader = dict(num_workers=0, dataset=dict(data_root=data_root))
val_dataloader = dict(num_workers=0, dataset=dict(data_root=data_root))
test_dataloader = val_dataloader
"""
    path.write_text(changes)
    torch.manual_seed(0)
    model = load_model(read_config(str(path)))
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    return str(path), str(tmp_path / 'weights.pth'), model


def test_resolution_accuracy(tool, classifier, image_folder, tmp_path, capsys):
    config, weights, model = classifier
    arguments = ['--sizes', '48', '32', '--batch-size', '5', '--out', str(tmp_path / 'out')]
    tool('resolution_accuracy').main([config, weights, *arguments])
    ((name, *printed),) = printed_rows(capsys.readouterr().out)
    assert name == 'classifier'

    right = {32: [], 48: []}
    for label, folder in enumerate(('dark', 'light')):
        for path in sorted((image_folder / 'val' / folder).glob('*.png')):
            for size in right:
                image = Image.open(path).resize((size, size), Image.Resampling.BICUBIC)
                pixels = torch.from_numpy(np.array(image)[..., ::-1].copy()).permute(2, 0, 1)
                with torch.no_grad():
                    logits = model(model.data_preprocessor(dict(inputs=[pixels]))['inputs'])
                right[size].append(int(logits.argmax()) == label)
    # Exact at 32, where nothing is resized; at 48 Pillow and OpenCV differ a little.
    assert printed[0] == f'{100 * np.mean(right[32]):.2f}'
    assert float(printed[1]) == pytest.approx(100 * np.mean(right[48]), abs=13)
    written = json.loads((tmp_path / 'out/resolution_accuracy.json').read_text())
    assert written['sizes'] == [32, 48]
    check_picture(tmp_path / 'out/resolution_accuracy.png')


def test_names_of_models_are_distinct(tool):
    name = tool('resolution_accuracy').name_models
    assert name(['a/c.py', 'x.pth', 'b/c.py', 'x.pth']) == ['a/c', 'b/c']
    runs = ['c.py', 's0/e8.pth', 'c.py', 's1/e8.pth', 'c.py', 's1/e9.pth']
    assert name(runs) == ['c, s0/e8', 'c, s1/e8', 'c, e9']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['CONFIG'], 'each CONFIG needs a CHECKPOINT'),
        (['CONFIG', 'nowhere.pth'], "Checkpoint 'nowhere.pth' does not exist"),
        (['CONFIG', 'WEIGHTS', '--sizes', '0'], '--sizes must be above 0'),
        (['DETECTOR', 'WEIGHTS'], 'is no config of a classifier'),
        (['nowhere.py', 'WEIGHTS'], "config 'nowhere.py' does not exist"),
    ],
)
def test_resolution_accuracy_refuses(tool, arguments, message, classifier, capsys):
    config, weights, _ = classifier
    detector = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    names = dict(CONFIG=config, WEIGHTS=weights, DETECTOR=detector)
    with pytest.raises(SystemExit) as error:
        tool('resolution_accuracy').main([names.get(a, a) for a in arguments])
    assert message in f'{error.value}{capsys.readouterr().err}'


@pytest.mark.parametrize('version', [None, '1.5.0'])
def test_vis_cam_says_what_it_needs(tool, version, monkeypatch):
    cam = tool('vis_cam')

    def find(name):
        if version is None:
            raise cam.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(cam.importlib.metadata, 'version', find)
    found = 'not installed' if version is None else version
    with pytest.raises(SystemExit, match=rf"grad-cam below 1.5, which is {found}.*'grad-cam==1.4"):
        cam.main()


@pytest.mark.parametrize(('channels', 'bands'), [(1, [0, 0, 0]), (3, [0, 1, 2]), (4, [0, 1, 2])])
def test_class_activation_maps_of_other_channels(tool, channels, bands, monkeypatch):
    """grad-cam gets images of three channels."""
    shown = []
    stub = types.ModuleType('pytorch_grad_cam.utils.image')
    stub.show_cam_on_image = lambda image, mask, use_rgb: shown.append(image)
    monkeypatch.setitem(sys.modules, stub.__name__, stub)
    tool('vis_cam').show_in_colour()
    image = np.random.default_rng(0).random((4, 4, channels), np.float32)
    stub.show_cam_on_image(image, None, use_rgb=False)
    assert (shown[0] == image[..., bands]).all()


@pytest.mark.parametrize('build', [VRWKV, partial(VRWKV6, num_heads=1)])
def test_mmpretrains_cam_tool_understands_a_backbone(build, tool, monkeypatch):
    """Its own functions, with stand-ins for the names that it imports from grad-cam."""
    stubs = {
        'pytorch_grad_cam': dict(
            GradCAMPlusPlus=None, base_cam=types.SimpleNamespace(BaseCAM=type('BaseCAM', (), {}))
        ),
        'pytorch_grad_cam.activations_and_gradients': dict(ActivationsAndGradients=None),
        'pytorch_grad_cam.utils': {},
        'pytorch_grad_cam.utils.image': dict(show_cam_on_image=None),
    }
    for name, content in stubs.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    cam = tool('vis_cam').run_tool()
    arguments = types.SimpleNamespace(vit_like=True, num_extra_tokens=None)
    model = types.SimpleNamespace(backbone=build(embed_dims=8, depth=2))
    assert cam['get_default_target_layers'](model, arguments) == [model.backbone.ln1]
    tokens = torch.arange(2 * 9 * 8).reshape(2, 9, 8)
    maps = cam['reshape_transform'](tokens, model, arguments)
    assert torch.equal(maps, tokens.transpose(1, 2).reshape(2, 8, 3, 3))


def test_a_tool_runs_by_itself(run):
    """From another folder, with the tool that it imports from beside it."""
    assert 'usage:' in run('analysis_tools/paper_tables.py', '--help').stdout
