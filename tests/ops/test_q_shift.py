"""Q-Shift: values worked out by hand, the loops, the adjoint and wrong grids."""

import pytest
import torch

from vrwkv_ops import q_shift
from vrwkv_ops.reference import q_shift_reference
from vrwkv_ops.shift import shift_slices


def _slices(x, resolution, shift_pixel=1, channel_gamma=1 / 4):
    return shift_slices(x, *resolution, shift_pixel, channel_gamma)


KERNEL = pytest.param((q_shift, 'cpu'), id='kernel-cpu')
ON_GPU = pytest.param((q_shift, 'cuda'), id='kernel-cuda', marks=pytest.mark.cuda)
all_backends = pytest.mark.parametrize(
    'backend',
    [
        pytest.param((q_shift_reference, 'cpu'), id='reference'),
        pytest.param((_slices, 'cpu'), id='slices'),
        KERNEL,
        ON_GPU,
    ],
)
operator = pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])


@all_backends
def test_values_worked_out_by_hand(backend):
    """On a 2 x 3 grid of 1 to 6 each group takes its neighbour, and the fifth channel stays."""
    function, device = backend
    grid = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    x = grid.reshape(1, 6, 1).expand(1, 6, 5).to(device)
    expected = torch.tensor(
        [
            [[0, 1, 2], [0, 4, 5]],  # from the left
            [[2, 3, 0], [5, 6, 0]],  # from the right
            [[0, 0, 0], [1, 2, 3]],  # from above
            [[4, 5, 6], [0, 0, 0]],  # from below
            [[1, 2, 3], [4, 5, 6]],
        ],
        dtype=torch.float32,
    )
    y = function(x, (2, 3), channel_gamma=1 / 5)
    assert torch.equal(y.cpu()[0].T.reshape(5, 2, 3), expected)


@all_backends
@pytest.mark.parametrize(
    ('channels', 'gamma', 'bounds'),
    [(10, 1 / 4, (0, 2, 5, 7, 10)), (6, 1 / 4, (0, 1, 3, 4, 6)), (16, 1 / 8, (0, 2, 4, 6, 8))],
)
def test_groups_of_uneven_size(backend, channels, gamma, bounds):
    """Which channels move which way, seen from a single token in the middle of a 3 x 3 grid."""
    function, device = backend
    x = torch.zeros(1, 9, channels, device=device)
    x[:, 4] = 1
    y = function(x, (3, 3), channel_gamma=gamma).cpu()
    # A token that is taken from the left shows up on the right, and so on.
    for group, place in enumerate((5, 3, 7, 1)):
        inside = torch.zeros(channels)
        inside[bounds[group] : bounds[group + 1]] = 1
        assert torch.equal(y[0, place], inside)
    stays = torch.ones(channels)
    stays[: bounds[4]] = 0
    assert torch.equal(y[0, 4], stays)


@all_backends
@pytest.mark.parametrize('shift_pixel', [0, 1, 2, 3, 9])
@pytest.mark.parametrize('resolution', [(1, 1), (1, 7), (7, 1), (3, 5), (8, 8)])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_equals_zero_padding(backend, dtype, resolution, shift_pixel):
    """Bit for bit a crop of a zero-padded image."""
    function, device = backend
    height, width = resolution
    channels, s = 37, shift_pixel
    x = torch.randn(2, height * width, channels).to(device, dtype)
    padded = torch.nn.functional.pad(x.reshape(2, height, width, channels), (0, 0, s, s, s, s))
    starts = ((s, 0), (s, 2 * s), (0, s), (2 * s, s))  # rows and columns of the padded image
    bounds = (0, 9, 18, 27, 37)
    expected = torch.cat(
        [
            padded[:, row : row + height, column : column + width, bounds[n] : bounds[n + 1]]
            for n, (row, column) in enumerate(starts)
        ],
        dim=-1,
    )
    y = function(x, resolution, s)
    assert y.dtype == dtype and y.is_contiguous()
    assert torch.equal(y, expected.reshape(x.shape))


@all_backends
def test_strides_and_empty_batch(backend):
    function, device = backend
    x = torch.randn(3, 20, 12, device=device)
    expected = function(x, (4, 5))
    for strided in (
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([x, x], -1).flatten(-2)[..., ::2],
        x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
    ):
        assert not strided.is_contiguous()
        assert torch.equal(function(strided, (4, 5)), expected)
    assert function(x[:0], (4, 5)).shape == (0, 20, 12)


@operator
@pytest.mark.parametrize('shift_pixel', [1, 2, 6])
def test_gradient_is_the_adjoint(device, shift_pixel):
    """<shift(x), y> = <x, shift*(y)>, exactly: a shift only moves numbers, here integers."""
    x, y = (torch.randint(-9, 9, (2, 15, 10), device=device).double() for _ in range(2))
    x.requires_grad_()
    shifted = q_shift(x, (3, 5), shift_pixel)
    (adjoint,) = torch.autograd.grad(shifted, x, y)
    assert (shifted * y).sum().item() == (x * adjoint).sum().item()


@operator
def test_gradcheck_twice(device):
    x = torch.randn(1, 6, 8, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: q_shift(x, (2, 3)), x)
    assert torch.autograd.gradgradcheck(lambda x: q_shift(x, (2, 3)), x)


@operator
def test_every_output_element_is_written(device):
    x = torch.randn(2, 35, 33, device=device)
    expected = q_shift(x, (5, 7), 2, 0.2)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.equal(q_shift(x, (5, 7), 2, 0.2), expected)
    finally:
        torch.use_deterministic_algorithms(False)
