"""VRWKV under torch.compile and torch.export: one graph for any size, with eager mode's results.

That every variant of the model compiles for one size is in test_vrwkv.py.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from vrwkv.backbones import VRWKV

SIZES = [(32, 32), (48, 40), (56, 72)]


def build(**arguments):
    torch.manual_seed(0)
    torch._dynamo.reset()
    small = dict(img_size=32, patch_size=8, embed_dims=16, depth=2)
    model = VRWKV(**{**small, **arguments})
    with torch.no_grad():
        model.pos_embed.normal_()
    return model


def train(model, image):
    """Outputs and the gradients of all parameters."""
    outputs = model(image)
    loss = sum(y.square().mean() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, list(model.parameters()))]


def assert_equal(got, expected):
    """Decompositions of PyTorch's own operators round otherwise, in the last places."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize('training', [True, False], ids=['training', 'inference'])
def test_dynamic_sizes_share_one_graph(training):
    model = build(depth=1).train(training)
    counter = CompileCounterWithBackend('aot_eager' if training else 'eager')
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    counts = []
    for size in SIZES[1:]:
        image = torch.randn(2, 3, *size)
        if training:
            assert_equal(train(compiled, image), train(model, image))
        else:
            with torch.inference_mode():
                assert_equal(compiled(image), model(image))
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_inductor():
    model = build(depth=1)
    compiled = torch.compile(model, fullgraph=True)
    image = torch.randn(2, 3, 32, 32)
    assert_equal(train(compiled, image), train(model, image))


@pytest.mark.parametrize(
    ('example', 'strict'),
    [((32, 32), False), ((48, 40), True)],
    ids=['own-size-non-strict', 'other-size-strict'],
)
def test_export_with_dynamic_height_and_width(example, strict):
    model = build(out_indices=(0, 1)).eval()
    sides = {
        2: torch.export.Dim('height', min=16, max=4096),  # two patches: PyTorch sets 1 apart
        3: torch.export.Dim('width', min=16, max=4096),
    }
    program = torch.export.export(
        model, (torch.randn(1, 3, *example),), dynamic_shapes=(sides,), strict=strict
    )
    for size in SIZES:
        image = torch.randn(1, 3, *size)
        assert_equal(program.module()(image), model(image))
