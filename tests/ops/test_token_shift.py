"""The fused token shift: every backend against shifted and mixed images, and its gradients."""

import pytest
import torch
import torch.nn.functional as F

from vrwkv_ops import shift, token_shift
from vrwkv_ops.checks import accumulation_dtype, check_token_shift
from vrwkv_ops.reference import token_shift_reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


class _Slices(torch.autograd.Function):
    """The pure-PyTorch kernels, called past the dispatcher."""

    @staticmethod
    def forward(ctx, x, mixes, *args):
        ctx.save_for_backward(x, mixes)
        ctx.args = args
        return tuple(shift.forward(x, mixes, *args))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return (*shift.backward(grads, *ctx.saved_tensors, *ctx.args), *[None] * 5)


def token_shift_slices(
    x, mixes, resolution=None, shift_pixel=1, channel_gamma=1 / 4, mode='q_shift'
):
    check_token_shift(x, mixes, resolution, shift_pixel, channel_gamma, mode)
    mixes = torch.stack([mix.reshape(-1) for mix in mixes]).to(accumulation_dtype(x.dtype))
    grid = resolution if mode == 'q_shift' else (1, x.shape[1])
    return _Slices.apply(x, mixes, *grid, shift_pixel, channel_gamma or 0, mode)


all_backends = pytest.mark.parametrize(
    'backend',
    [
        pytest.param((token_shift_reference, 'cpu'), id='reference'),
        pytest.param((token_shift_slices, 'cpu'), id='slices'),
        pytest.param((token_shift, 'cpu'), id='kernel-cpu'),
        pytest.param((token_shift, 'cuda'), id='kernel-cuda', marks=pytest.mark.cuda),
    ],
)
modes = pytest.mark.parametrize('mode', ['q_shift', 'single_shift', 'double_shift'])


def truth(x, mixes, resolution, shift_pixel, channel_gamma, mode):
    """Crops of a zero-padded image (design section 3), mixed; differentiable by autograd."""
    channels, s = x.shape[2], shift_pixel
    height, width = resolution if mode == 'q_shift' else (1, x.shape[1])
    image = x.reshape(x.shape[0], height, width, channels)
    padded = F.pad(image, (0, 0, s, s, s, s))
    left, right, above, below, here = (
        padded[:, row : row + height, column : column + width]
        for row, column in ((s, 0), (s, 2 * s), (0, s), (2 * s, s), (s, s))
    )
    ends = [int(channels * (channel_gamma or 0) * n) for n in range(5)]
    if mode == 'single_shift':
        shifted = left
    elif mode == 'double_shift':
        parts = [left[..., : ends[1]], right[..., ends[1] : ends[2]], here[..., ends[2] :]]
        shifted = torch.cat(parts, -1)
    else:
        sources = (left, right, above, below)
        parts = [y[..., ends[n] : ends[n + 1]] for n, y in enumerate(sources)]
        shifted = torch.cat([*parts, here[..., ends[4] :]], -1)
    mixes = [mix.reshape(-1) for mix in mixes]
    return [(image * mix + shifted * (1 - mix)).reshape(x.shape) for mix in mixes]


def make_inputs(resolution, channels, batch=2, count=3, dtype=torch.float32, device='cpu'):
    tokens = resolution[0] * resolution[1]
    generator = torch.Generator().manual_seed(tokens + channels)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device)

    x = normal(batch, tokens, channels).to(dtype)
    mixes = [normal(1, 1, channels).to(accumulation_dtype(dtype)) for _ in range(count)]
    grads = [normal(batch, tokens, channels).to(dtype) for _ in range(count)]
    return x, mixes, grads


def run(function, x, mixes, grads, *args):
    """Results and the gradients of x and the mixes."""
    leaves = [leaf.detach().requires_grad_() for leaf in (x, *mixes)]
    results = function(leaves[0], leaves[1:], *args)
    gradients = torch.autograd.grad(results, leaves, [g.to(results[0].dtype) for g in grads])
    return [*(y.detach() for y in results), *gradients]


def compare(backend, x, mixes, grads, *args):
    results = run(backend, x, mixes, grads, *args)
    truths = run(truth, x.double(), [mix.double() for mix in mixes], grads, *args)
    for i, (got, expected) in enumerate(zip(results, truths, strict=True)):
        assert got.dtype == (x.dtype if i <= len(mixes) else mixes[0].dtype)
        assert got.is_contiguous()
        # Rounded once at the end, on top of some roundings of the accumulation dtype.
        rounding = (expected.to(got.dtype).double() - expected).norm()
        bar = 1e-14 if x.dtype == torch.float64 else 1e-6
        error = (got.double() - expected).norm()
        assert error <= 1.001 * rounding + bar * expected.norm(), i


@all_backends
@modes
@pytest.mark.parametrize('count', [1, 2, 3])
@pytest.mark.parametrize('dtype', DTYPES)
def test_results_and_gradients(backend, dtype, count, mode):
    function, device = backend
    inputs = make_inputs((3, 5), 41, count=count, dtype=dtype, device=device)
    compare(function, *inputs, (3, 5), 1, 1 / 4, mode)
