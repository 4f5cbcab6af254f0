"""Rasters: reading, statistics, pre-trained weights, and maps of them, against rasterio alone."""

import errno
import itertools
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, TRANSFORMS
from PIL import Image
from rasterio.control import GroundControlPoint

import vrwkv_seg  # noqa: F401
from vrwkv.analysis.models import load_model
from vrwkv.backbones import VRWKV, VRWKV6, ViT, VRWKVAdapter
from vrwkv.engine import cli
from vrwkv_seg import rasters

CONFIG = 'configs/segmentation/upernet_vrwkv-adapter-nano_1xb8-1k_digit-rasters-96x96.py'
TRANSFORM = rasterio.transform.from_origin(500_000, 5_400_000, 0.5, 0.5)
CLASSES = ('background', *'0123456789')


def write(path, values, **options):
    """Write values of shape (bands, height, width)."""
    count, height, width = values.shape
    options = dict(crs='EPSG:32631', transform=TRANSFORM) | options
    with rasterio.open(
        path, 'w', 'GTiff', width, height, count, dtype=values.dtype, **options
    ) as file:
        file.write(values)
    return path


def read(path):
    with rasterio.open(path) as file:
        return file.read()


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


# --- reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', ['uint8', 'uint16', 'int16', 'float32'])
@pytest.mark.parametrize('bands', [None, (4, 2)])
def test_bands_and_types(tmp_path, dtype, bands):
    values = np.arange(4 * 6 * 5).reshape(4, 6, 5).astype(dtype)
    values[1, 2, 3] = 77  # nodata in a band that both choose
    write(tmp_path / 'a.tif', values, nodata=77)
    loader = TRANSFORMS.build(dict(type='LoadRaster', bands=bands))
    results = loader(dict(img_path=str(tmp_path / 'a.tif')))
    chosen = values if bands is None else values[[3, 1]]
    valid = (chosen != 77).all(0)
    assert results['img'].dtype == ('uint8' if dtype == 'uint8' else 'float32')
    np.testing.assert_array_equal(results['img'], (chosen * valid).transpose(1, 2, 0))
    np.testing.assert_array_equal(results['valid'], valid)
    assert not valid[2, 3]


def test_nodata_is_ignored(tmp_path):
    """NaN as the image's nodata, 9 as that of the label map."""
    image = np.ones((2, 4, 4), np.float32)
    image[0, 0, 0] = np.nan
    labels = np.array([[[0, 1, 2, 9]] * 4], np.int16)
    for folder, values, nodata in (('images', image, np.nan), ('labels', labels, 9)):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / 'a.tif', values, nodata=nodata)
    settings = dict(
        type='CheckedSegDataset',
        data_root=str(tmp_path),
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.tif',
        seg_map_suffix='.tif',
        pipeline=[dict(type='LoadRaster'), dict(type='LoadRasterAnnotations')],
    )
    sample = DATASETS.build(settings | dict(metainfo=dict(classes=('a', 'b', 'c'))))[0]
    expected = np.where(labels[0] == 9, 255, labels[0])
    expected[0, 0] = 255
    np.testing.assert_array_equal(sample['gt_seg_map'], expected)
    zero = settings | dict(metainfo=dict(classes=('b', 'c')), reduce_zero_label=True)
    sample = DATASETS.build(zero)[0]
    np.testing.assert_array_equal(sample['gt_seg_map'][1], [255, 0, 1, 255])
    with pytest.raises(ValueError, match=r'a\.tif has labels outside the 2 classes: 2'):
        DATASETS.build(settings | dict(metainfo=dict(classes=('a', 'b'))))[0]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda path, x: write(path, x * np.nan, nodata=0), 'NaN or infinite.*--nodata nan'),
        (lambda path, x: write(path, x * 0, nodata=0), 'no pixel with data'),
        (lambda path, x: truncate(write(path, x)), 'truncated or damaged|as a raster'),
        (lambda path, x: write(path, x[:2]), r'has the bands 1 to 2, not \[3\]'),
        (lambda path, x: path.write_text('text'), 'as a raster'),
    ],
)
def test_bad_files(tmp_path, change, message):
    path = tmp_path / 'a.tif'
    change(path, np.random.default_rng(0).random((3, 64, 64)))
    loader = TRANSFORMS.build(dict(type='LoadRaster', bands=(3,)))
    with pytest.raises(ValueError, match=f'(?s)a.tif.*({message})'):
        loader(dict(img_path=str(path)))


def test_statistics_equal_numpys(tmp_path, load_script, monkeypatch):
    tool = load_script('tools/analysis_tools/band_statistics.py')
    monkeypatch.setattr(tool, 'SIDE', 7)
    rng = np.random.default_rng(0)
    images = [rng.integers(1, 60_000, (3, *shape)).astype('uint16') for shape in ((9, 20), (30, 8))]
    images[0][1, :4] = 0
    paths = [write(tmp_path / f'{n}.tif', x, nodata=0) for n, x in enumerate(images)]
    tool.main([*map(str, paths), '--bands', '3', '2', '--out', str(tmp_path / 'out.py')])
    pixels = np.concatenate([x[[2, 1]][:, (x[1] != 0)] for x in images], axis=1)
    model = Config.fromfile(tmp_path / 'out.py').bands
    # Written with six digits.
    np.testing.assert_allclose(model.data_preprocessor['mean'], pixels.mean(1), rtol=1e-5)
    np.testing.assert_allclose(model.data_preprocessor['std'], pixels.std(1), rtol=1e-5)
    assert model.backbone.in_channels == 2


# --- pre-trained weights ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('kind', 'arguments'),
    [(VRWKV, {}), (VRWKV6, dict(num_heads=2)), (ViT, dict(num_heads=2)), (VRWKVAdapter, {})],
)
def test_weights_for_three_bands_serve_others(kind, arguments):
    """Equal bands give what they gave with three: the rule of timm."""
    adapter = kind is VRWKVAdapter
    arguments = arguments | dict(img_size=64, embed_dims=32, depth=4 if adapter else 1)
    if adapter:
        arguments |= dict(deform_num_heads=4, norm_cfg=dict(type='BN'))
    source = kind(**arguments).eval()
    image = torch.randn(1, 1, 64, 64)
    expected = source(image.expand(-1, 3, -1, -1))
    # Six bands repeat the three twice at half the weight; one band has their sum.
    for channels in (1, 6):
        model = kind(in_channels=channels, **arguments).eval()
        with pytest.warns(UserWarning, match=f'is adapted to {channels}'):
            model.load_state_dict(source.state_dict())
        with torch.no_grad():
            found = model(image.expand(-1, channels, -1, -1))
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_four_bands_of_floating_point_need_the_loader_of_rasters(tmp_path):
    """Saved as RGBA, as rasters of four bands often are."""
    values = np.full((4, 8, 8), 0.5, np.float32)
    path = write(tmp_path / 'a.tif', values, photometric='RGB', alpha='yes')
    load = TRANSFORMS.build(dict(type='LoadImageFromFile'))
    with pytest.raises(ValueError, match=r'a\.tif has .* cannot turn into 8 bits'):
        load(dict(img_path=str(path)))


@pytest.mark.parametrize('kind', ['mask', 'alpha', 'four bands'])
def test_masks_of_the_file_hide_pixels(kind, tmp_path):
    """A mask, and an alpha channel that is none of the bands that are read."""
    values = np.full((3 if kind == 'mask' else 4, 8, 8), 9, np.uint8)
    shown = np.arange(64).reshape(8, 8) % 8 > 2
    with rasterio.open(
        tmp_path / 'a.tif', 'w', 'GTiff', 8, 8, len(values), dtype='uint8', photometric='RGB',
        transform=TRANSFORM, **({} if kind == 'mask' else {'alpha': 'yes'}),
    ) as file:  # fmt: skip
        if kind == 'mask':
            file.write_mask(shown)
        else:
            values[3] = 255 * shown
        file.write(values)
    bands = None if kind == 'four bands' else (3, 2, 1)
    with rasters.open_raster(tmp_path / 'a.tif') as file:
        assert file.colorinterp[-1].name == ('blue' if kind == 'mask' else 'alpha')
        for window in (None, rasterio.windows.Window(2, 1, 4, 5)):
            _, valid = rasters.read_bands(file, bands, window)
            part = shown if window is None else shown[1:6, 2:6]
            assert np.array_equal(valid, part if bands else np.ones_like(part))


# --- docs/rasters.md ----------------------------------------------------------------------------


@pytest.mark.usefixtures('training_environment')
def test_tutorial(load_script, repository, tmp_path):
    """Rasters, their statistics, a short training and a map on the raster's grid."""
    root = load_script('demo/digit_rasters.py').write_rasters(tmp_path / 'data', 6, 2, 2)
    bands = tmp_path / 'bands.py'
    images = map(str, sorted(root.glob('images/training/*.tif')))
    load_script('tools/analysis_tools/band_statistics.py').main([*images, '--out', str(bands)])
    data = dict(num_workers=0, persistent_workers=False, dataset=dict(data_root=str(root)))
    config = tmp_path / 'short.py'
    config.write_text(f"""
_base_ = [{str(repository / CONFIG)!r}, {str(bands)!r}]
model = _base_.pop('bands')
train_dataloader = dict(batch_size=2, **{data!r})
val_dataloader = test_dataloader = {data!r}
param_scheduler = []
train_cfg = dict(max_iters=2, val_interval=2)
""")
    cli.train([str(config), '--work-dir', str(tmp_path / 'work')])
    drawn = ['--work-dir', str(tmp_path / 'work'), '--show-dir', str(tmp_path / 'drawn')]
    cli.test([str(config), str(tmp_path / 'work/iter_2.pth'), *drawn])
    picture = np.asarray(Image.open(next((tmp_path / 'drawn').rglob('*.png'))))
    assert picture.std() > 20  # mmseg's own would be black, of 16 bits divided by 256
    out = tmp_path / 'map.tif'
    files = (config, tmp_path / 'work/iter_2.pth', root / 'large.tif', out)
    assert load_script('tools/predict_raster.py').main([*map(str, files), '--overlap', '32']) == 0
    with rasterio.open(out) as found, rasterio.open(root / 'large.tif') as large:
        assert (found.crs, found.transform) == (large.crs, large.transform)
        assert found.colormap(1)[1][:3] != (0, 0, 0) and found.tags()['class_0'] == 'background'
        np.testing.assert_array_equal(found.read(1) == 255, (large.read() == 0).any(0))


def test_config_of_the_page(load_script, repository, tmp_path, monkeypatch):
    """It takes what band_statistics.py writes, and ignores pixels without data."""
    page = (repository / 'docs/rasters.md').read_text()
    monkeypatch.chdir(tmp_path)
    Path('configs').symlink_to(repository / 'configs')
    Path('my_rasters.py').write_text(re.search(r'```python\n(.*?)```', page, re.S)[1])
    values = np.random.default_rng(0).integers(1, 999, (4, 64, 64)).astype('uint16')
    values[:, :8] = 0
    for kind, content in (('images', values), ('labels', values[:1] % 3)):
        folder = Path('data/my_rasters', kind, 'train')
        folder.mkdir(parents=True)
        write(folder / 'a.tif', content.astype('uint16'), nodata=0 if kind == 'images' else None)
    statistics = load_script('tools/analysis_tools/band_statistics.py').main
    statistics(['data/my_rasters/images/train/a.tif', '--out', 'my_bands.py'])
    cfg = Config.fromfile('my_rasters.py')
    assert cfg.model.backbone.in_channels == len(cfg.model.data_preprocessor.mean) == 4
    with DefaultScope.overwrite_default_scope('mmseg'):
        sample = DATASETS.build(cfg.train_dataloader.dataset)[0]
    assert sample['inputs'].shape == (4, 64, 64)
    ignored = sample['data_samples'].gt_sem_seg.data[0] == 255
    assert ignored.sum() == 8 * 64 and torch.equal(ignored, (sample['inputs'] == 0).all(0))


# --- maps ---------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def checkpoint(repository, tmp_path_factory):
    """A model of random weights whose classes differ from pixel to pixel."""
    torch.manual_seed(0)
    cfg = Config.fromfile(repository / CONFIG)
    model = load_model(cfg)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    palette = [[20 * index, 0, 255] for index in range(len(CLASSES))]
    meta = dict(CLASSES=CLASSES, PALETTE=palette)  # as OpenMMLab 1.x
    path = tmp_path_factory.mktemp('map') / 'weights.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=meta), path)
    return path


@pytest.fixture
def tool(load_script, monkeypatch):
    tool = load_script('tools/predict_raster.py')
    monkeypatch.setattr(tool, 'TILE', 64)  # small windows
    monkeypatch.setattr(tool, 'largest_side', lambda *args: 64)
    return tool


@pytest.fixture
def raster(tmp_path):
    rng = np.random.default_rng(0)
    coarse = rng.integers(1, 10_000, (4, 10, 13))
    values = np.kron(coarse, np.ones((1, 16, 16), int)).astype('uint16')[:, :150, :200]
    values[:, 20:50, :10] = 0
    return write(tmp_path / 'in.tif', values, nodata=0)


def arguments(repository, checkpoint, raster, *others):
    out = raster.with_name('out.tif')
    files = (repository / CONFIG, checkpoint, raster, out)
    return [str(x) for x in (*files, '--overlap', 32, *others)]


def blended(tool, repository, checkpoint, raster):
    """Blend all windows in one array: weights fall linearly over the overlaps."""
    predictor = tool.Predictor(str(repository / CONFIG), str(checkpoint), 'cpu')
    image = read(raster).astype(np.float32)
    height, width = image.shape[1:]
    total, weights = np.zeros((len(CLASSES), height, width)), np.zeros((height, width))

    def ramp(start, end, length):
        x = np.arange(start, end) + 0.5
        up = np.minimum(1, (x - start) / 32) if start else 1
        down = np.minimum(1, (end - x) / 32) if end < length else 1
        return up * down

    for top, left in itertools.product((0, 64), (0, 64, 128)):
        bottom, right = min(top + 96, height), min(left + 96, width)
        weight = ramp(top, bottom, height)[:, None] * ramp(left, right, width)
        part = image[:, top:bottom, left:right].transpose(1, 2, 0)
        total[:, top:bottom, left:right] += weight * predictor(part).numpy()
        weights[top:bottom, left:right] += weight
    return total / weights


def test_one_output_for_two_classes(tool, repository, raster, tmp_path):
    """As in mmseg: class 1 begins at the threshold of the head, and not at a half."""
    config, checkpoint = tmp_path / 'binary.py', tmp_path / 'binary.pth'
    loss = "dict(type='CrossEntropyLoss', use_sigmoid=True, class_weight=None)"
    config.write_text(f"""
_base_ = [{str(repository / CONFIG)!r}]
head = dict(num_classes=2, out_channels=1, threshold=0.3, loss_decode={loss})
model = dict(decode_head=head, auxiliary_head=head)
""")
    model = load_model(Config.fromfile(config))
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    out, probabilities = tmp_path / 'map.tif', tmp_path / 'p.tif'
    files = [str(path) for path in (config, checkpoint, raster, out)]
    assert tool.main([*files, '--overlap', '32', '--probabilities', str(probabilities)]) == 0
    labels, probability = read(out)[0], read(probabilities)[1] / 255
    sure = (labels != 255) & (abs(probability - 0.3) > 1 / 255)
    assert np.array_equal(labels[sure], (probability > 0.3)[sure])
    assert (sure & (probability > 0.3) & (probability < 0.5)).any()


def test_values_of_more_bits_than_the_pipeline_loads(
    tool, repository, checkpoint, raster, tmp_path
):
    """Mmcv would scale them to 8 bits in training, unless it is told not to."""
    for color_type, is_refused in (('color', True), ('unchanged', False)):
        config = tmp_path / f'{color_type}.py'
        config.write_text(f"""
_base_ = [{str(repository / CONFIG)!r}]
test_pipeline = [dict(type='LoadImageFromFile', color_type={color_type!r})]
""")
        predictor = tool.Predictor(str(config), str(checkpoint), 'cpu')
        with rasterio.open(raster) as opened:
            if not is_refused:
                tool.require_fit(predictor, opened)
                continue
            with pytest.raises(ValueError, match='has values of uint16, but the test_pipeline'):
                tool.require_fit(predictor, opened)


def test_map_equals_blended_windows(tool, repository, checkpoint, raster, monkeypatch, capfd):
    """Killed after three windows; then the same command goes on."""
    probabilities = raster.with_name('new') / 'p.tif'
    argv = arguments(repository, checkpoint, raster, '--probabilities', probabilities)
    predict, calls = tool.predict_window, []

    def dies(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args[-2:])
        predict(*args)

    monkeypatch.setattr(tool, 'predict_window', dies)
    with pytest.raises(SystemExit) as ended:
        tool.main(argv)
    assert ended.value.code == 130
    out = raster.with_name('out.tif')
    assert not out.exists() and not probabilities.exists()
    monkeypatch.setattr(tool, 'predict_window', lambda *a: (calls.append(a[-2:]), predict(*a)))
    assert tool.main(argv) == 0
    assert calls == list(itertools.product((0, 1), (0, 1, 2)))
    assert '3 of 6 windows are finished' in capfd.readouterr().out
    assert not raster.with_name('out.tif.part').exists()

    expected = blended(tool, repository, checkpoint, raster)
    nothing = (read(raster) == 0).any(0)
    labels = read(out)[0]
    assert (labels[nothing] == 255).all() and (labels[~nothing] != 255).all()
    top = np.sort(expected, axis=0)
    clear = ~nothing & (top[-1] - top[-2] > 1e-4)  # rounding decides the others
    assert clear.mean() > 0.9 and len(np.unique(labels)) > 3
    np.testing.assert_array_equal(labels[clear], expected.argmax(0)[clear])
    # 8-bit numbers of 1 / 255: at most half a step, and rounding.
    np.testing.assert_allclose(read(probabilities) / 255, expected, rtol=0, atol=0.5 / 255 + 1e-5)
    with rasterio.open(out) as file:
        assert file.crs == 'EPSG:32631' and file.transform == TRANSFORM and file.nodata == 255
        assert file.profile['tiled'] and file.profile['compress'] == 'deflate'
        assert file.colormap(1)[3] == (60, 0, 255, 255)
        assert file.tags()['class_3'] == '2'


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda x: write(x, read(x)[:3]), 'has 3 bands, but the model takes 4'),
        (lambda x: write(x, read(x) * 0, nodata=0), 'no pixel with data'),
        (lambda x: write(x, np.where(read(x) > 0, np.nan, 1)), 'NaN or infinite'),
        (truncate, 'truncated or damaged|as a raster'),
        (lambda x: x.unlink(), 'No such file'),
    ],
)
def test_bad_rasters_leave_no_map(tool, repository, checkpoint, raster, capfd, change, message):
    change(raster)
    assert tool.main(arguments(repository, checkpoint, raster)) == 1
    error = capfd.readouterr().err
    assert any(text in error for text in message.split('|')), error
    assert not raster.with_name('out.tif').exists()


def test_a_raster_without_crs(tool, repository, checkpoint, raster):
    write(raster, read(raster)[:, :64, :64], crs=None)
    assert tool.main(arguments(repository, checkpoint, raster)) == 0
    with rasterio.open(raster.with_name('out.tif')) as file:
        assert file.crs is None


def test_a_raster_in_an_archive_with_ground_control_points(tool, repository, checkpoint, raster):
    points = [GroundControlPoint(row, col, 2 + col, 40 - row) for row in (0, 9) for col in (0, 9)]
    with rasterio.open(raster, 'r+') as file:
        file.gcps = points, 'EPSG:4326'
    with zipfile.ZipFile(raster.with_name('a.zip'), 'w') as archive:
        archive.write(raster, 'x.tif')
    argv = arguments(repository, checkpoint, raster)
    argv[argv.index(str(raster))] = f'/vsizip/{raster.with_name("a.zip")}/x.tif'
    assert tool.main(argv) == 0
    with rasterio.open(raster.with_name('out.tif')) as file:
        found, crs = file.gcps
    assert crs == 'EPSG:4326'
    assert [(p.row, p.col, p.x, p.y) for p in found] == [(p.row, p.col, p.x, p.y) for p in points]


def test_full_disk_leaves_no_map(tool, repository, checkpoint, raster, monkeypatch, capfd):
    """GDAL may report a full disk when it closes the file, or not at all: the map is read again."""
    argv = arguments(repository, checkpoint, raster)
    written = rasterio.io.DatasetWriter.write
    monkeypatch.setattr(
        rasterio.io.DatasetWriter, 'write', lambda self, x, **kw: written(self, x * 0, **kw)
    )
    assert tool.main(argv) == 1
    assert 'disk full' in capfd.readouterr().err
    assert not raster.with_name('out.tif').exists()


def test_full_disk_before_the_map(tool, repository, checkpoint, raster, monkeypatch, capfd):
    def full(descriptor):
        raise OSError(errno.ENOSPC, 'No space left on device')

    argv = arguments(repository, checkpoint, raster)
    with monkeypatch.context() as patch:
        patch.setattr('os.fsync', full)
        assert tool.main(argv) == 1
    text = capfd.readouterr().err
    assert f"No space left on device: '{raster.with_name('out.tif.part')}" in text
    assert 'Free some space and start again' in text
    assert tool.main(argv) == 0


def test_too_little_memory(load_script, repository, checkpoint, raster, capfd):
    tool = load_script('tools/predict_raster.py')
    assert tool.main(arguments(repository, checkpoint, raster, '--memory', '100MiB')) == 1
    assert '--memory 100MiB is below what a window of 288 x 288' in capfd.readouterr().err
    assert not raster.with_name('out.tif').exists()
