"""FLOP counts of our models by mmengine's own analysis."""

import subprocess
import sys

import pytest
import torch
from mmengine.analysis import (
    ActivationAnalyzer,
    FlopAnalyzer,
    complexity_analysis,
    get_model_complexity_info,
)
from torch import nn

from vrwkv.analysis import complexity, input_channels, register_flop_handlers
from vrwkv.backbones import VRWKV, VRWKV6, ViT

C, DEPTH, SIZE = 16, 3, (64, 96)
TOKENS = SIZE[0] * SIZE[1] // 16**2


@pytest.fixture(autouse=True)
def handlers(monkeypatch):
    """Register the handlers for one test."""
    for kind in ('FLOP', 'ACT'):
        name = f'_DEFAULT_SUPPORTED_{kind}_OPS'
        monkeypatch.setattr(complexity_analysis, name, getattr(complexity_analysis, name).copy())
    register_flop_handlers()


@pytest.fixture(scope='module')
def images():
    return torch.zeros(2, 3, *SIZE)


def by_hand(tokens):
    """Multiply-adds of a VRWKV of C channels by operator, from the paper's equations."""
    attention = 4 * C * C
    channel_mix = C * 4 * C + 4 * C * C + C * C
    return {
        'conv': tokens * 3 * 16**2 * C,
        'linear': DEPTH * tokens * (attention + channel_mix),
        'bi_wkv': DEPTH * tokens * 29 * C,
        # mmengine takes 5 for each value that is normalised: ln0, two in each layer, the final one.
        'layer_norm': (1 + 2 * DEPTH + 1) * tokens * 5 * C,
    }


@pytest.mark.parametrize('shift_mode', ['q_shift', 'single_shift', 'double_shift', 'none'])
def test_vrwkv(images, shift_mode):
    model = VRWKV(embed_dims=C, depth=DEPTH, shift_mode=shift_mode).eval()
    analyzer = FlopAnalyzer(model, images)
    assert analyzer.by_operator() == by_hand(2 * TOKENS)
    unknown = [name for name in analyzer.unsupported_ops() if 'vrwkv_ops' in name]
    assert unknown == []  # a new operator needs a handler in vrwkv/analysis/flops.py


@pytest.mark.parametrize(
    ('dims', 'billions'), [(192, 1.659), (384, 5.745), (768, 21.2)], ids=['tiny', 'small', 'base']
)
def test_vrwkv6(dims, billions):
    """At 224 pixels, by the formula of upstream's script; all but the head grows with the image."""
    with torch.device('meta'):
        model = VRWKV6(embed_dims=dims, num_heads=dims // 64)
    model = model.to_empty(device='cpu').eval()
    analyzer = FlopAnalyzer(model, torch.zeros(1, 3, 32, 32))
    assert analyzer.total() * (224 / 32) ** 2 / 1e9 == pytest.approx(billions, rel=0.015)
    assert [name for name in analyzer.unsupported_ops() if 'vrwkv_ops' in name] == []


def test_vit(images):
    model = ViT(embed_dims=C, depth=DEPTH, num_heads=2).eval()
    attention = FlopAnalyzer(model, images).by_operator()['scaled_dot_product_attention']
    # Queries times keys and weights times values, for each of the two images.
    assert attention == DEPTH * 2 * 2 * TOKENS**2 * C


def test_mmengines_report(images):
    model = VRWKV(embed_dims=C, depth=DEPTH).eval()
    report = get_model_complexity_info(model, (3, *SIZE), show_arch=False)
    assert report['flops'] == sum(by_hand(TOKENS).values())
    assert report['params'] == sum(p.numel() for p in model.parameters())
    # A value for each output of a linear layer, of Bi-WKV and of the patch embedding.
    width = DEPTH * (4 * C + C + 4 * C + C + C) + C
    assert ActivationAnalyzer(model, images[:1]).total() == report['activations'] == TOKENS * width


def test_importing_registers_nothing():
    """Neither the models nor the analysis change mmengine's; a call of the function does."""
    code = (
        'import sys, torch; from vrwkv.backbones import VRWKV\n'
        'assert not any("analysis" in name for name in sys.modules if name.startswith("vrwkv"))\n'
        'assert "mmengine.analysis" not in sys.modules\n'
        'from vrwkv.analysis import complexity, register_flop_handlers\n'
        'from mmengine.analysis import FlopAnalyzer\n'
        'model, image = VRWKV(embed_dims=8, depth=1).eval(), torch.zeros(1, 3, 32, 32)\n'
        'count = lambda: FlopAnalyzer(model, image).by_operator()["bi_wkv"]\n'
        'print(count(), complexity(model, image).operators["bi_wkv"], count())\n'
        'register_flop_handlers(); print(count())\n'
    )
    command = [sys.executable, '-W', 'ignore', '-c', code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd='/')
    assert result.stdout.split()[-4:] == ['0', str(29 * 4 * 8), '0', str(29 * 4 * 8)]


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_input_channels(channels):
    backbone = VRWKV(embed_dims=8, depth=1, in_channels=channels)
    model = nn.Sequential(nn.Conv2d(7, 7, 1))
    model.backbone = backbone
    assert input_channels(backbone) == input_channels(model) == channels
    assert input_channels(nn.Linear(2, 2)) == 3


def test_complexity_of_a_model_and_of_its_backbone(images):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = VRWKV(embed_dims=C, depth=DEPTH)
            self.head = nn.Linear(C, 10)

        def forward(self, x):
            return self.head(self.backbone(x)[0].mean((2, 3)))

    model = Classifier()
    cost = complexity(model, images)
    backbone = by_hand(2 * TOKENS)
    assert cost.backbone_flops == sum(backbone.values())
    assert cost.flops == sum(backbone.values()) + 2 * C * 10
    assert cost.parameters - cost.backbone_parameters == 10 * C + 10
    assert cost.operators == backbone | {'linear': backbone['linear'] + 2 * C * 10}
    assert list(cost.operators.values()) == sorted(cost.operators.values(), reverse=True)
    assert complexity(model.backbone, images)[:2] == cost[2:4]
    assert not model.training
