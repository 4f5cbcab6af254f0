"""The configs of the paper's table 5."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from vrwkv.backbones import VRWKV

CONFIGS = Path(__file__).resolve().parents[2] / 'configs/classification'
FULL = CONFIGS / 'vrwkv-tiny_8xb128_in1k.py'
# name: token shift, bidirectional attention, as the table has them
TABLE = {
    'rwkv': ('single_shift', False),
    'no-shift': ('none', True),
    'single-shift': ('single_shift', True),
    'causal': ('q_shift', False),
}


def load(name):
    return Config.fromfile(CONFIGS / f'ablation/vrwkv-tiny_{name}_8xb128_in1k.py')


def test_every_imagenet_config_is_in_the_table():
    found = {path.stem.split('_')[1] for path in (CONFIGS / 'ablation').glob('vrwkv-tiny_*.py')}
    assert found == set(TABLE)


@pytest.mark.parametrize('name', TABLE)
def test_nothing_but_shift_and_attention_differs(name):
    variant, full = load(name).to_dict(), Config.fromfile(FULL).to_dict()
    for cfg in (variant, full):
        cfg['model']['backbone'] = {
            key: value
            for key, value in cfg['model']['backbone'].items()
            if key not in ('shift_mode', 'causal')
        }
    assert variant == full


@pytest.mark.parametrize(('name', 'expected'), TABLE.items())
def test_what_a_token_sees(name, expected):
    """By the gradient of a token's attention, in the middle of a grid of 5 x 5 tokens."""
    shift, bidirectional = expected
    arguments = dict(load(name).model.backbone, depth=1, embed_dims=16)
    assert arguments.pop('type') == 'VRWKV'
    torch.manual_seed(0)
    model = VRWKV(**arguments)
    attention = model.layers[0].att
    assert attention.shift.shift_mode == shift
    tokens = torch.randn(1, 25, 16, requires_grad=True)
    output = attention(tokens, (5, 5))
    (gradient,) = torch.autograd.grad(output[0, 12].sum(), tokens)
    seen = set(gradient[0].abs().sum(1).nonzero().flatten().tolist())
    if bidirectional:
        assert seen == set(range(25))
    else:
        # Keys and values of tokens 0 to 12; with Q-Shift these hold the tokens below them, too,
        # down to 17, and the one to the right.
        assert seen == set(range(18 if shift == 'q_shift' else 13))


def test_parameters_of_the_variants():
    """Three mixes in attention and two in the channel mix of each layer, unless nothing shifts."""

    def count(arguments):
        with torch.device('meta'):
            arguments = {key: value for key, value in arguments.items() if key != 'type'}
            return sum(p.numel() for p in VRWKV(**arguments).parameters())

    full = count(Config.fromfile(FULL).model.backbone)
    counts = {name: count(load(name).model.backbone) for name in TABLE}
    assert counts == dict.fromkeys(TABLE, full) | {'no-shift': full - 12 * 5 * 192}
