"""Upstream's checkpoint files, rebuilt from the golden ones, load unchanged and strictly."""

import errno
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmpretrain import get_model
from mmpretrain.apis.model import ModelHub
from mmpretrain.registry import MODELS
from safetensors.torch import load_file

from vrwkv.engine import CheckpointError, read_checkpoint

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs/classification'
TINY = 'vrwkv-tiny_8xb128_in1k'
LARGE = 'vrwkv-large_in21k-pre_16xb64_in1k-384px'
CLASSES = 11
# Upstream's numbers are float32, of a dense float32 Bi-WKV.
TOLERANCE = 2e-5


def golden(name):
    return torch.load(ROOT / f'tests/data/golden/{name}.pt', weights_only=True)


@pytest.fixture
def run_tool(load_script, monkeypatch):
    """Run a script of tools/model_converters."""

    def run_tool(name, *args):
        monkeypatch.setattr('sys.argv', [name, *map(str, args)])
        load_script(f'tools/model_converters/{name}.py').main()

    return run_tool


@pytest.fixture(scope='module')
def tiny():
    """A file as mmcls 0.x wrote that of VRWKV-T, and its golden numbers."""
    data = golden('cls_tiny')
    generator = torch.Generator().manual_seed(0)
    weights = {f'backbone.{name}': value for name, value in data['state_dict'].items()}
    dim = data['config']['embed_dims']
    weights['head.fc.weight'] = torch.randn(CLASSES, dim, generator=generator)
    weights['head.fc.bias'] = torch.randn(CLASSES, generator=generator)
    names = [f'class {i}' for i in range(CLASSES)]
    meta = dict(mmcls_version='0.25.0', epoch=300, iter=375_300, CLASSES=names, hook_msgs={})
    optimizer = dict(state={0: dict(step=1, exp_avg=torch.ones(3))}, param_groups=[dict(lr=1e-3)])
    return dict(meta=meta, state_dict=weights, optimizer=optimizer), data


@pytest.fixture(scope='module')
def large():
    """The golden numbers of the other codebase's Large, MLP head included."""
    return golden('internimage_large')


@pytest.fixture
def cfg_node(monkeypatch):
    """Stand in for yacs: a dict with attributes of its own, which cannot be loaded again."""
    module = ModuleType('yacs.config')
    module.CfgNode = type('CfgNode', (dict,), {'__module__': 'yacs.config'})
    monkeypatch.setitem(sys.modules, 'yacs', ModuleType('yacs'))
    monkeypatch.setitem(sys.modules, 'yacs.config', module)

    def save(checkpoint, path):
        config = module.CfgNode(MODEL=module.CfgNode(NAME='vrwkv', SIZES=[1, 2]), LR=1e-3)
        config.__dict__['__immutable__'] = True
        torch.save(checkpoint | dict(config=config), path)
        monkeypatch.delitem(sys.modules, 'yacs.config')

    return save


def narrow(name, data, **backbone):
    """The config of that name, with the arguments of a golden file."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    arguments = {**data['config'], **backbone}
    classes = arguments.pop('num_classes', CLASSES)
    if 'k_norm' in arguments:
        arguments['key_norm'] = arguments.pop('k_norm')
    if 'hidden_dims' in arguments:
        cfg.model.head.mid_channels = [arguments.pop('hidden_dims')]
    cfg.model.backbone.update(drop_path_rate=0.0, **arguments)
    cfg.model.head.update(in_channels=arguments['embed_dims'], num_classes=classes)
    cfg.data_preprocessor.num_classes = classes
    return cfg


def build(cfg, **kwargs):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build({**cfg.model, **kwargs})


def by_load_from(cfg, path, tmp_path):
    runner = Runner(
        model=build(cfg),
        work_dir=str(tmp_path / 'work'),
        load_from=str(path),
        experiment_name=tmp_path.name,
    )
    runner.load_or_resume()
    return runner.model


def by_init_cfg(cfg, path, _):
    model = build(cfg, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    return model


def by_get_model(cfg, path, _):
    return get_model(cfg, pretrained=str(path))


def by_torch(cfg, path, _):
    model = build(cfg)
    model.load_state_dict(read_checkpoint(path)['state_dict'], strict=True)
    return model


every_way = pytest.mark.parametrize('load', [by_load_from, by_init_cfg, by_get_model, by_torch])


def check_all_loaded(model, weights):
    """Every parameter is one of the file, and none of the file is left over."""
    own = dict(model.named_parameters())
    assert len(own) == len(weights)
    for name, value in weights.items():
        name = name.replace('head.0.', 'head.layers.0.fc.').replace('head.2.', 'head.layers.1.fc.')
        assert torch.equal(own[name], value), name


def error(actual, expected):
    assert actual.shape == expected.shape
    return (actual - expected).abs().max() / expected.abs().max()


@every_way
def test_tiny(load, tiny, tmp_path):
    checkpoint, data = tiny
    torch.save(checkpoint, tmp_path / 'vrwkv_t.pth')
    model = load(narrow(TINY, data), tmp_path / 'vrwkv_t.pth', tmp_path).eval()
    check_all_loaded(model, checkpoint['state_dict'])
    with torch.no_grad():
        (feature,) = model.backbone(data['input'])
    assert error(feature, data['outputs'][-1]) < TOLERANCE


@pytest.mark.parametrize('name', ['vrwkv-small_8xb128_in1k', 'vrwkv-base_16xb64_in1k'])
def test_small_and_base(name, tmp_path):
    """There are no golden numbers of theirs, but the same names."""
    data = golden('cls_large')
    cfg = narrow(name, data, key_norm=False)
    weights = {
        f'backbone.{key}': value
        for key, value in data['state_dict'].items()
        if 'key_norm' not in key
    }
    weights['head.fc.weight'] = torch.ones(CLASSES, data['config']['embed_dims'])
    weights['head.fc.bias'] = torch.ones(CLASSES)
    torch.save(dict(meta=dict(epoch=300), state_dict=weights), tmp_path / 'weights.pth')
    check_all_loaded(by_get_model(cfg, tmp_path / 'weights.pth', None), weights)


@every_way
@pytest.mark.parametrize('name', [LARGE, 'vrwkv-large_32xb128-90e_in21k-192px'])
def test_large(name, load, large, cfg_node, tmp_path):
    path = tmp_path / 'vrwkv_l.pth'
    average = {key: value + 1 for key, value in large['state_dict'].items()}
    state = dict(optimizer={}, lr_scheduler=dict(last_epoch=19), max_accuracy=86.0, epoch='best')
    cfg_node(dict(model=large['state_dict'], model_ema=average, **state), path)
    model = load(narrow(name, large), path, tmp_path).eval()
    check_all_loaded(model, large['state_dict'])
    with torch.no_grad():
        logits = model(large['input'])
    assert error(logits, large['outputs'][-1]) < TOLERANCE


@pytest.mark.parametrize('key', ['model', 'module', 'state_dict', 'model_ema', None])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_where_the_weights_of_large_may_lie(key, prefix, large, tmp_path):
    weights = {prefix + name: value for name, value in large['state_dict'].items()}
    torch.save({key: weights, 'epoch': 3} if key else weights, tmp_path / 'weights.pth')
    model = by_torch(narrow(LARGE, large), tmp_path / 'weights.pth', None)
    check_all_loaded(model, large['state_dict'])


def test_backbone_alone(large, tmp_path):
    """As a fine-tuning for other classes takes it."""
    torch.save(dict(model=large['state_dict']), tmp_path / 'weights.pth')
    cfg = narrow(LARGE, large)
    cfg.model.head.num_classes = 3
    cfg.model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint=str(tmp_path / 'weights.pth'), prefix='backbone.'
    )
    model = build(cfg)
    model.init_weights()
    for name, value in model.backbone.named_parameters(prefix='backbone'):
        assert torch.equal(value, large['state_dict'][name]), name


@pytest.mark.parametrize('load', [by_load_from, by_init_cfg, by_get_model])
@pytest.mark.parametrize('which', ['tiny', 'large', 'multi-label'])
def test_another_number_of_classes(which, load, tiny, large, tmp_path):
    checkpoint, data = (dict(model=large['state_dict']), large) if which == 'large' else tiny
    torch.save(checkpoint, tmp_path / 'weights.pth')
    cfg = narrow(LARGE if which == 'large' else TINY, data)
    cfg.model.head.num_classes = 7
    if which == 'multi-label':
        cfg.model.head.type = 'MultiLabelLinearClsHead'
        del cfg.model.head.loss
    with pytest.raises(
        CheckpointError, match=r'classifier with 11 classes.*has num_classes=7 .*To'
    ):
        load(cfg, tmp_path / 'weights.pth', tmp_path)


def test_another_head(tiny, tmp_path):
    checkpoint, data = tiny
    torch.save(checkpoint, tmp_path / 'weights.pth')
    cfg = narrow(TINY, data)
    cfg.model.backbone.embed_dims = cfg.model.head.in_channels = 2 * data['config']['embed_dims']
    with pytest.raises(CheckpointError, match=r'head\.fc\.weight has the shape \(11, '):
        by_get_model(cfg, tmp_path / 'weights.pth', None)


def test_what_cannot_be_loaded_safely_is_explained(large, tmp_path):
    class Settings:
        pass

    Settings.__module__, Settings.__qualname__ = 'elsewhere', 'Settings'
    sys.modules['elsewhere'] = module = ModuleType('elsewhere')
    module.Settings = Settings
    try:
        torch.save(dict(model=large['state_dict'], config=Settings()), tmp_path / 'weights.pth')
    finally:
        del sys.modules['elsewhere']
    with pytest.raises(
        CheckpointError, match=r'elsewhere\.Settings.*safe_globals.*save its weights'
    ):
        by_get_model(narrow(LARGE, large), tmp_path / 'weights.pth', None)


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """Put models into mmpretrain's hub whose weights lie on a local server."""
    folder, url = server
    ModelHub._register_mmpretrain_models()  # once in a process
    monkeypatch.setattr(ModelHub, '_models_dict', ModelHub._models_dict.copy())

    def add(name, cfg, checkpoint):
        torch.save(checkpoint, folder / f'{name}.pth')
        cfg.dump(tmp_path / f'{name}.py')
        (tmp_path / f'{name}.yml').write_text(f"""
Models:
  - Name: {name}
    Results: [{{Task: Image Classification, Dataset: none, Metrics: {{}}}}]
    Weights: {url}/{name}.pth
    Config: {name}.py
""")
        ModelHub.register_model_index(tmp_path / f'{name}.yml')

    return add


def test_by_name_with_a_download(hub, tiny, large, tmp_path):
    checkpoint, data = tiny
    hub('narrow-tiny', narrow(TINY, data), checkpoint)
    hub('narrow-large', narrow(LARGE, large), dict(model=large['state_dict']))
    check_all_loaded(get_model('narrow-tiny', pretrained=True), checkpoint['state_dict'])
    check_all_loaded(get_model('narrow-large', pretrained=True), large['state_dict'])
    cached = tmp_path / 'cache/checkpoints'
    assert {path.name for path in cached.iterdir()} == {'narrow-tiny.pth', 'narrow-large.pth'}


# The converters.


@pytest.mark.parametrize('suffix', ['.safetensors', '.pth'])
def test_converter_writes_lean_files(suffix, tiny, tmp_path, run_tool, capsys):
    checkpoint, data = tiny
    source, target = tmp_path / 'upstream.pth', tmp_path / f'lean{suffix}'
    # A view, with all of whose memory torch.save would write it.
    bias = checkpoint['state_dict']['head.fc.bias']
    whole = torch.cat([bias, torch.zeros(1_000_000)])
    view = checkpoint['state_dict'] | {'head.fc.bias': whole[: len(bias)]}
    torch.save(checkpoint | dict(state_dict=view), source)
    run_tool('convert_upstream', source, target)
    assert target.stat().st_size < 4 * sum(map(torch.numel, view.values())) + 100_000
    assert f'{len(checkpoint["state_dict"])} tensors' in capsys.readouterr().out
    check_all_loaded(by_torch(narrow(TINY, data), target, None), checkpoint['state_dict'])
    if suffix == '.pth':
        written = torch.load(target, weights_only=True)
        assert set(written) == {'state_dict', 'meta'}
        names = checkpoint['meta']['CLASSES']
        assert written['meta'] == {'dataset_meta': {'classes': names}}


@pytest.mark.parametrize('ema', [False, True])
def test_converter_of_large(ema, large, cfg_node, tmp_path, run_tool):
    average = {f'module.{key}': value + 1 for key, value in large['state_dict'].items()}
    source, target = tmp_path / 'upstream.pth', tmp_path / 'lean.safetensors'
    cfg_node(dict(model=large['state_dict'], model_ema=average), source)
    run_tool('convert_upstream', source, target, *(['--ema'] if ema else []))
    expected = {key: value + ema for key, value in large['state_dict'].items()}
    check_all_loaded(by_torch(narrow(LARGE, large), target, None), expected)


@pytest.mark.parametrize('name', ['det_adapter_tiny', 'seg_adapter_tiny'])
def test_converter_of_detection_and_segmentation(name, tmp_path, run_tool):
    """Names stay, all of them."""
    weights = {f'backbone.{key}': value for key, value in golden(name)['state_dict'].items()}
    head = 'rpn_head.rpn_conv' if name.startswith('det') else 'decode_head.conv_seg'
    weights[f'{head}.weight'] = torch.ones(2, 3, 1, 1)
    meta = dict(mmdet_version='2.28.1', CLASSES=('a', 'b'), PALETTE=[(1, 2, 3), (4, 5, 6)])
    torch.save(
        dict(meta=meta, state_dict=weights, optimizer=dict(a=torch.ones(9))), tmp_path / 'in.pth'
    )
    run_tool('convert_upstream', tmp_path / 'in.pth', tmp_path / 'out.safetensors')
    names = dict(classes=['a', 'b'], palette=[[1, 2, 3], [4, 5, 6]])
    assert read_checkpoint(tmp_path / 'out.safetensors')['meta'] == dict(dataset_meta=names)
    written = load_file(tmp_path / 'out.safetensors')
    assert set(written) == set(weights)
    assert all(torch.equal(written[key], value) for key, value in weights.items())


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (('none.pth', 'out.pth'), r"'none\.pth' does not exist"),
        (('resnet.pth', 'out.pth'), 'these are not the weights of a VRWKV'),
        (('tiny.pth', 'out.bin'), r'out\.bin must end in \.safetensors or \.pth'),
        (('tiny.pth', 'out.pth', '--ema'), 'has no moving average'),
    ],
)
def test_converter_errors(args, message, tiny, tmp_path, monkeypatch, run_tool):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(state_dict={'conv1.weight': torch.ones(1)}), 'resnet.pth')
    torch.save(tiny[0], 'tiny.pth')
    with pytest.raises(SystemExit, match=f'error: .*{message}'):
        run_tool('convert_upstream', *args)
    assert not list(tmp_path.glob('out*'))


def test_converter_on_a_full_disk(tiny, tmp_path, monkeypatch, run_tool):
    def full(descriptor):
        raise OSError(errno.ENOSPC, 'No space left on device')

    torch.save(tiny[0], tmp_path / 'tiny.pth')
    monkeypatch.setattr('os.fsync', full)
    with pytest.raises(SystemExit, match='No space left on device'):
        run_tool('convert_upstream', tmp_path / 'tiny.pth', tmp_path / 'out.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.pth']


@pytest.fixture
def ids(tmp_path):
    """Eleven ids as folders of a data set, and three of them as lines of a file."""
    names = [f'n{number:08d}' for number in (7, 3, 99, 12, 1, 55, 42, 8, 23, 64, 2)]
    for name in names:
        (tmp_path / 'in21k' / name).mkdir(parents=True)
    (tmp_path / 'in1k.txt').write_text('n00000055 a word\n\nn00000002 another\nn00000012\n')
    return tmp_path / 'in21k', tmp_path / 'in1k.txt'


@pytest.mark.parametrize('which', ['--classes', '--subset'])
def test_byte_order_marks_are_no_part_of_a_class(which, tmp_path, run_tool):
    """Windows' Notepad writes one; joined files have one in the middle."""
    texts = {'--classes': 'ant\r\nbee\r\ncat\r\ndog\r\n', '--subset': 'bee\r\ncat\r\n'}
    texts[which] = '\ufeff' + texts[which].replace('cat', '\ufeffcat')
    args = [tmp_path / 'in.pth', tmp_path / 'out.pth']
    torch.save({'head.fc.weight': torch.ones(4, 1), 'head.fc.bias': torch.arange(4.0)}, args[0])
    for name, text in texts.items():
        path = tmp_path / f'{name}.txt'
        path.write_bytes(text.encode())
        args += [name, path]
    run_tool('subset_head', *args)
    assert torch.load(args[1], weights_only=True)['state_dict']['head.fc.bias'].tolist() == [1, 2]


@pytest.mark.parametrize('which', ['tiny', 'large'])
def test_fine_tuning_starts_from_rows_of_the_larger_head(
    which, ids, tiny, large, tmp_path, run_tool
):
    checkpoint, data = tiny if which == 'tiny' else (dict(model=large['state_dict']), large)
    weights = checkpoint.get('state_dict') or checkpoint['model']
    torch.save(checkpoint, tmp_path / 'in.pth')
    args = (tmp_path / 'in.pth', tmp_path / 'out.pth', '--classes', ids[0], '--subset', ids[1])
    run_tool('subset_head', *args)
    cfg = narrow(TINY if which == 'tiny' else LARGE, data)
    cfg.model.head.num_classes = 3
    model = by_torch(cfg, tmp_path / 'out.pth', None)
    # Sorted: 1 2 3 7 8 12 23 42 55 64 99; of these 2, 12 and 55.
    rows = [1, 5, 8]
    last = 'head.fc' if which == 'tiny' else 'head.2'
    assert torch.equal(model.head.fc.weight if which == 'tiny' else model.head.fc.fc.weight,
                       weights[f'{last}.weight'][rows])  # fmt: skip
    assert torch.equal(model.head.fc.bias if which == 'tiny' else model.head.fc.fc.bias,
                       weights[f'{last}.bias'][rows])  # fmt: skip
    if which == 'large':
        assert torch.equal(model.head.layers[0].fc.weight, weights['head.0.weight'])
    assert torch.equal(model.backbone.ln1.weight, weights['backbone.ln1.weight'])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda ids: (ids[0] / 'n00000007').rmdir(), 'has 11 classes, but 10 are listed'),
        (lambda ids: ids[1].write_text('n00000055\nn5\n'), r'1 of the 2 classes .*: n5'),
        (lambda ids: ids[1].write_text('n00000055\nn00000055\n'), r"twice: \['n00000055'\]"),
        (lambda ids: ids[1].write_text('\n'), 'has no classes'),
        (lambda ids: ids[1].write_text('n00000055', 'utf-16'), r'in1k\.txt is not UTF-8 text'),
        (lambda ids: ids[1].unlink(), r'in1k\.txt does not exist'),
    ],
)
def test_ids_that_do_not_fit(change, message, ids, tiny, tmp_path, run_tool):
    torch.save(tiny[0], tmp_path / 'in.pth')
    change(ids)
    args = (tmp_path / 'in.pth', tmp_path / 'out.pth', '--classes', ids[0], '--subset', ids[1])
    with pytest.raises(SystemExit, match=f'error: .*{message}'):
        run_tool('subset_head', *args)
    assert not (tmp_path / 'out.pth').exists()
