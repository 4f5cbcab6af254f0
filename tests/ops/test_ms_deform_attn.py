"""What only deformable attention has: borders, single points and pixels, dtypes, memory."""

import itertools
import math

import pytest
import torch

from .backends import has_kernels, on
from .operators import OPERATORS, Call
from .test_torch_library import allocations

OPERATOR = OPERATORS['ms_deform_attn']


def make(shapes, locations, backend, dtype=torch.float64, batch=1, heads=1, channels=3):
    """A call with given locations (Q, L, P, 2) in all images and heads."""
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes):
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(
            backend.device, dtype
        )

    queries, levels, points, _ = locations.shape
    values = sum(height * width for height, width in shapes)
    inputs = dict(
        value=normal(batch, values, heads, channels),
        sampling_locations=locations[None, :, None]
        .expand(batch, -1, heads, -1, -1, -1)
        .to(backend.device, dtype),
        attention_weights=normal(batch, queries, heads, levels, points),
    )
    return Call(
        OPERATOR, inputs, [normal(batch, queries, heads * channels)], dict(spatial_shapes=shapes)
    )


@on()
@pytest.mark.parametrize('size', [1, 2, 4])
def test_points_on_borders_and_outside(backend, size):
    """Pixel centres, edges, half pixels outside and far away, in exact arithmetic.

    There the gradient of a location jumps, and the side is that of PyTorch's grid_sample.
    """
    steps = [-9.0, *(n / (2 * size) for n in range(-2, 2 * size + 3)), 9.0]
    places = torch.tensor(list(itertools.product(steps, steps)), dtype=torch.float64)
    call = make([(size, 2 * size)], places[:, None, None], backend)
    call.check(call.run(backend))


@on()
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
def test_one_point_one_level(backend, dtype):
    call = make([(1, 1)], torch.tensor([[[[0.25, 0.75]]]]), backend, dtype, batch=2, heads=2)
    call.check(call.run(backend))


@on()
def test_weights_of_a_bilinear_interpolation_by_hand(backend):
    """A quarter of a pixel to the right of the upper left centre of a 2 x 2 map."""
    value = torch.tensor([1.0, 2, 10, 20], device=backend.device).view(1, 4, 1, 1)
    place = torch.tensor([0.375, 0.25], device=backend.device).view(1, 1, 1, 1, 1, 2)
    weight = torch.full((1, 1, 1, 1, 1), 2.0, device=backend.device)
    y = backend.function('ms_deform_attn')(value, [(2, 2)], place, weight)
    assert y.tolist() == [[[2 * (0.75 * 1 + 0.25 * 2)]]]


@on(only=has_kernels)
def test_nan_stays_where_it_is_sampled(backend):
    """A place that is no number samples nothing; a value that is none spoils who samples it."""
    places = torch.tensor([[math.nan, 0.5], [0.5, math.inf], [0.25, 0.5], [-9.0, 0.5]])
    call = make([(1, 2)], places[:, None, None].double(), backend)
    call.inputs['value'][0, 0] = math.nan
    y = call.run(backend)[0][0]
    assert not y[[0, 1, 3]].any() and y[2].isnan().all()


@on(only=has_kernels)
def test_values_and_points_of_different_dtypes(backend):
    """Points of another dtype than the values are read in the accumulation dtype."""
    call = OPERATORS['ms_deform_attn_float32_points'].make(
        (2, 5, 8), torch.bfloat16, backend.device
    )
    narrow = call.run(backend)
    inputs = dict(call.inputs)
    for name in ('sampling_locations', 'attention_weights'):
        inputs[name] = inputs[name].double()
    wide = Call(call.operator, inputs, call.grads, call.options).run(backend)
    for a, b in zip(narrow[:2], wide[:2], strict=True):
        assert torch.equal(a, b)
    assert wide[2].dtype == wide[3].dtype == torch.float64


@pytest.mark.parametrize('python', [False, True])
def test_no_temporary_larger_than_the_output(python):
    """Also in PyTorch, which mmcv's function does with a stack of all samples."""
    from vrwkv_ops import deform

    value = torch.randn(1, 64, 2, 32)
    locations, weights = torch.rand(1, 400, 2, 1, 4, 2), torch.rand(1, 400, 2, 1, 4)
    function = deform.forward if python else torch.ops.vrwkv_ops.ms_deform_attn
    out, sizes = allocations(lambda: function(value, [8, 8], locations, weights))
    assert max(sizes) <= out.numel() * out.element_size()
