"""Exports: every route against upstream's numbers or PyTorch, and the tools from end to end."""

import functools
import json
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch.utils import cpp_extension

from vrwkv import create_model, export
from vrwkv.backbones import VRWKV, ViT
from vrwkv.exported import load_exported

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / 'tests/data/golden/cls_tiny.pt'
ROUTES = {'.onnx': export.to_onnx, '.xml': export.to_openvino, '.pt2': export.to_aoti}


@pytest.fixture(scope='module')
def golden():
    """Upstream's classifier: the model, an input and its output."""
    data = torch.load(GOLDEN, weights_only=True)
    model = VRWKV(**data['config'])
    model.load_state_dict(data['state_dict'])
    return model.eval(), data['input'], data['outputs']


@pytest.fixture(scope='module')
def files(golden, tmp_path_factory):
    """The golden model through every route, for all sizes; ONNX and OpenVINO share a graph."""
    model, images, _ = golden
    folder = tmp_path_factory.mktemp('exports')
    results = {}

    def save_onnx(exported, path, opset):
        if '.onnx' in results:
            shutil.copy(results['.onnx'].path, path)
        else:
            written(exported, path, opset)

    written = export._save_onnx
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, 'export_program', functools.cache(export.export_program))
        patch.setattr(export, '_save_onnx', save_onnx)
        for suffix, route in ROUTES.items():
            arguments = dict(size=images.shape[2:], dynamic=True)
            results[suffix] = replace(route(model, folder / f'model{suffix}', **arguments))
    return results


@pytest.mark.parametrize('suffix', ROUTES)
def test_equals_upstream(suffix, golden, files):
    """1e-5 of the largest output: float32 on both sides."""
    _, images, outputs = golden
    assert len(files[suffix].errors) == 3
    run, metadata = load_exported(files[suffix].path)
    assert metadata['task'] == 'features'
    for found, expected in zip(run(images.numpy()), outputs, strict=True):
        assert np.abs(found - expected.numpy()).max() <= 1e-5 * expected.abs().max().item()


@pytest.mark.parametrize('suffix', ROUTES)
@pytest.mark.parametrize(
    'shape', [(1, 3, 32, 32), (1, 3, 96, 48), (1, 3, 48, 128), (3, 3, 64, 80), (2, 3, 70, 33)]
)
def test_one_file_serves_all_sizes(suffix, shape, golden, files):
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = golden[0](images)
    for a, b in zip(load_exported(files[suffix].path)[0](images.numpy()), expected, strict=True):
        assert np.abs(a - b.numpy()).max() <= 1e-5 * b.abs().max().item()


@pytest.mark.parametrize('suffix', ROUTES)
def test_wrong_suffix_is_refused_first(suffix):
    """Before the model is built."""
    with pytest.raises(ValueError, match=rf'must end in \{suffix}, got model\.bin'):
        ROUTES[suffix](None, 'model.bin')


def test_foreign_file(files, tmp_path):
    model = onnx.load(files['.onnx'].path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / 'model.onnx')
    with pytest.raises(ValueError, match=r'model\.onnx was not written by vrwkv\.export'):
        load_exported(tmp_path / 'model.onnx')


@pytest.mark.parametrize(
    'options', [dict(name='vrwkv-tiny'), dict(name='vrwkv6-tiny', num_heads=2)]
)
def test_classifier_in_plain_pytorch(options):
    model = create_model(**options, embed_dims=16, depth=1, img_size=32, num_classes=3)
    result = export.export_program(model.eval())
    assert result.metadata['task'] == 'classification' and max(result.errors.values()) < 1e-5


def test_onnx_has_standard_operators_and_metadata(files):
    model = onnx.load(files['.onnx'].path)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {''}
    assert [entry.version for entry in model.opset_import] == [20]
    assert json.loads(model.metadata_props[0].value)['shape'] is None


def with_decay(decay, causal=False):
    torch.manual_seed(0)
    model = VRWKV(img_size=64, patch_size=8, embed_dims=16, depth=2, causal=causal).eval()
    with torch.no_grad():
        model.layers[1].att.spatial_decay.copy_(torch.linspace(-decay, decay, 16))
    return model


@pytest.mark.parametrize(('decay', 'form'), [(150, 'chunked'), (900, 'chunked'), (3000, 'error')])
def test_form_is_read_from_the_decays(decay, form):
    """Of 64 tokens."""
    model = with_decay(decay)
    if form == 'error':
        with pytest.raises(ValueError, match=r'layers\.1\.att\.spatial_decay reaches 3000'):
            export.export_program(model, size=64)
        return
    with pytest.warns(UserWarning, match='taking the chunked form'):
        result = export.export_program(model, size=64)
    assert result.form == form
    assert max(result.errors.values()) < 1e-5


def test_dynamic_form_holds_for_small_images():
    model = with_decay(80)
    with pytest.warns(UserWarning, match='taking the chunked form'):
        result = export.export_program(model, size=64, dynamic=True)
    for side in (24, 32, 96):
        images = torch.randn(1, 3, side, side)
        with torch.no_grad():
            (expected,) = model(images)
        (found,) = result.program.module()(images)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    with pytest.raises(ValueError, match='for 4 tokens: export for one size'):
        export.export_program(with_decay(1200), size=64, dynamic=True)


def test_causal_models_take_chunks():
    result = export.export_program(with_decay(5, causal=True), size=(64, 40))
    assert result.form == 'chunked'
    assert max(result.errors.values()) < 1e-5


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(size=8), 'at least two patches high and wide, 16 pixels, got 8 x 8'),
        (dict(form='scan'), 'form must be one of auto, cumsum'),
        (dict(opset=11), 'opset must be at least 18'),
        (dict(form='operators'), 'ONNX does not have the operators of vrwkv_ops'),
        (dict(normalize=True), 'this model has none'),
        (dict(weights='a.pth'), 'weights belong to a config'),
    ],
)
def test_wrong_arguments(arguments, message, tmp_path):
    arguments = dict(out='model.onnx', size=64) | arguments
    arguments['out'] = tmp_path / arguments['out']
    with pytest.raises(ValueError, match=message):
        export.to_onnx(with_decay(1), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('form', ['cumsum', 'blocked'])
@pytest.mark.parametrize(
    ('decay', 'causal', 'message'),
    [
        (1, True, 'this model has causal=True'),
        (41, False, r'layers\.1\.att\.spatial_decay reaches 41'),
        (float('nan'), False, r'spatial_decay is not finite'),
    ],
)
def test_form_that_does_not_hold(form, decay, causal, message):
    with pytest.raises(ValueError, match=message):
        export.export_program(with_decay(decay, causal), size=64, form=form)


def test_half_precision():
    with pytest.raises(TypeError, match=r'call model\.float'):
        export.export_program(with_decay(1).bfloat16(), size=64)


def test_an_operator_that_stays(monkeypatch):
    table = export.decompositions()
    kept = {op: f for op, f in table.items() if 'token_shift' not in str(op)}
    monkeypatch.setattr(export, 'decompositions', lambda *args: kept)
    with pytest.raises(RuntimeError, match=r'vrwkv_ops\.token_shift.* stays in the graph'):
        export.export_program(with_decay(1), size=64)


def test_nothing_is_written_that_differs(tmp_path, monkeypatch):
    monkeypatch.setattr(export, 'TOLERANCE', 0)
    with pytest.raises(RuntimeError, match='nothing was written'):
        export.to_onnx(with_decay(1), tmp_path / 'a.onnx', size=64)
    assert not list(tmp_path.iterdir())


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'onnxscript', None)
    monkeypatch.delitem(sys.modules, 'onnxscript._internal', raising=False)
    with pytest.raises(ImportError, match=r"pip install (-e '\.\[deployment\]'|onnxscript)"):
        export.to_onnx(with_decay(1), tmp_path / 'a.onnx', size=64)


@pytest.mark.parametrize('name', ['a.onnx', 'a.txt', 'a.pt2'])
def test_files_that_are_none(name, tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match=name):
        load_exported(tmp_path / name)
    (tmp_path / 'a.pt2').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='is damaged'):
        load_exported(tmp_path / 'a.pt2')


def test_package_of_another_torch(files, tmp_path):
    other = tmp_path / 'other.pt2'
    with zipfile.ZipFile(files['.pt2'].path) as source, zipfile.ZipFile(other, 'w') as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith('_metadata.json'):
                data = data.replace(torch.__version__.encode(), b'1.0')
            target.writestr(name, data)
    with pytest.raises(ValueError, match=r'compiled by torch 1\.0, and this is torch'):
        load_exported(other)


def library():
    return next((ROOT / 'vrwkv_ops/src/vrwkv_ops').glob('libvrwkv_ops_cpu.so'))


def test_aoti_runs_with_torch_and_the_library_alone(golden, files):
    """`-I` and an empty folder: neither vrwkv nor vrwkv_ops can be imported."""
    script = f"""
import torch
torch.ops.load_library({str(library())!r})
package = torch._inductor.aoti_load_package({str(files['.pt2'].path)!r})
y = package(torch.load({str(GOLDEN)!r}, weights_only=True)['input'])
import sys
assert not [name for name in sys.modules if name.startswith('vrwkv')]
print(y[0].flatten()[:3].tolist())
"""
    line = [sys.executable, '-I', '-c', script]
    result = subprocess.run(line, cwd='/', capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = golden[2][0].flatten()[:3].tolist()
    np.testing.assert_allclose(json.loads(result.stdout), expected, rtol=1e-4, atol=1e-5)


def test_program_with_operators_in_a_new_process(tmp_path):
    export.export_program(with_decay(1), out=tmp_path / 'a.pt2', size=64, form='operators')
    script = f"""
from vrwkv.exported import load_exported
print(load_exported({str(tmp_path / 'a.pt2')!r})[1]['form'])
"""
    result = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True)
    assert result.stdout == 'operators\n', result.stderr


def test_aoti_runs_from_cpp(golden, files, tmp_path):
    program = tmp_path / 'run_aoti'
    folders = cpp_extension.library_paths()
    subprocess.run(
        [
            *('g++', '-std=c++17', '-O1', ROOT / 'tools/deployment/run_aoti.cpp', '-o', program),
            *(f'-I{path}' for path in cpp_extension.include_paths()),
            *(f'-L{path}' for path in folders),
            *(f'-Wl,-rpath,{path}' for path in folders),
            *('-Wl,--no-as-needed', '-ltorch', '-ltorch_cpu', '-lc10', '-ldl'),
        ],
        check=True,
    )
    line = [program, files['.pt2'].path, library(), '2', '3', '48', '64']
    result = subprocess.run(line, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = golden[0](torch.ones(2, 3, 48, 64))
    shape, values = result.stdout.splitlines()[:2]
    assert shape.split()[1:] == [str(side) for side in expected[0].shape]
    found = [float(value) for value in values.split()[1:]]
    np.testing.assert_allclose(found, expected[0].flatten()[:5], rtol=1e-4, atol=1e-5)


# --- whole models and the tools -----------------------------------------------------------------


@pytest.fixture
def adapters(monkeypatch, tmp_path):
    """Configs of a segmentor and a detector with small adapters."""
    backbone = dict(embed_dims=24, depth=1, img_size=64, conv_inplane=8, deform_num_heads=2,
                    drop_path_rate=0, init_values_inject=0.5, fuse='last',
                    interaction_indexes=[[0, 0]])  # fmt: skip
    texts = {}
    for task, base in (
        ('segmentation', 'segmentation/upernet_vrwkv-adapter-tiny_8xb2-160k_ade20k-512x512.py'),
        ('detection', 'detection/mask-rcnn_vrwkv-adapter-tiny_fpn_1x_coco.py'),
    ):
        texts[task] = f'_base_ = {str(ROOT / "configs" / base)!r}\n'
        channels = dict(in_channels=[24] * 4)
        if task == 'segmentation':
            decoder = channels | dict(channels=16, num_classes=5)
            auxiliary = dict(in_channels=24, channels=16, num_classes=5)
            model = dict(backbone=backbone, decode_head=decoder, auxiliary_head=auxiliary)
        else:
            model = dict(backbone=backbone, neck=channels | dict(out_channels=16))
        texts[task] += f'model = {model}\n'
        (tmp_path / f'{task}.py').write_text(texts[task])
    return tmp_path


@pytest.mark.parametrize(('task', 'outputs'), [('segmentation', 1), ('detection', 5)])
def test_adapters_for_all_sizes(task, outputs, adapters):
    """UperNet whole, and backbone and neck of Mask R-CNN, as programs of PyTorch's operators."""
    config = adapters / f'{task}.py'
    result = export.export_program(config, size=(64, 96), dynamic=True)
    assert result.form == 'cumsum'
    assert len(result.program.graph_signature.user_outputs) == outputs
    assert max(result.errors.values()) < 1e-5
    with pytest.raises(ValueError, match='height and width must be multiples of 32'):
        export.export_program(config, size=(64, 100))


@pytest.fixture(scope='module')
def digits(tmp_path_factory):
    """The demo's config with two layers, its data, and a checkpoint that knows its classes."""
    from vrwkv.analysis.models import load_model, read_config
    from vrwkv_cls.datasets import write_digits

    folder = tmp_path_factory.mktemp('digits')
    write_digits(folder / 'data', size=32)
    config = folder / 'digits.py'
    base = ROOT / 'configs/classification/vrwkv-nano_1xb64_digits.py'
    roots = {
        f'{split}_dataloader': dict(dataset=dict(data_root=str(folder / 'data')))
        for split in ('train', 'val', 'test')
    }
    depth = 'model = dict(backbone=dict(depth=2))'
    config.write_text(f'_base_ = {str(base)!r}\n{depth}\nlocals().update({roots})\n')
    torch.manual_seed(0)
    model = load_model(read_config(str(config)))
    meta = dict(dataset_meta=dict(classes=[f'digit {i}' for i in range(10)]))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), folder / 'model.pth')
    return folder


def test_tools(digits, tmp_path, load_script, monkeypatch, capsys):
    """ONNX with an int8 copy, run on an image, and compared."""
    config, weights, out = digits / 'digits.py', digits / 'model.pth', tmp_path / 'model.onnx'
    arguments = ['--dynamic', '--normalize', '--int8', '--calibration', '8', '--evaluation', '20']
    line = [str(config), str(weights), str(out)]
    load_script('tools/deployment/export_onnx.py').main(line + arguments)
    printed = capsys.readouterr().out
    assert '20 images of the validation set: the same answer for' in printed
    assert 'Top-1 accuracy: float32' in printed
    quantised = tmp_path / 'model-int8.onnx'
    assert quantised.stat().st_size < 0.45 * out.stat().st_size

    image = next((digits / 'data/val/3').iterdir())
    for file in (out, quantised):
        answer = tmp_path / 'answer.png'
        arguments = [str(file), str(image), '--out', str(answer)]
        load_script('tools/deployment/run_exported.py').main(arguments)
        assert capsys.readouterr().out.startswith('digit ')
        assert Image.open(answer).width > 500

    check = load_script('tools/deployment/check_export.py')
    monkeypatch.setattr(check, 'deit_tiny', lambda: ViT(embed_dims=16, depth=1, num_heads=2).eval())
    check.main([*line, '--repeats', '2'])
    printed = capsys.readouterr().out
    assert float(printed.split('PyTorch: ')[1].split()[0]) < 1e-5
    assert 'DeiT-T, ONNX Runtime' in printed


@pytest.mark.parametrize('name', ['export_program', 'export_openvino', 'export_aoti'])
def test_other_tools(name, digits, tmp_path, load_script, capsys):
    suffix = '.xml' if 'openvino' in name else '.pt2'
    out = tmp_path / f'model{suffix}'
    arguments = [str(digits / 'digits.py'), str(digits / 'model.pth'), str(out)]
    load_script(f'tools/deployment/{name}.py').main(arguments)
    printed = capsys.readouterr().out
    assert 'differs from PyTorch by' in printed
    assert f'{sum(path.stat().st_size for path in tmp_path.iterdir()) / 1e6:.1f} MB' in printed
    run, metadata = load_exported(out)
    assert metadata['classes'][3] == 'digit 3'
    assert run(np.zeros((1, 3, 32, 32), np.float32))[0].shape == (1, 10)


@pytest.mark.parametrize('channels', [1, 3])
def test_images_of_16_bits_and_of_one_channel(channels, load_script, tmp_path):
    """Pillow alone would cut values at 255."""
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    Image.fromarray(values).save(tmp_path / 'a.png')
    metadata = dict(mean=[0.0] * channels, std=[1.0] * channels, step=32)
    tool = load_script('tools/deployment/run_exported.py')
    batch = tool.read(tmp_path / 'a.png', metadata, None)[1]
    np.testing.assert_array_equal(batch[0], [values // 256] * channels)
    with pytest.raises(ValueError, match='the model takes 4 channels'):
        tool.read(tmp_path / 'a.png', dict(mean=[0.0] * 4), None)


def test_tool_errors(digits, tmp_path, load_script):
    line = [str(digits / 'digits.py'), str(tmp_path / 'no.pth'), str(tmp_path / 'a.onnx')]
    with pytest.raises(SystemExit, match=r'^Error: .*no\.pth'):
        load_script('tools/deployment/export_onnx.py').main(line)
