"""mmcv's operators with and without compiled mmcv: the same numbers, which compiled mmcv recorded.

``RECORD=1 python -m pytest tests/tasks/test_mmcv_ops.py`` records them anew, on compiled mmcv.
"""

import os
import subprocess
import sys
from pathlib import Path

import mmcv.ops.focal_loss
import mmcv.ops.multi_scale_deform_attn as deformable
import numpy as np
import pytest
import torch
from mmcv.ops import DeformConv2d, nms, roi_align
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
from mmdet.registry import MODELS as DETECTORS
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.registry import MODELS as SEGMENTORS
from mmseg.structures import SegDataSample

import vrwkv_det  # noqa: F401
import vrwkv_seg  # noqa: F401
from vrwkv import mmcv_ops

FILE = Path(__file__).resolve().parents[1] / 'data/mmcv_ops.pt'
COMPILED = not isinstance(sys.modules['mmcv._ext'], mmcv_ops._Extension)


@pytest.fixture(scope='module')
def recorded():
    """The numbers of compiled mmcv, by test."""
    numbers = {} if os.environ.get('RECORD') else torch.load(FILE, weights_only=True)
    yield numbers
    if os.environ.get('RECORD'):
        assert COMPILED, 'these numbers come from compiled mmcv'
        torch.save(numbers, FILE)


@pytest.fixture
def check(recorded, request):
    """Compare with the recorded numbers."""

    def check(actual, **tolerance):
        if os.environ.get('RECORD'):
            recorded[request.node.name] = actual
        torch.testing.assert_close(actual, recorded[request.node.name], **tolerance)

    return check


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('iou_threshold', [0.5, 0.6])
def test_nms(check, iou_threshold, offset):
    generator = torch.Generator().manual_seed(0)
    corners = torch.randint(0, 40, (300, 2), generator=generator).float()
    sides = torch.randint(1, 30, (300, 2), generator=generator).float()
    boxes = torch.cat([corners, corners + sides], 1)
    # IoUs of exactly 3/5 and 1/2.
    boxes[:4] = torch.tensor(
        [[100, 0, 104, 1], [101, 0, 105, 1], [200, 0, 204, 1], [200, 0, 202, 1]]
    )
    scores = torch.rand(300, generator=generator)
    keep = [
        nms(boxes, scores, iou_threshold, offset)[1],
        nms(boxes, scores, iou_threshold, offset, score_threshold=0.3, max_num=20)[1],
        nms(boxes[:0], scores[:0], iou_threshold, offset)[1],
    ]
    check(keep, rtol=0, atol=0)


@pytest.mark.parametrize('aligned', [False, True])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
def test_roi_align(check, sampling_ratio, aligned):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 12, 16, generator=generator, requires_grad=True)
    rois = torch.tensor(
        [[0, 3.0, 5.0, 40.0, 30.0], [1, -8.0, -9.0, 90.0, 70.0], [1, 20.5, 7.25, 20.75, 7.5]]
    )
    output = roi_align(x, rois, (5, 3), 0.25, sampling_ratio, 'avg', aligned)
    output.backward(torch.randn(output.shape, generator=generator))
    # Float32 sums of at most some hundred products, which other compilers may contract.
    check([output.detach(), x.grad], rtol=1e-5, atol=1e-6)
    empty = roi_align(x, rois[:0], (5, 3), 0.25, sampling_ratio, 'avg', aligned)
    assert empty.shape == (0, 3, 5, 3)


def gradients(model):
    """Sums and norms of the gradients of all parameters."""
    grads = [p.grad.double() for p in model.parameters()]
    return torch.stack([torch.stack([g.sum(), g.norm()]) for g in grads])


def randomise(model):
    """Give the heads weights that spread scores and boxes."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if not name.startswith('backbone.') and parameter.ndim > 1:
            deviation = (2 / parameter[0].numel()) ** 0.5
            parameter.data = deviation * torch.randn(parameter.shape, generator=generator)


# Whole models in float32: other CPUs sum convolutions and products in another order.
MODEL_BAR = dict(rtol=1e-3, atol=1e-4)


def test_mask_rcnn(check, tiny_config):
    """Losses, gradients, boxes, scores and masks."""
    generator = torch.Generator().manual_seed(0)
    cfg = tiny_config('detection').model
    cfg.data_preprocessor.update(pad_mask=True)
    with DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(0)
        model = DETECTORS.build(cfg).train()
        model.init_weights()
        randomise(model)
        image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=generator)
        masks = np.zeros((2, 64, 64), np.uint8)
        masks[0, 8:40, 8:32] = masks[1, 20:60, 30:62] = 1
        sample = DetDataSample(
            metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0)),
            gt_instances=InstanceData(
                bboxes=torch.tensor([[8.0, 8.0, 32.0, 40.0], [30.0, 20.0, 62.0, 60.0]]),
                labels=torch.tensor([0, 1]),
                masks=BitmapMasks(masks, 64, 64),
            ),
            ignored_instances=InstanceData(bboxes=torch.zeros(0, 4)),
        )
        batch = dict(inputs=[image], data_samples=[sample])
        torch.manual_seed(0)
        loss, losses = model.parse_losses(
            model(**model.data_preprocessor(batch, training=True), mode='loss')
        )
        loss.backward()
        model.eval().test_cfg.rcnn.update(score_thr=0.05, max_per_img=20)
        with torch.no_grad():
            (result,) = model.test_step(dict(inputs=[image], data_samples=[sample]))
    found = result.pred_instances
    assert len(found) == 20
    check(
        dict(
            losses={name: value.detach() for name, value in losses.items()},
            gradients=gradients(model),
            boxes=found.bboxes,
            scores=found.scores,
            labels=found.labels,
            pixels=found.masks.flatten(1).sum(1).float(),
        ),
        **MODEL_BAR,
    )


def test_upernet(check, tiny_config):
    """Losses, gradients and logits."""
    generator = torch.Generator().manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmseg'):
        torch.manual_seed(0)
        model = SEGMENTORS.build(tiny_config('segmentation').model).train()
        model.init_weights()
        randomise(model)
        images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
        samples = [
            SegDataSample(
                metainfo=dict(img_shape=(64, 64), ori_shape=(64, 64)),
                gt_sem_seg=PixelData(data=torch.randint(0, 5, (1, 64, 64), generator=generator)),
            )
            for _ in images
        ]
        batch = dict(inputs=list(images), data_samples=samples)
        torch.manual_seed(0)
        loss, losses = model.parse_losses(
            model(**model.data_preprocessor(batch, training=True), mode='loss')
        )
        loss.backward()
        with torch.no_grad():
            results = model.eval().test_step(dict(inputs=[images[0]], data_samples=samples[:1]))
    check(
        dict(
            losses={name: value.detach() for name, value in losses.items()},
            gradients=gradients(model),
            logits=results[0].seg_logits.data[:, ::7, ::7].clone(),
        ),
        **MODEL_BAR,
    )


def test_other_operators_are_refused_by_name():
    layer = DeformConv2d(4, 4, 3, padding=1)
    arguments = torch.randn(1, 4, 8, 8), torch.randn(1, 18, 8, 8)
    if COMPILED:
        assert layer(*arguments).shape == (1, 4, 8, 8)
        return
    with pytest.raises(NotImplementedError, match=r'deform_conv_forward .*make install-mmcv'):
        layer(*arguments)
    with pytest.raises(NotImplementedError, match=r"RoIAlign with pool_mode='max'"):
        roi_align(arguments[0], torch.tensor([[0, 0.0, 0.0, 4.0, 4.0]]), 2, 1.0, 0, 'max', True)


@pytest.fixture
def stand_in(monkeypatch):
    """Our operators, on compiled mmcv too: it has these for GPUs only."""
    extension = mmcv_ops._Extension('stand-in')
    for module in (mmcv.ops.focal_loss, deformable):
        monkeypatch.setattr(module, 'ext_module', extension)


def test_deformable_attention_as_on_a_gpu(stand_in):
    """Against the gradients of mmcv's PyTorch function."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[4, 5], [2, 3]])
    tensors = [
        torch.randn(2, 26, 2, 4, generator=generator),
        torch.rand(2, 7, 2, 2, 3, 2, generator=generator),
        torch.rand(2, 7, 2, 2, 3, generator=generator),
    ]
    value, locations, weights = (t.double().requires_grad_() for t in tensors)
    expected = deformable.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    output_grad = torch.randn(expected.shape, generator=generator).double()
    grads = torch.autograd.grad(expected, (value, locations, weights), output_grad)
    output = deformable.MultiScaleDeformableAttnFunction.apply(
        value, shapes, torch.tensor([0, 20]), locations, weights, 64
    )
    # Two orders of the same float64 sums.
    torch.testing.assert_close(output, expected, rtol=1e-12, atol=1e-13)
    actual = torch.autograd.grad(output, (value, locations, weights), output_grad)
    torch.testing.assert_close(actual, grads, rtol=1e-12, atol=1e-12)


def test_focal_loss_as_on_a_gpu(stand_in):
    """Against mmdet's PyTorch function, whose targets are one-hot; class 3 is background."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 3, generator=generator).double().requires_grad_()
    target = torch.randint(0, 4, (9,), generator=generator)
    one_hot = torch.nn.functional.one_hot(target, 4)[:, :3].double()
    expected = py_sigmoid_focal_loss(logits, one_hot, gamma=1.5, alpha=0.3, reduction='sum')
    actual = mmcv.ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, None, 'sum')
    # Two formulas of the same function in float64.
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    grads = [torch.autograd.grad(loss, logits)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


# --- which mmcv serves --------------------------------------------------------------------------


def test_the_report_names_what_serves():
    command = [sys.executable, '-m', 'vrwkv']
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f'torch {torch.__version__.partition("+")[0]}' in report
    served = 'compiled, ' if COMPILED else 'nms and RoIAlign are those of torchvision'
    assert f"mmcv's operators: {served}" in report
