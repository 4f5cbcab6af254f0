"""Images of more bands or bits than a pipeline reads, in the libraries of all tasks."""

import importlib
import struct

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from mmengine.structures import BaseDataElement
from PIL import Image

from vrwkv.engine import images

TASKS = dict(mmpretrain='vrwkv_cls', mmdet='vrwkv_det', mmseg='vrwkv_seg')
DARK = np.random.default_rng(0).integers(0, 4000, (6, 5, 4), dtype=np.uint16)
SMALL = (DARK >> 4).astype(np.uint8)


@pytest.fixture(params=TASKS)
def scope(request):
    importlib.import_module(TASKS[request.param])
    with DefaultScope.overwrite_default_scope(request.param):
        yield request.param


@pytest.fixture
def warnings(monkeypatch):
    """Warnings given since the test began."""
    monkeypatch.setattr(images, '_warned', None)
    messages = []
    monkeypatch.setattr(images, 'print_log', lambda message, **_: messages.append(message))
    return messages


def load(path, **kwargs):
    return loader(**kwargs)(dict(img_path=str(path)))['img']


def loader(**kwargs):
    return TRANSFORMS.build(dict(type='LoadImageFromFile', **kwargs))


def write(path, image, **kwargs):
    """Write a file with OpenCV, or one that it cannot write with Pillow or by hand."""
    if isinstance(image, Image.Image):
        image.save(path, **kwargs)
    elif path.suffix == '.tif' and image.ndim == 3 and image.shape[2] in (2, 6):
        path.write_bytes(tiff(image))
    else:
        assert cv2.imwrite(str(path), image)
    return path


def tiff(image):
    """A TIFF of one strip, after the specification (TIFF 6.0, Adobe, 1992)."""
    height, width, bands = image.shape
    short, long = 3, 4
    bits = 8 * image.itemsize
    after = 8 + 2 + 10 * 12 + 4
    tags = [
        (256, short, 1, width),
        (257, short, 1, height),
        (258, short, bands, bits | bits << 16 if bands == 2 else after),  # in place, or where
        (259, short, 1, 1),
        (262, short, 1, 1),
        (273, long, 1, after + 4 * bands),
        (277, short, 1, bands),
        (278, short, 1, height),
        (279, long, 1, image.nbytes),
        (338, short, bands - 1, 0 if bands == 2 else after + 2 * bands),
    ]
    entries = b''.join(struct.pack('<HHII', *tag) for tag in tags)
    values = struct.pack(f'<{bands}H', *bands * [bits]) + bytes(2 * bands)
    directory = struct.pack('<H', len(tags)) + entries + bytes(4)
    return b'II*\0' + struct.pack('<I', 8) + directory + values + image.tobytes()


def stack(bands, dtype=np.uint16):
    return np.ascontiguousarray(np.resize(DARK, (6, 5, bands)).astype(dtype))


def test_header_of_a_bigtiff(tmp_path):
    Image.fromarray(SMALL).save(tmp_path / 'a.tif', big_tiff=True)
    assert str(images.read_header(tmp_path / 'a.tif')) == '4 bands of uint8'


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize(
    ('name', 'image', 'found'),
    [
        ('a.tif', DARK, '4 bands of uint16'),
        ('a.png', DARK, '4 bands of uint16'),
        ('a.tif', SMALL, '4 bands of uint8'),
        ('a.tif', stack(2), '2 bands of uint16'),
        ('a.tif', stack(6), '6 bands of uint16'),
        ('a.tif', stack(6, np.uint8), '6 bands of uint8'),
        ('a.tif', stack(3, np.float32), '3 bands of float32'),
        ('a.tif', stack(1, np.int16), '1 band of int16'),
    ],
)
def test_a_loss_of_bands_or_values_is_refused(scope, tmp_path, name, image, found, backend):
    path = write(tmp_path / name, image)
    for color_type in ('color', 'grayscale', 'color_ignore_orientation'):
        with pytest.raises(ValueError, match=rf'a\.\w+ has {found}.*color_type=') as caught:
            load(path, color_type=color_type, imdecode_backend=backend)
        assert 'data_preprocessor' in str(caught.value)


def test_all_bands_as_they_are(scope, tmp_path):
    for image in (DARK, SMALL, stack(3, np.float32), DARK[..., 0]):
        path = write(tmp_path / 'a.tif', image)
        np.testing.assert_array_equal(load(path, color_type='unchanged'), image)
    for bands in (2, 6):
        path = write(tmp_path / 'a.tif', stack(bands))
        with pytest.raises(ValueError, match=r'imdecode_backend=.tifffile., a transform'):
            load(path, color_type='unchanged')


@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize(
    ('name', 'image'),
    [
        ('rgba.png', Image.fromarray(SMALL)),
        ('rgba.tif', Image.fromarray(SMALL)),
        ('rgba.webp', Image.fromarray(SMALL)),
        ('opaque.png', np.dstack([DARK[..., :3] * 16, np.full((6, 5), 65535, np.uint16)])),
        ('la.png', Image.fromarray(SMALL[..., :2], 'LA')),
        ('la.tif', Image.fromarray(SMALL[..., :2], 'LA')),
        ('grey.png', SMALL[..., 0]),
        ('grey.tif', SMALL[..., 0]),
        ('wide.png', DARK[..., :3] * 16),
        ('cmyk.tif', Image.fromarray(SMALL, 'CMYK')),
        ('cmyk.jpg', Image.fromarray(SMALL, 'CMYK')),
        ('palette.png', Image.fromarray(SMALL[..., 0], 'P')),
        ('palette.gif', Image.fromarray(SMALL[..., :3])),
        ('bits.png', Image.fromarray(SMALL[..., 0] > 99)),
        ('bits.tif', Image.fromarray(SMALL[..., 0] > 99)),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_other_images_load_as_in_mmcv(scope, tmp_path, warnings, name, image, backend):
    path = write(tmp_path / name, image)
    plain = LoadImageFromFile(imdecode_backend=backend)
    expected = plain(dict(img_path=str(path)))['img']
    np.testing.assert_array_equal(load(path, imdecode_backend=backend), expected)
    assert not warnings


@pytest.mark.parametrize(
    ('name', 'bands', 'backend', 'then'),
    [
        ('a.png', 3, 'cv2', 'read as 0 to 15 of 8 bits: most'),
        ('a.png', 1, 'cv2', 'read as 0 to 15 of 8 bits: most'),
        ('a.tif', 3, 'cv2', 'read as 0 to 15 of 8 bits: most'),
        ('a.png', 3, 'pillow', 'read as 0 to 15 of 8 bits: most'),
        ('a.png', 1, 'pillow', 'read as 0 to 255 of 8 bits, larger ones as 255: most'),
    ],
)
def test_dark_images_of_16_bits_give_one_warning(
    scope, tmp_path, warnings, name, bands, backend, then
):
    image = stack(bands)
    image[0, 0] = 3999
    path = write(tmp_path / name, image)
    for _ in range(2):  # of one loader, and of one for another data set
        transform = loader(imdecode_backend=backend)
        transform(dict(img_path=str(path)))
        transform(dict(img_path=str(path)))
    (warning,) = warnings
    assert str(path) in warning
    assert f'values up to 3,999 of 65,535, which are {then}' in warning
    assert 'multiply by 255 / (largest' in warning


def test_a_quarter_of_the_range_is_enough(tmp_path, warnings):
    for largest, count in ((16384, 0), (16383, 1)):
        image = np.minimum(DARK[..., :3] * 16, largest)
        image[0, 0] = largest
        images.CheckedLoadImageFromFile()(dict(img_path=str(write(tmp_path / 'a.png', image))))
        assert len(warnings) == count


def test_the_processes_that_load_warn_once_together(tmp_path, warnings):
    path = write(tmp_path / 'a.png', DARK[..., :3])
    transform = images.CheckedLoadImageFromFile()
    process = torch.multiprocessing.get_context('fork').Process(
        target=transform, args=[dict(img_path=str(path))]
    )
    process.start()
    process.join()
    assert process.exitcode == 0
    transform(dict(img_path=str(path)))
    assert not warnings  # it was given there


PREPROCESSORS = dict(
    mmpretrain='ClsDataPreprocessor', mmdet='DetDataPreprocessor', mmseg='SegDataPreProcessor'
)


@pytest.fixture
def preprocessor(scope):
    size = {} if scope == 'mmpretrain' else dict(bgr_to_rgb=True)
    return MODELS.build(dict(type=PREPROCESSORS[scope], mean=[1, 2, 3], std=[1, 2, 4], **size))


def preprocess(preprocessor, image, path=None):
    sample = BaseDataElement(metainfo=dict(img_path=path))
    return preprocessor(dict(inputs=[image], data_samples=[sample]))['inputs']


@pytest.mark.parametrize('bands', [2, 4])
def test_a_model_of_other_bands_than_the_image(scope, preprocessor, bands):
    """The library's own error is about tensors and names no file; mmdet drops the fourth band."""
    image = torch.zeros(bands, 4, 4, dtype=torch.uint8)
    message = rf'has {bands} bands of uint8, but the model takes 3'
    with pytest.raises(ValueError, match=rf'folder/a\.tif {message}'):
        preprocess(preprocessor, image, 'folder/a.tif')
    if scope == 'mmdet' and bands == 4:
        assert preprocess(preprocessor, image).shape == (1, 3, 4, 4)  # an array with alpha
        return
    with pytest.raises(ValueError, match=f'given as an array {message}'):
        preprocess(preprocessor, image)


def test_an_image_of_one_band_becomes_equal_bands(preprocessor):
    image = torch.arange(16, dtype=torch.uint8).reshape(1, 4, 4)
    expected = preprocess(preprocessor, image.expand(3, -1, -1).clone())
    assert torch.equal(preprocess(preprocessor, image), expected)
    assert expected.shape == (1, 3, 4, 4)


def test_the_classifiers_inferencer(tmp_path):
    """mmpretrain reads images for it without a pipeline."""
    from mmpretrain.apis import image_classification

    import vrwkv_cls  # noqa: F401

    with pytest.raises(ValueError, match=r'a\.tif has 4 bands of uint16'):
        image_classification.imread(str(write(tmp_path / 'a.tif', DARK)))
    path = write(tmp_path / 'a.png', SMALL)
    for given in (str(path), SMALL):
        np.testing.assert_array_equal(image_classification.imread(given), mmcv.imread(given))
