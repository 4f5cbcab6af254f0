"""Images and label maps that are not as they should be: an error that says so, or a known use."""

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from mmseg.registry import DATASETS, MODELS
from PIL import Image
from torch import nn

import vrwkv_seg  # noqa: F401

NAMES = ('background', 'cat', 'dog')
LOADING = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
PACKING = [*LOADING, dict(type='PackSegInputs')]


@pytest.fixture(autouse=True)
def scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture
def sample(tmp_path):
    """Write an image and a label map, and return a data set of them."""

    def write(labels, image=None, pipeline=LOADING, **kwargs):
        if image is None:
            image = np.zeros((*np.shape(labels)[:2], 3), np.uint8)
        for kind, content in (('images', image), ('labels', labels)):
            (tmp_path / kind).mkdir(exist_ok=True)
            path = tmp_path / kind / 'a.png'
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:  # PNG has no signed numbers; what a file holds is told by its first bytes
                image_format = 'TIFF' if content.dtype == np.int32 else 'PNG'
                Image.fromarray(content).save(path, image_format)
        settings = dict(
            type='CheckedSegDataset',
            data_root=str(tmp_path),
            data_prefix=dict(img_path='images', seg_map_path='labels'),
            img_suffix='.png',
            metainfo=dict(classes=NAMES),
            pipeline=pipeline,
        )
        return DATASETS.build(settings | kwargs)

    return write


def labels(*values, dtype=np.uint8):
    """A label map with every value twice."""
    return np.array([values, values], dtype)


@pytest.mark.parametrize(
    'dtype', [np.uint8, np.uint16, np.int32], ids=lambda dtype: np.dtype(dtype).name
)
def test_labels_within_the_classes(sample, dtype):
    seg_map = sample(labels(0, 1, 2, 255, dtype=dtype))[0]['gt_seg_map']
    np.testing.assert_array_equal(seg_map, labels(0, 1, 2, 255))


def test_labels_outside_the_classes(sample):
    with pytest.raises(ValueError, match=r'labels/a\.png has labels outside the 3') as caught:
        sample(labels(0, 3, 7, 7))[0]
    assert '3 (2 pixels), 7 (4 pixels). Expected 0 to 2, or 255 for what is' in str(caught.value)


def test_classes_counted_from_one(sample):
    with pytest.raises(ValueError, match=r'3 \(2 pixels\).* set reduce_zero_label=True'):
        sample(labels(0, 1, 2, 3))[0]
    dataset = sample(labels(0, 1, 2, 3, 255), reduce_zero_label=True)
    np.testing.assert_array_equal(dataset[0]['gt_seg_map'], labels(255, 0, 1, 2, 255))
    with pytest.raises(ValueError, match=r'4 \(2 pixels\)\. Expected 1 to 3, or 0 or 255'):
        sample(labels(0, 4), reduce_zero_label=True)[0]


@pytest.mark.parametrize('value', [256, 257, 65535])
def test_sixteen_bits_do_not_wrap_around(sample, value):
    """What mmseg makes of 256 is 0, a class."""
    with pytest.raises(ValueError, match=rf'{value} \(2 pixels\)'):
        sample(labels(1, value, dtype=np.uint16))[0]


def test_negative_labels(sample):
    with pytest.raises(ValueError, match=r'-1 \(2 pixels\)'):
        sample(labels(-1, 1, dtype=np.int32))[0]


@pytest.mark.parametrize(
    ('content', 'found'),
    [
        (np.zeros((2, 2, 3), np.uint8), '3 channels of uint8'),
        (np.zeros((2, 2, 4), np.uint8), '4 channels of uint8'),
        (np.zeros((2, 2, 2), np.uint8), '2 channels of uint8'),
    ],
)
def test_colours_are_not_labels(sample, content, found):
    with pytest.raises(ValueError, match=rf'labels/a\.png holds {found}.*Convert colours'):
        sample(content)[0]


def test_palette_and_black_and_white_label_maps(sample, tmp_path):
    """Both hold indices: those of a palette's colours, and 0 and 1."""
    dataset = sample(labels(0, 1, 2))
    image = Image.fromarray(labels(2, 1, 0), 'P')
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / 'labels/a.png')
    np.testing.assert_array_equal(dataset[0]['gt_seg_map'], labels(2, 1, 0))
    dataset = sample(labels(0, 1, 1).astype(bool))
    np.testing.assert_array_equal(dataset[0]['gt_seg_map'], labels(0, 1, 1))


def test_a_subset_of_the_classes(sample):
    """Labels of the classes left out are ignored, those of none are an error."""
    subset = dict(type='CheckedADE20KDataset', metainfo=dict(classes=('sky', 'wall')))
    dataset = sample(labels(0, 1, 2, 3, 150), seg_map_suffix='.png', **subset)
    expected = labels(255, 1, 255, 0, 255)  # wall, building and sky are ADE20K's 1, 2 and 3
    np.testing.assert_array_equal(dataset[0]['gt_seg_map'], expected)
    with pytest.raises(ValueError, match=r'outside the 150 classes: 151 \(2 pixels\)'):
        sample(labels(0, 151), **subset)[0]


@pytest.mark.parametrize('pipeline', [LOADING, [LOADING[0], dict(type='Resize', scale=(8, 8))]])
def test_a_label_map_of_another_size(sample, pipeline):
    image = np.zeros((3, 4, 3), np.uint8)
    with pytest.raises(ValueError, match=r'a\.png has 3 x 2 pixels.*images/a\.png has 4 x 3'):
        sample(labels(0, 1, 2), image, pipeline)[0]


def test_a_label_map_that_cannot_be_read(sample):
    image = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match=r'cannot read the label map .*labels/a\.png'):
        sample(b'not an image', image)[0]


def test_missing_files(sample, tmp_path):
    dataset = sample(labels(0, 1))
    (tmp_path / 'labels/a.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'labels/a\.png'):
        dataset[0]
    with pytest.raises(ValueError, match=r"no file in '.*/images' ends with img_suffix='\.jpg'"):
        sample(labels(0, 1), img_suffix='.jpg')
    (tmp_path / 'list.txt').write_text('')
    with pytest.raises(ValueError, match=r"no image is listed in '.*list\.txt'"):
        sample(labels(0, 1), ann_file='list.txt')


def test_classes_are_needed(sample):
    with pytest.raises(ValueError, match=r'needs the names of its classes.* got None'):
        sample(labels(0, 1), metainfo=None)
    many = tuple(map(str, range(255)))
    with pytest.raises(ValueError, match=r'1 to 254 of them.* got 255'):
        sample(labels(0, 1), metainfo=dict(classes=many), reduce_zero_label=True)
    sample(labels(0, 1), metainfo=dict(classes=many))


def test_each_label_map_is_checked_once(sample, monkeypatch):
    dataset = sample(labels(0, 1))
    checked = []
    check = dataset._check
    monkeypatch.setattr(dataset, '_check', lambda *args: checked.append(args) or check(*args))
    for _ in range(3):
        dataset[0]
    assert len(checked) == 1


@pytest.mark.parametrize('test_mode', [False, True], ids=['train', 'test'])
@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
@pytest.mark.parametrize(
    ('color_type', 'turned'),
    [
        ('color', True),
        ('grayscale', True),
        ('color_ignore_orientation', False),
        ('unchanged', False),
    ],
)
def test_sizes_are_compared_as_the_pipeline_reads(sample, color_type, turned, backend, test_mode):
    """A photograph on its side: label maps fit it as stored, or as turned."""
    exif = Image.Exif()
    exif[0x112] = 6
    loading = dict(type='LoadImageFromFile', color_type=color_type, imdecode_backend=backend)
    for shape in ((2, 3), (3, 2)):
        pipeline = [loading, dict(type='LoadAnnotations')]
        dataset = sample(np.zeros(shape, np.uint8), pipeline=pipeline, test_mode=test_mode)
        Image.new('RGB', (3, 2)).save(dataset.get_data_info(0)['img_path'], exif=exif)
        if turned == (shape == (3, 2)):
            loaded = dataset[0]
            assert loaded['img'].shape[:2] == loaded['gt_seg_map'].shape == shape
        else:
            with pytest.raises(ValueError, match=r'one size\. An EXIF tag may have turned'):
                dataset[0]


def test_label_maps_are_checked_as_the_pipeline_reads(sample, tmp_path):
    """OpenCV reads the colours of a palette, which mmseg would take as three label maps."""
    loading = [LOADING[0], dict(type='LoadAnnotations', imdecode_backend='cv2')]
    dataset = sample(labels(0, 1), pipeline=loading)
    assert dataset[0]['gt_seg_map'].shape == (2, 2)
    image = Image.fromarray(labels(1, 0), 'P')
    image.putpalette([255, 0, 0, 0, 255, 0])
    dataset = sample(labels(0, 1), pipeline=loading)
    image.save(tmp_path / 'labels/a.png')
    with pytest.raises(ValueError, match='holds 3 channels of uint8'):
        dataset[0]


def test_a_loader_of_ones_own(sample, tmp_path):
    """Six bands from a file that no image library reads."""

    def load(results):
        image = np.load(results['img_path'])
        return results | dict(img=image, img_shape=image.shape[:2], ori_shape=image.shape[:2])

    for height in (2, 5):
        dataset = sample(labels(0, 1), pipeline=[load, LOADING[1]])
        with open(tmp_path / 'images/a.png', 'wb') as file:
            np.save(file, np.zeros((height, 2, 6), np.float32))
        if height == 2:
            assert dataset[0]['img'].shape == (2, 2, 6)
        else:
            with pytest.raises(ValueError, match=r'has 2 x 2 pixels, but its image .* 2 x 5'):
                dataset[0]


def test_lists_with_a_byte_order_mark(sample, tmp_path):
    """As Windows' editors save them: of images and of classes."""
    (tmp_path / 'list.txt').write_text('a\n', encoding='utf-8-sig')
    (tmp_path / 'classes.txt').write_text('cup\njug\n', encoding='utf-8-sig')
    metainfo = dict(classes=str(tmp_path / 'classes.txt'))
    dataset = sample(labels(0, 1), ann_file='list.txt', metainfo=metainfo)
    assert dataset.metainfo['classes'] == ['cup', 'jug']
    assert dataset[0]['img'].shape == (2, 2, 3)


# --- images -------------------------------------------------------------------------------------


def test_one_channel_becomes_three_alike(sample):
    image = np.arange(6, dtype=np.uint8).reshape(2, 3)
    loaded = sample(labels(0, 1, 2), image)[0]['img']
    np.testing.assert_array_equal(loaded, np.repeat(image[..., None], 3, axis=2))


def test_sixteen_bit_images_keep_their_upper_half(sample):
    image = np.array([[0, 255, 256], [4660, 65280, 65535]], np.uint16)
    loaded = sample(labels(0, 1, 2), image)[0]['img']
    np.testing.assert_array_equal(loaded[..., 0], [[0, 0, 1], [18, 255, 255]])
    assert loaded.dtype == np.uint8


def test_an_image_that_cannot_be_read(sample):
    with pytest.raises((AssertionError, ValueError), match=r'images/a\.png'):
        sample(labels(0, 1), b'not an image')[0]


# --- losses -------------------------------------------------------------------------------------


def head(**loss):
    """A decode head of one convolution, that gives each pixel its class by its value."""
    return MODELS.build(
        dict(
            type='FCNHead',
            in_channels=3,
            channels=3,
            num_convs=0,
            num_classes=3,
            concat_input=False,
            align_corners=False,
            loss_decode=dict(type='CrossEntropyLoss', **loss),
        )
    )


def preprocess(data, size):
    processor = MODELS.build(dict(type='SegDataPreProcessor', size=size, seg_pad_val=255))
    batch = {key: [d[key] for d in data] for key in ('inputs', 'data_samples')}
    return processor(batch, training=True)


def test_an_image_smaller_than_the_crop_is_filled_up_and_that_is_ignored(sample):
    crop = [*LOADING, dict(type='RandomCrop', crop_size=(8, 8)), dict(type='PackSegInputs')]
    data = preprocess([sample(labels(0, 1, 2), pipeline=crop)[0]], (8, 8))
    assert data['inputs'].shape == (1, 3, 8, 8)
    padded = data['data_samples'][0].gt_sem_seg.data[0]
    assert padded.shape == (8, 8)
    assert (padded[:2, :3].numpy() == labels(0, 1, 2)).all()
    assert (padded == 255).sum() == 64 - 6
    # The gradient of what was filled in is 0.
    logits = torch.zeros(1, 3, 8, 8, requires_grad=True)
    head().loss_by_feat(logits, data['data_samples'])['loss_ce'].backward()
    assert logits.grad[..., :2, :3].all()
    assert not logits.grad[..., 2:, :].any()
    assert not logits.grad[..., 3:].any()


@pytest.mark.parametrize('loss', [{}, dict(avg_non_ignore=True)])
def test_nothing_but_ignored_pixels(sample, loss):
    data = preprocess([sample(labels(255, 255), pipeline=PACKING)[0]], (2, 2))
    decoder = head(**loss)
    nn.init.ones_(decoder.conv_seg.weight)
    losses = decoder.loss((data['inputs'].float(),), data['data_samples'], {})
    assert losses['loss_ce'].item() == 0
    assert losses['acc_seg'].isfinite()
    losses['loss_ce'].backward()
    assert decoder.conv_seg.weight.grad.count_nonzero() == 0
