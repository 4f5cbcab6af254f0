"""Detection: the neck, what is registered, checkpoints from elsewhere, and wrong data."""

import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from mmdet.apis import DetInferencer, init_detector
from mmdet.datasets.api_wrappers import COCO
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.registry import DATASETS, MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from mmengine.structures import InstanceData
from PIL import Image
from pycocotools.mask import encode
from torch import nn
from torch.nn import functional as F

import vrwkv.backbones
from vrwkv_det.datasets import CheckedCocoDataset
from vrwkv_det.simple_fpn import SimpleFPN

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs/detection'


def build(model):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(model)


# --- the pyramid of a plain backbone ------------------------------------------------------------


def layer_norm(x, module):
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    scale, shift = (p[:, None, None] for p in (module.weight, module.bias))
    return (x - mean) / (var + module.eps).sqrt() * scale + shift


def test_simple_fpn_by_hand():
    """ViTDet's levels, from the weights and torch's functions."""
    torch.manual_seed(0)
    neck = SimpleFPN(in_channels=8, out_channels=6, num_outs=6).double()
    for parameter in neck.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 8, 4, 6, dtype=torch.float64)
    first, norm, _, second = neck.resizes[0]
    up = F.conv_transpose2d(x, first.weight, first.bias, stride=2)
    up = F.conv_transpose2d(F.gelu(layer_norm(up, norm)), second.weight, second.bias, stride=2)
    once = F.conv_transpose2d(x, neck.resizes[1].weight, neck.resizes[1].bias, stride=2)
    halved = x.reshape(2, 8, 2, 2, 3, 2).amax((3, 5))
    expected = []
    for level, lateral, conv in zip(
        (up, once, x, halved), neck.lateral_convs, neck.fpn_convs, strict=True
    ):
        level = layer_norm(F.conv2d(level, lateral.conv.weight), lateral.norm)
        expected.append(layer_norm(F.conv2d(level, conv.conv.weight, padding=1), conv.norm))
    expected.append(expected[-1][:, :, ::2, ::2])
    expected.append(expected[-1][:, :, ::2, ::2])
    outs = neck((x,))
    assert [out.shape[2:] for out in outs] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2), (1, 1)]
    torch.testing.assert_close(list(outs), expected)
    assert {conv.out_channels for conv in neck.lateral_convs} == {6}
    # A quarter and half of the channels remain in the enlarged maps.
    assert [conv.in_channels for conv in neck.lateral_convs] == [2, 4, 8, 8]


def test_simple_fpn_takes_other_norms():
    neck = build(dict(type='SimpleFPN', in_channels=8, norm_cfg=dict(type='BN')))
    assert len([m for m in neck.modules() if isinstance(m, nn.BatchNorm2d)]) == 9


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(in_channels=10), 'multiple of 4.*got 10'),
        (dict(in_channels=0), 'multiple of 4.*got 0'),
        (dict(in_channels=8, num_outs=3), 'num_outs must be at least 4.*got 3'),
    ],
)
def test_simple_fpn_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        SimpleFPN(**kwargs)


def test_simple_fpn_wants_one_map():
    x = torch.zeros(1, 8, 2, 2)
    with pytest.raises(ValueError, match='takes one map, got 2'):
        SimpleFPN(in_channels=8)((x, x))


# --- regions of interest ------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_roi_features_are_those_of_the_map(dtype, memory_format):
    """Equal to torchvision's. mmcv's misreads channels-last maps and refuses bfloat16."""
    torch.manual_seed(0)
    layer = dict(type='RoIAlign', output_size=7, sampling_ratio=2)
    extractor = SingleRoIExtractor(layer, out_channels=3, featmap_strides=[4, 8])
    maps = [torch.randn(2, 3, side, side).to(dtype) for side in (300, 150)]
    maps = [m.to(memory_format=memory_format) for m in maps]
    # At these coordinates, bfloat16 would move the first by up to 4 pixels.
    rois = torch.tensor([[0, 1001.0, 1003.0, 1050.0, 1060.0], [1, 5.0, 10.0, 300.0, 400.0]])
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = extractor(maps, rois)
    for i, stride in enumerate((4, 8)):
        expected = torchvision.ops.roi_align(
            maps[i].float(), rois[i : i + 1], 7, 1 / stride, 2, aligned=True
        )
        # Float32 means of four samples, in another order.
        torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-5, atol=1e-6)


def test_predictions_are_made_in_float32(tiny_detector):
    """Proposals from bfloat16 outputs equal those from the same numbers in float32."""
    model = tiny_detector().eval()
    model.test_cfg.rcnn.score_thr = 0.0
    generator = torch.Generator().manual_seed(0)
    # Far from the corner, where bfloat16's anchors would be off by pixels.
    scores = [torch.randn(1, 3, 8, 300, generator=generator).bfloat16() for _ in range(5)]
    boxes = [0.1 * torch.randn(1, 12, 8, 300, generator=generator).bfloat16() for _ in range(5)]
    meta = dict(img_shape=(64, 2400), ori_shape=(64, 2400), scale_factor=(1.0, 1.0))
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs = [[level.to(dtype) for level in levels] for levels in (scores, boxes)]
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            (proposals,) = model.rpn_head.predict_by_feat(
                *inputs, batch_img_metas=[meta], cfg=model.test_cfg.rpn
            )
        results.append(proposals)
    for key in ('bboxes', 'scores'):
        torch.testing.assert_close(results[1][key], results[0][key], rtol=0, atol=0)
    assert results[0].bboxes[:, 0].max() > 1024
    # Heads such as DETR's do not call that method.
    numbers = torch.ones(3, 4).bfloat16()
    result = InstanceData(bboxes=numbers, scores=numbers[:, 0], labels=torch.arange(3))
    (sample,) = model.add_pred_to_datasample([DetDataSample()], [result])
    dtypes = {key: value.dtype for key, value in sample.pred_instances.items()}
    assert dtypes == dict(bboxes=torch.float32, scores=torch.float32, labels=torch.int64)


# --- weights ------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def golden():
    """Weights, images and outputs of upstream's adapter."""
    return torch.load(ROOT / 'tests/data/golden/det_adapter_tiny.pt', weights_only=True)


@pytest.fixture
def config(golden):
    """The config of Tiny, with an adapter of the size of upstream's numbers."""
    cfg = Config.fromfile(CONFIGS / 'mask-rcnn_vrwkv-adapter-tiny_fpn_1x_coco.py')
    cfg.model.backbone.update(golden['config'])
    cfg.model.neck.in_channels = 4 * [golden['config']['embed_dims']]
    return cfg


def mmdet_2_weights(dims):
    """Names and shapes of mmdet 2.28's neck and heads of mask_rcnn_r50_fpn, as upstream has."""
    shapes = {}

    def layer(name, *shape, bias=None):
        shapes[f'{name}.weight'] = shape
        shapes[f'{name}.bias'] = (bias or shape[0],)

    for i in range(4):
        layer(f'neck.lateral_convs.{i}.conv', 256, dims, 1, 1)
        layer(f'neck.fpn_convs.{i}.conv', 256, 256, 3, 3)
        layer(f'roi_head.mask_head.convs.{i}.conv', 256, 256, 3, 3)
    layer('rpn_head.rpn_conv', 256, 256, 3, 3)
    layer('rpn_head.rpn_cls', 3, 256, 1, 1)
    layer('rpn_head.rpn_reg', 12, 256, 1, 1)
    layer('roi_head.bbox_head.shared_fcs.0', 1024, 256 * 7 * 7)
    layer('roi_head.bbox_head.shared_fcs.1', 1024, 1024)
    layer('roi_head.bbox_head.fc_cls', 81, 1024)
    layer('roi_head.bbox_head.fc_reg', 320, 1024)
    layer('roi_head.mask_head.upsample', 256, 256, 2, 2)
    layer('roi_head.mask_head.conv_logits', 80, 256, 1, 1)
    generator = torch.Generator().manual_seed(0)
    return {k: 0.01 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}


@pytest.fixture
def released(golden, tmp_path):
    """A file as upstream's detection checkpoints are: written by mmdet 2."""
    weights = {f'backbone.{key}': value for key, value in golden['state_dict'].items()}
    weights |= mmdet_2_weights(golden['config']['embed_dims'])
    meta = dict(
        mmdet_version='2.28.2+788f918',
        config='model = dict(...)',
        CLASSES=CheckedCocoDataset.METAINFO['classes'],
        PALETTE=CheckedCocoDataset.METAINFO['palette'],
        epoch=12,
        iter=87960,
        hook_msgs={},
    )
    path = tmp_path / 'mask_rcnn_vrwkv_adapter_tiny_fpn_1x_coco.pth'
    torch.save(dict(meta=meta, state_dict=weights), path)
    return path


def assert_loaded(model, path):
    """Every tensor of the file is in the model, and none else."""
    expected = torch.load(path, weights_only=True)['state_dict']
    actual = model.state_dict()
    assert set(actual) == set(expected)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_released_detector_fits_strictly(config, released, golden):
    model = build(config.model)
    load_checkpoint(model, str(released), map_location='cpu', strict=True)
    assert_loaded(model, released)
    model.eval()
    with torch.no_grad():
        outputs = model.backbone(golden['input'])
    for output, expected in zip(outputs, golden['outputs'], strict=True):
        # What float32 upstream numbers allow.
        assert (output - expected).abs().max() < 2e-5 * expected.abs().max()


def test_released_detector_in_mmdets_interfaces(config, released):
    """They load loosely, so they must have found every tensor, and the class names."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        detector = init_detector(config.copy(), str(released), device='cpu')
        inferencer = DetInferencer(config.copy(), str(released), device='cpu', show_progress=False)
    for model in (detector, inferencer.model):
        assert_loaded(model, released)
        assert model.dataset_meta['classes'][:2] == ('person', 'bicycle')
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    inferencer.model.test_cfg.rcnn.score_thr = 0.0
    (prediction,) = inferencer(image)['predictions']
    assert len(prediction['labels']) == len(prediction['masks']) > 0


def test_released_detector_starts_one_of_other_classes(config, released):
    """All but the last layers of the heads is taken over."""
    for kind in ('bbox', 'mask'):
        config.model.roi_head[f'{kind}_head'].num_classes = 2
    model = build(config.model)
    load_checkpoint(model, str(released), map_location='cpu')
    expected = torch.load(released, weights_only=True)['state_dict']
    new = {name for name, value in model.state_dict().items() if not value.equal(expected[name])}
    last = ('fc_cls', 'fc_reg', 'conv_logits')
    assert {name.split('.')[2] for name in new} == set(last)


@pytest.mark.parametrize('wrapped', [True, False])
def test_classifiers_weights_leave_only_what_is_the_adapters(config, golden, tmp_path, wrapped):
    """Upstream's (wrapped, no layer scale in Tiny, a head) and bare ones, of another size."""
    torch.manual_seed(1)
    plain = vrwkv.backbones.VRWKV(img_size=96, embed_dims=24, depth=4)
    nn.init.normal_(plain.pos_embed)
    weights = {f'backbone.{key}': value for key, value in plain.state_dict().items()}
    weights['head.fc.weight'] = torch.zeros(1000, 24)
    path = tmp_path / 'vrwkv_t_in1k_224.pth'
    torch.save(dict(state_dict=weights, meta={}) if wrapped else weights, path)
    config.model.backbone.init_cfg.checkpoint = str(path)
    model = build(config.model)
    own = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    model.init_weights()
    grid = plain.pos_embed.detach().reshape(1, 6, 6, 24).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(4, 4), mode='bicubic', align_corners=False)
    expected = plain.state_dict() | dict(pos_embed=grid.flatten(2).transpose(1, 2))
    for name, value in model.backbone.state_dict().items():
        torch.testing.assert_close(value, expected.get(name, own[name]), rtol=0, atol=0, msg=name)
    untouched = set(own) - set(expected)
    assert all(
        name.startswith(('level_embed', 'spm.', 'interactions.', 'up.', 'norm')) or '.gamma' in name
        for name in untouched
    )


def test_vit_adapter_takes_mmpretrains_weights(tmp_path):
    from mmpretrain.models import VisionTransformer

    theirs = VisionTransformer(
        arch=dict(embed_dims=24, num_layers=4, num_heads=3, feedforward_channels=96),
        img_size=224,
        patch_size=16,
    )
    path = tmp_path / 'deit.pth'
    torch.save({f'backbone.{k}': v for k, v in theirs.state_dict().items()}, path)
    cfg = Config.fromfile(CONFIGS / 'mask-rcnn_vit-adapter-tiny_window_fpn_1x_coco.py').model
    cfg.backbone.update(
        embed_dims=24, depth=4, interaction_indexes=None, window_block_indexes=[0, 1, 2]
    )
    cfg.backbone.init_cfg.checkpoint = str(path)
    cfg.neck.in_channels = 4 * [24]
    model = build(cfg)
    model.init_weights()
    weights = model.backbone.state_dict()
    for name, value in theirs.state_dict().items():
        if name not in ('cls_token', 'ln1.weight', 'ln1.bias'):
            assert torch.equal(weights[name], value), name


# --- data ---------------------------------------------------------------------------------------


LOADING = dict(type='LoadImageFromFile')


def write_coco(folder, annotations, categories=('a', 'b'), images=2, side=64):
    """Write images of noise, and what is said of them."""
    rng = np.random.default_rng(0)
    (folder / 'images').mkdir()
    for i in range(images):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'images' / f'{i}.png')
    content = dict(
        images=[dict(id=i, file_name=f'{i}.png', height=side, width=side) for i in range(images)],
        annotations=[
            dict(
                dict(
                    id=n + 1,
                    image_id=0,
                    category_id=1,
                    bbox=[8, 8, 24, 32],
                    area=24 * 32,
                    iscrowd=0,
                    segmentation=[[8, 8, 32, 8, 32, 40, 8, 40]],
                ),
                **annotation,
            )
            for n, annotation in enumerate(annotations)
        ],
        categories=[dict(id=n + 1, name=name) for n, name in enumerate(categories)],
    )
    (folder / 'train.json').write_text(json.dumps(content))


def dataset(folder, classes=('a', 'b'), kind='CheckedCocoDataset', **kwargs):
    with DefaultScope.overwrite_default_scope('mmdet'):
        return DATASETS.build(
            dict(
                type=kind,
                data_root=str(folder),
                ann_file='train.json',
                data_prefix=dict(img='images/'),
                metainfo=dict(classes=classes),
                filter_cfg=dict(filter_empty_gt=False),
                pipeline=[
                    LOADING,
                    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                    dict(type='PackDetInputs'),
                ],
            )
            | kwargs
        )


def test_a_good_file_gives_what_mmdets_own_data_set_gives(tmp_path):
    write_coco(tmp_path, [{}, dict(category_id=2, image_id=1)])
    checked, plain = (dataset(tmp_path, kind=k) for k in ('CheckedCocoDataset', 'CocoDataset'))
    assert [checked.get_data_info(i) for i in range(2)] == [
        plain.get_data_info(i) for i in range(2)
    ]
    # Some of the file's classes: mmdet's way to train on those.
    subset = dataset(tmp_path, classes=('b',))
    assert [len(subset.get_data_info(i)['instances']) for i in range(2)] == [0, 1]


@pytest.mark.parametrize(
    ('annotation', 'classes', 'message'),
    [
        (dict(category_id=7), ('a', 'b'), r'annotation 2 of image 0 has the category_id 7, .*1, 2'),
        ({}, ('a', 'b', 'c'), r"does not have the classes \['c'\], but \['a', 'b'\]"),
        ({}, ('b', 'a'), r"another order, \['a', 'b'\], than the config, \['b', 'a'\]"),
    ],
)
def test_labels_outside_the_classes_are_refused(tmp_path, annotation, classes, message):
    """mmdet drops the one and renumbers the others, silently."""
    write_coco(tmp_path, [{}, annotation])
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, classes)
    dataset(tmp_path, classes, kind='CocoDataset')


def change_coco(folder, change):
    """Apply a function to the content of the annotation file."""
    path = folder / 'train.json'
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def second(kind, **values):
    """Change the second entry of a list of the file; None takes a value away."""

    def change(content):
        entry = content[kind][1]
        entry.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del entry[key]

    return change


annotation, image, category = (partial(second, k) for k in ('annotations', 'images', 'categories'))


@pytest.mark.parametrize('test_mode', [False, True], ids=['train', 'test'])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            annotation(category_id='2'),
            r"annotation 2 of image 0 .*category_id '2' \(text",
        ),
        (
            annotation(category_id=1.5),
            r'annotation 2 of image 0 has the category_id 1\.5',
        ),
        (annotation(category_id=True), 'has the category_id True, which is not among'),
        (
            annotation(category_id=None),
            'has the category_id missing, which is not among',
        ),
        (
            annotation(image_id='0'),
            r"annotation 2 of image 0 has the image_id '0' \(text",
        ),
        (annotation(image_id=9), r'has the image_id 9, .* images, \[0, 1\]: correct'),
        (annotation(image_id=None), 'annotation 2 has the image_id missing'),
        (annotation(bbox='8 8 9 9'), r"bbox '8 8 9 9' \(text.*: expected four finite"),
        (annotation(bbox=[8, 8, 9]), r'bbox \[8, 8, 9\]: expected four finite numbers'),
        (
            annotation(bbox=[8, float('nan'), 9, 9]),
            r'bbox \[8, nan, 9, 9\]: expected four',
        ),
        (annotation(bbox=['8', 8, 9, 9]), r"bbox \['8', 8, 9, 9\]: expected four"),
        (
            annotation(bbox=None),
            'annotation 2 of image 0 has the bbox missing: expected four',
        ),
        (annotation(area='9'), r"area '9' \(text.*: expected a finite number"),
        (image(width='64'), r"image 1 has the width '64' \(text; numbers have no quot"),
        (image(height=None), 'image 1 has the height missing: expected a finite number'),
        (image(file_name=3), 'image 1 has the file_name 3: expected text'),
        (category(id='2'), r"category 2 has the id '2' \(text.* a whole number"),
        (lambda content: content.pop('categories'), r'train\.json has no list of categories'),
    ],
)
def test_entries_of_another_type_are_named(tmp_path, change, message, test_mode):
    write_coco(tmp_path, [{}, {}])
    change_coco(tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        dataset(tmp_path, test_mode=test_mode)
    assert str(caught.value).startswith(f'{tmp_path}/train.json')


def test_whole_numbers_may_have_a_decimal_point(tmp_path):
    """JSON has one kind of numbers."""
    write_coco(tmp_path, [{}, dict(category_id=2.0, image_id=1.0, bbox=[8.5, 8, 9, 9])])
    labels = [dataset(tmp_path).get_data_info(i)['instances'][0]['bbox_label'] for i in range(2)]
    assert labels == [0, 1]


def test_a_file_with_a_byte_order_mark(tmp_path):
    """As Windows' editors write it; pycocotools refuses that, in the metric, too."""
    write_coco(tmp_path, [{}])
    path = tmp_path / 'train.json'
    path.write_text(path.read_text(), encoding='utf-8-sig')
    assert len(dataset(tmp_path)) == 2
    assert len(COCO(str(path)).dataset['annotations']) == 1


@pytest.mark.parametrize('test_mode', [False, True], ids=['train', 'test'])
@pytest.mark.parametrize(
    'mask', [None, [], [[]], [[8, 8, 9, 9]], {}, dict(size=[32, 64], counts=[0, 2048]), '8 8 9 9']
)
def test_an_object_without_a_mask(tmp_path, mask, test_mode):
    """An error where masks are loaded; boxes alone are as good as ever."""
    write_coco(tmp_path, [{}, dict(segmentation=mask)])
    if mask is None:
        change_coco(tmp_path, annotation(segmentation=None))
    message = r'train\.json: annotation 2 of image 0 has the segmentation .*\[64, 64\], the height'
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, test_mode=test_mode)
    boxes = [LOADING, dict(type='LoadAnnotations', with_bbox=True), dict(type='PackDetInputs')]
    data = dataset(tmp_path, test_mode=test_mode, pipeline=boxes)
    assert len(data[0]['data_samples'].gt_instances) == 2


def test_masks_of_every_kind_are_accepted(tmp_path):
    """Polygons and both kinds of run-length encoding; none where mmdet drops the object."""
    compressed = encode(np.asfortranarray(np.ones((64, 64), np.uint8)))
    compressed['counts'] = compressed['counts'].decode()
    write_coco(
        tmp_path,
        [
            {},
            CROWD,
            dict(segmentation=compressed),
            dict(segmentation=None, bbox=[80, 8, 9, 9]),
            dict(segmentation=None, ignore=True),
        ],
    )
    sample = dataset(tmp_path)[0]['data_samples']
    areas = sample.gt_instances.masks.masks.sum((1, 2)).tolist()
    assert areas == [24 * 32, 64 * 64]
    assert sample.ignored_instances.masks.masks.sum() == 32 * 64


@pytest.mark.parametrize('test_mode', [False, True], ids=['train', 'test'])
def test_images_of_another_size_than_the_file_says(tmp_path, test_mode):
    write_coco(tmp_path, [{}])
    change_coco(tmp_path, image(width=640, height=640))
    data = dataset(tmp_path, test_mode=test_mode)
    data[0]
    with pytest.raises(
        ValueError, match=r'1\.png has a size of 64 x 64 .*train\.json says width 640'
    ):
        data[1]


@pytest.mark.parametrize('color_type', ['color', 'color_ignore_orientation', 'unchanged'])
def test_sizes_are_those_of_the_image_that_the_pipeline_reads(tmp_path, color_type):
    """A photograph on its side fits as stored, or as turned."""
    write_coco(tmp_path, [{}])
    exif = Image.Exif()
    exif[0x112] = 6
    Image.new('RGB', (64, 40)).save(tmp_path / 'images/0.png', exif=exif)
    turned = color_type == 'color'
    pipeline = [LOADING | dict(color_type=color_type), dict(type='PackDetInputs')]
    for width, height in ((64, 40), (40, 64)):
        size = dict(width=width, height=height)
        change_coco(tmp_path, lambda content: content['images'][0].update(size))  # noqa: B023
        data = dataset(tmp_path, pipeline=pipeline)
        if turned == (width == 40):
            assert data[0]['inputs'].shape[1:] == (height, width)
        else:
            with pytest.raises(ValueError, match='are exchanged, or an EXIF tag'):
                data[0]


def test_a_training_set_of_nothing_is_refused(tmp_path):
    """mmdet would train for no iteration, and save that."""
    write_coco(tmp_path, [])
    with pytest.raises(ValueError, match=r'has 2 images, of which filter_cfg=.*leaves none'):
        dataset(tmp_path, filter_cfg=dict(filter_empty_gt=True))


def test_a_missing_image_is_named(tmp_path):
    """The library's own error is clear."""
    write_coco(tmp_path, [{}])
    (tmp_path / 'images/0.png').unlink()
    with pytest.raises(FileNotFoundError, match=r'images/0\.png'):
        dataset(tmp_path)[0]


def test_a_missing_annotation_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'train\.json'):
        dataset(tmp_path)


CROWD = dict(
    iscrowd=1,
    bbox=[0, 0, 64, 32],
    area=64 * 32,
    # Column by column: 32 pixels of it, then 32 that are not.
    segmentation=dict(size=[64, 64], counts=[0] + 128 * [32]),
)


@pytest.fixture
def tiny_detector(tiny_config):
    """Build the detector of a config at a fraction of its size."""

    def tiny_detector(*name):
        torch.manual_seed(0)
        model = build(tiny_config('detection', *name).model).train()
        model.init_weights()
        return model

    return tiny_detector


def train_step(model, samples):
    """Compute the losses and gradients of a batch, all of which must be there and finite."""
    batch = dict(
        inputs=[s['inputs'] for s in samples], data_samples=[s['data_samples'] for s in samples]
    )
    losses = model(**model.data_preprocessor(batch, training=True), mode='loss')
    loss, values = model.parse_losses(losses)
    assert all(value.isfinite() for value in values.values()), values
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # or several processes would wait for each other
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    'name',
    [
        'mask-rcnn_vit-adapter-tiny_window_fpn_1x_coco',
        'mask-rcnn_vit-adapter-tiny_global_fpn_1x_coco',
        'mask-rcnn_vrwkv-tiny_simple-fpn_1x_coco',
    ],
)
def test_the_other_backbones_train_and_predict(name, tiny_detector, tmp_path):
    write_coco(tmp_path, [{}, dict(image_id=1)], side=80)  # padded to 96
    data = dataset(tmp_path)
    model = tiny_detector(name)
    train_step(model, [data[0], data[1]])
    model.eval().test_cfg.rcnn.score_thr = 0.0
    sample = data[0]
    sample['data_samples'].set_metainfo(dict(scale_factor=(1.0, 1.0)))
    with torch.no_grad():
        (result,) = model.test_step(
            dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']])
        )
    assert result.pred_instances.masks.shape == (len(result.pred_instances.bboxes), 80, 80)


@pytest.mark.parametrize(
    'annotations',
    [[], [{}], [CROWD], [{}, CROWD, dict(image_id=1)]],
    ids=['none', 'one', 'crowd', 'both'],
)
def test_images_without_objects_and_crowds_train(tiny_detector, tmp_path, annotations):
    """No loss is NaN, all parameters get a gradient, and crowds are no objects."""
    write_coco(tmp_path, annotations)
    data = dataset(tmp_path)
    samples = [data[0], data[1]]
    crowds = sum(annotation.get('iscrowd', 0) for annotation in annotations)
    assert sum(len(s['data_samples'].ignored_instances) for s in samples) == crowds
    assert sum(len(s['data_samples'].gt_instances) for s in samples) == len(annotations) - crowds
    train_step(tiny_detector(), samples)
