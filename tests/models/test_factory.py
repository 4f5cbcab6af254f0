"""``vrwkv.create_model``: names, numbers and weights; Hugging Face; torch.hub."""

import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
import warnings
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import load as load_yaml
from mmengine.logging import HistoryBuffer
from mmengine.registry import DefaultScope
from mmpretrain.registry import MODELS
from safetensors.torch import save_file
from timm.models._manipulate import adapt_input_conv

import vrwkv
import vrwkv_cls  # noqa: F401
from vrwkv.engine.cache import fetch
from vrwkv.engine.download import DownloadError
from vrwkv.variants import SHORT_NAMES, VARIANTS
from vrwkv.weights import CheckpointError, adapt_channels

from .vrwkv_reference import randomise

CONFIGS = Path(__file__).resolve().parents[2] / 'configs/classification'
SMALL = dict(embed_dims=24, depth=2, img_size=32)


def create(name='vrwkv-tiny', pretrained=False, **kwargs):
    return vrwkv.create_model(name, pretrained, **SMALL | kwargs).eval()


def images(channels=3, seed=0):
    return torch.rand(2, channels, 48, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def source():
    """A classifier with random weights for five classes."""
    return randomise(create(num_classes=5))


def save(state_dict, path):
    torch.save({'state_dict': state_dict}, path)
    return path


# --- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', VARIANTS)
def test_variants_are_those_of_the_configs(name):
    variant, cfg = VARIANTS[name], Config.fromfile(CONFIGS / f'{name}.py')
    backbone = dict(cfg.model.backbone)
    assert backbone.pop('type') == variant.family
    del backbone['patch_size']  # the default
    backbone.pop('drop_path_rate', None)  # part of the recipe
    defaults = dict(img_size=224, depth=12)
    assert backbone == {**{k: v for k, v in defaults.items() if k in backbone}, **variant.backbone}
    head = cfg.model.head
    assert head.num_classes == variant.num_classes
    assert head.get('mid_channels') == (variant.hidden_dims and [variant.hidden_dims])
    crop, resize = (
        step.get('crop_size') or step.get('scale') for step in cfg.test_pipeline[2:0:-1]
    )
    assert crop == variant.input_size
    assert resize == int(crop / variant.crop)


def test_variants_are_those_of_the_model_index():
    models = {m['Name']: m for m in load_yaml(CONFIGS / 'metafile.yml')['Models']}
    assert {name for name, model in models.items() if model.get('Weights')} == set(VARIANTS)
    for name, variant in VARIANTS.items():
        assert models[name]['Weights'] == variant.url
        metrics = models[name]['Results'][0]['Metrics']
        assert metrics.get('Top 1 Accuracy') == variant.top1
        with torch.device('meta'):
            model = vrwkv.create_model(name)
        parameters = sum(value.numel() for value in model.parameters())
        assert parameters == models[name]['Metadata']['Parameters']


def test_list_models():
    assert set(vrwkv.list_models()) == {*VARIANTS, *SHORT_NAMES}
    assert vrwkv.list_models('VRWKV6-?????') == ['vrwkv6-small']
    assert SHORT_NAMES['vrwkv-large'] == 'vrwkv-large_in21k-pre_16xb64_in1k-384px'
    assert type(create('VRWKV6-Tiny', num_heads=3).backbone).__name__ == 'VRWKV6'


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', ['vrwkv-small', 'vrwkv-large', 'vrwkv6-tiny'])
def test_agrees_with_mmpretrain(name):
    model = randomise(create(name, num_classes=7))
    cfg = Config.fromfile(CONFIGS / f'{SHORT_NAMES[name]}.py').model
    cfg.backbone.update(SMALL, drop_path_rate=0.0)
    cfg.head.update(in_channels=24, num_classes=7)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        theirs = MODELS.build({**cfg, 'train_cfg': None}).eval()
    theirs.load_state_dict(model.state_dict(), strict=True)
    assert list(theirs.state_dict()) == list(model.state_dict())
    assert torch.equal(model(images()), theirs(images()))


def test_golden_large(golden, tmp_path):
    """The other codebase's Large, MLP head included, from its file to its scores."""
    data = golden('internimage_large')
    torch.save({'model': data.state_dict}, tmp_path / 'large.pth')
    model = vrwkv.create_model(
        'vrwkv-large',
        tmp_path / 'large.pth',
        num_classes=11, hidden_dims=24, embed_dims=12, depth=13, img_size=64, init_values=0.1,
    )  # fmt: skip
    error = (model(data.input) - data.outputs[0]).abs().max() / data.outputs[0].abs().max()
    assert error < 2e-5  # as of the golden files


def test_features_only(source, tmp_path):
    path = save(source.state_dict(), tmp_path / 'weights.pth')
    backbone = create(pretrained=path, features_only=True, out_indices=(0, -1))
    maps = backbone(images())
    assert [value.shape for value in maps] == [(2, 24, 3, 2)] * 2
    assert torch.equal(maps[1], source.forward_features(images()))
    _, outputs = source.forward_intermediates(images(), [0])
    assert torch.equal(maps[0], outputs[0])
    assert len(create(features_only=True)(images())) == 1


def test_no_head(source, tmp_path):
    path = save(source.state_dict(), tmp_path / 'weights.pth')
    model = create(pretrained=path, num_classes=0)
    assert torch.equal(model(images()), source.forward_features(images()).mean((2, 3)))
    assert create('vrwkv-large', num_classes=0)(images()).shape == (2, 24)


# --- weights ------------------------------------------------------------------------------------


def test_first_convolution_by_the_rule_of_timm(source, tmp_path):
    weight = source.backbone.patch_embed.projection.weight.detach()
    for channels in (1, 2, 3, 4, 7):
        assert torch.allclose(
            adapt_channels(weight, channels), adapt_input_conv(channels, weight), rtol=1e-6
        )
    path = save(source.state_dict(), tmp_path / 'weights.pth')
    grey = images(1)
    expected = source(grey.expand(-1, 3, -1, -1))
    for channels in (1, 6):
        model = create(pretrained=path, num_classes=5, in_channels=channels)
        # Sums in another order, over weights of 768 pixels.
        x = grey.expand(-1, channels, -1, -1)
        assert torch.allclose(model(x), expected, atol=1e-5), channels


def test_other_classes_replace_the_last_layer_with_one_warning(source, tmp_path):
    path = save(source.state_dict(), tmp_path / 'weights.pth')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        model = create(pretrained=path, num_classes=3)
    assert [str(w.message).partition(':')[0] for w in caught] == [
        'the weights are for 5 classes and the model has 3'
    ]
    assert caught[0].filename == __file__
    assert torch.equal(model.forward_features(images()), source.forward_features(images()))
    large = randomise(create('vrwkv-large', num_classes=5, hidden_dims=8))
    save(large.state_dict(), path)
    with pytest.warns(UserWarning, match='5 classes and the model has 3'):
        model = create('vrwkv-large', path, num_classes=3, hidden_dims=8)
    pooled = [m.forward_head(m.forward_features(images()), pre_logits=True) for m in (model, large)]
    assert torch.equal(*pooled)


def flat(weights):
    return {name.removeprefix('backbone.'): value for name, value in weights.items()}


@pytest.mark.parametrize(
    'form',
    [
        lambda w: dict(state_dict=w, meta=dict(epoch=3)),
        lambda w: dict(model={f'module.{name}': value for name, value in w.items()}),
        lambda w: dict(state_dict=w, message_hub=dict(loss=HistoryBuffer([1.5], [1]))),
        lambda w: w,
        flat,
    ],
    ids=['mmcls', 'parallel', 'mmengine', 'weights', 'flat'],
)
def test_forms_of_checkpoints(form, source, tmp_path):
    torch.save(form(source.state_dict()), tmp_path / 'weights.pth')
    model = create(pretrained=str(tmp_path / 'weights.pth'), num_classes=5)
    assert torch.equal(model(images()), source(images()))


def test_backbone_of_a_detector_leaves_its_adapter_out(golden, tmp_path):
    data = golden('det_adapter_tiny')
    weights = {f'backbone.{name}': value for name, value in data.state_dict.items()}
    path = save(weights | {'rpn_head.rpn_conv.weight': torch.ones(2)}, tmp_path / 'weights.pth')
    arguments = {
        name: value
        for name, value in data.config.items()
        if name in ('embed_dims', 'depth', 'init_values', 'post_norm', 'key_norm', 'img_size')
    }
    model = create(
        pretrained=path, features_only=True, final_norm=False, in_channels=1, **arguments
    )
    name = 'layers.1.att.key.weight'
    assert torch.equal(model.state_dict()[name], data.state_dict[name])


def test_backbone_alone_leaves_the_head_random(source, tmp_path):
    path = save(source.backbone.state_dict(), tmp_path / 'weights.pth')
    with pytest.warns(UserWarning, match='the weights have no head: the head stays random'):
        model = create(pretrained=path)
    assert torch.equal(model.forward_features(images()), source.forward_features(images()))


def test_torch_hub_without_an_installed_vrwkv_ops(repository):
    code = f"""
import sys, torch
from importlib.util import find_spec
from pathlib import Path
while (spec := find_spec('vrwkv_ops')) and spec.origin:  # as if it were not installed
    sys.path.remove(str(Path(spec.origin).parents[1]))
hub = torch.hub.load({str(repository)!r}, 'vrwkv_tiny', source='local', num_classes=3, depth=1)
assert hub(torch.ones(1, 3, 32, 32)).shape == (1, 3)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- downloads ----------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve a folder as the Hugging Face Hub does; return the folder and the requested paths."""
    folder, requests = tmp_path / 'hub', []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self):
            requests.append((self.command, self.path))
            return super().send_head()

        def end_headers(self):
            self.send_header('X-Repo-Commit', '0' * 40)
            self.send_header('ETag', f'"{self.path.replace("/", "-")}"')
            super().end_headers()

        def send_error(self, code, *args):
            self.send_response(code)
            self.send_header('X-Error-Code', 'EntryNotFound')
            self.send_header('Content-Length', '0')
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), partial(Handler, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{server.server_port}')
    # huggingface_hub reads the variable when it is imported.
    constants, old = huggingface_hub.constants, huggingface_hub.constants.ENDPOINT
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(old, os.environ['HF_ENDPOINT'])
    monkeypatch.setattr(constants, 'ENDPOINT', os.environ['HF_ENDPOINT'])
    monkeypatch.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE', template)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path / 'hub_cache'))
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'torch_cache'))
    yield folder, requests
    server.shutdown()
    server.server_close()


def without_huggingface_hub(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        'vrwkv.engine.cache.find_spec',
        lambda name: None if name == 'huggingface_hub' else find_spec(name),
    )


@pytest.mark.parametrize('with_hub', [True, False])
def test_released_file_from_a_mirror(with_hub, source, hub, tmp_path, monkeypatch):
    if not with_hub:
        without_huggingface_hub(monkeypatch)
    folder, requests = hub
    path = folder / 'OpenGVLab/Vision-RWKV/resolve/main/vrwkv_t_in1k_224.pth'
    path.parent.mkdir(parents=True)
    save(source.state_dict(), path)
    for _ in range(2):
        model = create(pretrained=True, num_classes=5)
        assert torch.equal(model(images()), source(images()))
    assert requests.count(('GET', f'/{path.relative_to(folder)}')) == 1, requests
    assert (tmp_path / 'hub_cache').exists() == with_hub
    assert (tmp_path / 'torch_cache').exists() != with_hub


@pytest.mark.parametrize('with_hub', [True, False])
def test_file_of_the_hub_with_escaped_characters(with_hub, hub, monkeypatch):
    if not with_hub:
        without_huggingface_hub(monkeypatch)
    path = hub[0] / 'owner/name/resolve/main/my model+.pth'
    path.parent.mkdir(parents=True)
    path.write_bytes(b'weights')
    url = f'{os.environ["HF_ENDPOINT"]}/owner/name/resolve/main/my%20model%2B.pth'
    assert fetch(url).read_bytes() == b'weights'


@pytest.mark.parametrize('with_hub', [True, False])
def test_repository_of_the_hub(with_hub, source, hub, monkeypatch):
    if not with_hub:
        without_huggingface_hub(monkeypatch)
    folder = hub[0] / 'owner/name/resolve'
    for revision, file in (('main', 'pytorch_model.bin'), ('v2', 'model.safetensors')):
        (folder / revision).mkdir(parents=True)
        if file.endswith('.bin'):
            torch.save(source.state_dict(), folder / revision / file)
        else:
            save_file(source.state_dict(), folder / revision / file)
    for name in ('owner/name', 'hf-hub:owner/name@v2'):
        model = create(pretrained=name, num_classes=5)
        assert torch.equal(model(images()), source(images()))
    with pytest.raises(DownloadError, match=r'owner/other has none of the files model\.safetens'):
        create(pretrained='owner/other')


# --- Hugging Face -------------------------------------------------------------------------------


@pytest.fixture
def pushed(source, monkeypatch):
    """Return the files that ``push_to_hub`` uploads."""
    files = {}

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo_id, **kwargs):
            return huggingface_hub.RepoUrl(f'https://huggingface.co/{repo_id}')

        def upload_folder(self, *, folder_path, **kwargs):
            files.update({path.name: path.read_bytes() for path in Path(folder_path).iterdir()})

    monkeypatch.setattr('huggingface_hub.hub_mixin.HfApi', Api)
    source.push_to_hub('owner/name')
    return files


def test_round_trip_through_the_hub(source, hub, pushed):
    folder = hub[0] / 'owner/name/resolve/main'
    folder.mkdir(parents=True)
    for name, data in pushed.items():
        (folder / name).write_bytes(data)
    model = vrwkv.VisionRWKV.from_pretrained('owner/name')
    assert torch.equal(model(images()), source(images()))


def test_saved_folder(source, tmp_path):
    source.reset_classifier(4)
    source.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {'README.md', 'config.json', 'model.safetensors'}
    config = json.loads((tmp_path / 'config.json').read_text())
    assert (config['family'], config['num_classes'], config['depth']) == ('VRWKV', 4, 2)
    model = vrwkv.VisionRWKV.from_pretrained(tmp_path, strict=True)
    assert not model.training
    assert torch.equal(model(images()), source(images()))
    again = create(pretrained=tmp_path, num_classes=4)
    assert torch.equal(again(images()), source(images()))
    # As huggingface_hub before 1.0 calls it.
    old = dict(model_id=str(tmp_path), proxies=None, resume_download=None)
    again = vrwkv.VisionRWKV._from_pretrained(**old, **config)
    assert torch.equal(again(images()), source(images()))
    with pytest.warns(UserWarning, match='4 classes and the model has 2'):
        vrwkv.VisionRWKV.from_pretrained(tmp_path, num_classes=2)


@pytest.mark.parametrize(
    'change',
    [
        lambda model: model.reset_classifier(3),
        lambda model: model.reset_classifier(0),
        lambda model: model.prune_intermediate_layers([0]),
        lambda model: model.prune_intermediate_layers([0], prune_norm=True, prune_head=False),
    ],
)
@pytest.mark.parametrize('num_classes', [0, 5])
def test_changed_model_is_saved_as_it_is(num_classes, change, tmp_path):
    model = randomise(create('vrwkv-large', num_classes=num_classes)).eval()
    change(model)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        again = vrwkv.VisionRWKV.from_pretrained(tmp_path)
        headless = vrwkv.VisionRWKV.from_pretrained(tmp_path, num_classes=0)
    assert torch.equal(again(images()), model(images()))
    model.reset_classifier(0)
    assert torch.equal(headless(images()), model(images()))


def test_grid_that_is_not_square_is_saved(tmp_path):
    model = randomise(create(img_size=(32, 64), num_classes=2))
    model.save_pretrained(tmp_path)
    x = images()
    assert torch.equal(vrwkv.VisionRWKV.from_pretrained(tmp_path)(x), model.eval()(x))


def test_model_card_marks_the_published_figures(source):
    card = str(source.generate_model_card())
    assert 'pipeline_tag: image-classification' in card
    assert "the authors', for their own weights" in card
    rows = re.findall(r'^\| (vrwkv\S+) \| \d+ \| ([\d.]+) \| (.*) \|$', card, re.MULTILINE)
    assert {name: float(top1) for name, top1, _ in rows} == {
        name: variant.top1 for name, variant in VARIANTS.items() if variant.top1
    }
    assert all(source.endswith('not measured here') for *_, source in rows)


# --- torch alone --------------------------------------------------------------------------------


def test_torch_alone_is_enough(source, tmp_path, repository):
    """All models, a checkpoint of mmengine, and torch.hub, without any other package."""
    state = dict(state_dict=source.state_dict(), hub=dict(loss=HistoryBuffer([1.5], [1])))
    torch.save(state, tmp_path / 'weights.pth')
    code = f"""
import sys
blocked = 'mmengine mmcv mmpretrain mmdet mmseg timm huggingface_hub safetensors yaml torchvision'
sys.modules.update(dict.fromkeys(blocked.split()))
import torch, vrwkv
with torch.device('meta'):
    for name in vrwkv.list_models():
        vrwkv.create_model(name, num_classes=10)
path, arguments = {str(tmp_path / 'weights.pth')!r}, {SMALL!r}
model = vrwkv.create_model('vrwkv-tiny', path, num_classes=5, **arguments).eval()
torch.save(model(torch.ones(1, 3, 32, 32)), path)
hub = torch.hub.load({str(repository)!r}, 'vrwkv6_tiny', source='local', num_classes=3, depth=1)
assert hub(torch.ones(1, 3, 32, 32)).shape == (1, 3)
for call in (model.save_pretrained, model.push_to_hub, vrwkv.VisionRWKV.from_pretrained):
    try:
        call('name')
    except ImportError as error:
        assert 'pip install huggingface_hub safetensors' in str(error)
    else:
        sys.exit('no error')
try:
    vrwkv.create_model('vrwkv-tony')
except ValueError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("there is no model 'vrwkv-tony'. Did you mean vrwkv-tiny")
    scores = torch.load(tmp_path / 'weights.pth', weights_only=True)
    assert torch.equal(scores, source(torch.ones(1, 3, 32, 32)))


# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(name='vrwkv-tyni'), ValueError, r"no model 'vrwkv-tyni'\. Did you mean vrwkv-tiny"),
        (
            dict(features_only=True, out_indices=2),
            ValueError,
            r'out_indices must lie in \[-2, 1\] for depth=2, got 2',
        ),
        (dict(out_indices=1), ValueError, 'out_indices=1 needs features_only=True'),
        (dict(features_only=True, num_classes=3), ValueError, 'has no head, but num_classes=3'),
        (dict(num_classes=-1), ValueError, 'num_classes must be at least 0, got -1'),
        (dict(global_pool='mean'), ValueError, "global_pool must be one of 'avg'.*got 'mean'"),
        (dict(pretrained=3), TypeError, 'pretrained must be True, False, a path, .*, got 3'),
        (dict(pretrained='absent.pth'), FileNotFoundError, r"'absent\.pth' does not exist"),
        (dict(depht=3), TypeError, "unexpected keyword argument 'depht'"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        create(**arguments)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(embed_dims=32), r'weights\.pth: .* with embed_dims=24 \(here 32\): build the model'),
        (dict(name='vrwkv6-tiny'), r'no weights of VRWKV6 .* a VRWKV: build a VRWKV instead'),
        (dict(init_values=1.0), r'they lack layers\.0\.gamma1, .* and 1 more'),
        (dict(hidden_dims=8), r'head of the weights \(fc\.\w+ of shape .*does not fit the one'),
    ],
)
def test_weights_of_another_model(arguments, message, source, tmp_path):
    path = save(source.state_dict(), tmp_path / 'weights.pth')
    with pytest.raises(CheckpointError, match=message):
        create(pretrained=path, **dict(num_classes=5) | arguments)


def test_weights_of_no_model_of_this_project(tmp_path):
    path = save({'layer1.0.conv1.weight': torch.zeros(2)}, tmp_path / 'resnet.pth')
    with pytest.raises(CheckpointError, match=r'resnet\.pth: no weights of VRWKV .*layer1\.0\.con'):
        create(pretrained=path)


def test_channels_that_cannot_be_adapted(source, tmp_path):
    path = save(create(in_channels=2).state_dict(), tmp_path / 'weights.pth')
    with pytest.raises(CheckpointError, match=r'images with 2 channels .* adapted to 4'):
        create(pretrained=path, in_channels=4)


@pytest.mark.parametrize('with_hub', [True, False])
def test_no_network(with_hub, hub, monkeypatch):
    if with_hub:
        monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    else:
        without_huggingface_hub(monkeypatch)
    monkeypatch.setenv('HF_ENDPOINT', 'http://127.0.0.1:9')  # nobody listens there
    with pytest.raises(DownloadError, match=r'Cannot download .*: there is no connection to 127'):
        create(pretrained=True)
