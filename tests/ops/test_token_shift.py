"""What only the token shifts have: values worked out by hand, groups, the adjoint, mixes."""

import pytest
import torch

from vrwkv_ops import token_shift

from .backends import on
from .operators import DTYPES, HALF, OPERATORS, Call


@on()
def test_values_worked_out_by_hand(backend):
    """On a 2 x 3 grid of 1 to 6 each group takes its neighbour, and the fifth channel stays."""
    grid = torch.tensor([[1.0, 2, 3], [4, 5, 6]], device=backend.device)
    x = grid.reshape(1, 6, 1).expand(1, 6, 5)
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
    y = backend.function('q_shift')(x, (2, 3), channel_gamma=1 / 5)
    assert torch.equal(y.cpu()[0].T.reshape(5, 2, 3), expected)


@on()
@pytest.mark.parametrize(
    ('channels', 'gamma', 'bounds'),
    [(10, 1 / 4, (0, 2, 5, 7, 10)), (6, 1 / 4, (0, 1, 3, 4, 6)), (16, 1 / 8, (0, 2, 4, 6, 8))],
)
def test_groups_of_uneven_size(backend, channels, gamma, bounds):
    """Which channels move which way, seen from a single token in the middle of a 3 x 3 grid."""
    x = torch.zeros(1, 9, channels, device=backend.device)
    x[:, 4] = 1
    y = backend.function('q_shift')(x, (3, 3), channel_gamma=gamma).cpu()
    # A token that is taken from the left shows up on the right, and so on.
    for group, place in enumerate((5, 3, 7, 1)):
        inside = torch.zeros(channels)
        inside[bounds[group] : bounds[group + 1]] = 1
        assert torch.equal(y[0, place], inside)
    stays = torch.ones(channels)
    stays[: bounds[4]] = 0
    assert torch.equal(y[0, 4], stays)


HEADS = {'4': ((1, 6, 8), 2), '5': ((1, 6, 15), 3), '16': ((2, 6, 80), 5), '64': ((2, 6, 192), 3)}


@on('shape heads', HEADS)
def test_groups_repeat_in_each_head(backend, shape, heads):
    """As if each head were shifted alone; PyTorch sums other widths in another order."""
    for name in ('q_shift', 'token_shift', 'double_shift', 'single_shift'):
        options = dict(resolution=(2, 3), shift_pixel=1)
        call = OPERATORS[name].make(shape, device=backend.device, **options)
        parts = [
            Call(
                call.operator,
                {key: x.chunk(heads, -1)[n] for key, x in call.inputs.items()},
                [grad.chunk(heads, -1)[n] for grad in call.grads],
                call.options,
            ).run(backend)
            for n in range(heads)
        ]
        call.options = {**call.options, 'heads': heads}
        for result, got, *expected in zip(call.names(), call.run(backend), *parts, strict=True):
            bar = 1e-5 if result == 'gmixes' else 0
            torch.testing.assert_close(got, torch.cat(expected, -1), rtol=bar, atol=bar)


@on('tokens grid', [(h * w, (h, w)) for h, w in ((1, 1), (1, 7), (7, 1), (3, 5), (8, 8))])
def test_q_shift_moves_bits(backend, tokens, grid):
    for step, dtype in zip((0, 1, 2, 3, 9, 1), (*DTYPES, *HALF), strict=True):
        options = dict(resolution=grid, shift_pixel=step)
        call = OPERATORS['q_shift'].make((2, tokens, 37), dtype, backend.device, **options)
        results = call.run(backend)
        assert all(torch.equal(a, b.to(dtype)) for a, b in zip(results, call.truth(), strict=True))


@on()
def test_mixes_of_any_form(backend):
    """One tensor (n, C), vectors, and the layers' parameters of shape (1, 1, C) mean the same."""
    function = backend.function('token_shift')
    call = OPERATORS['token_shift'].make((2, 6, 8), device=backend.device, resolution=(2, 3))
    x, mixes = call.inputs.values()
    expected = function(x, mixes, (2, 3))
    vectors, layers = list(mixes), [mix.view(1, 1, 8) for mix in mixes]
    for form in (vectors, tuple(vectors), layers, mixes.double(), [m.double() for m in layers]):
        for got, want in zip(function(x, form, (2, 3)), expected, strict=True):
            assert torch.equal(got, want)


@on()
def test_a_mix_of_one_or_zero_is_exact(backend):
    """No rounding where nothing is mixed: upstream's ``init_mode='local'`` starts so."""
    x = torch.randn(2, 12, 8, device=backend.device)
    mixes = torch.stack([torch.ones(8), torch.zeros(8)]).to(backend.device)
    stays, moves = backend.function('token_shift')(x, mixes, (3, 4))
    assert torch.equal(stays, x)
    assert torch.equal(moves, backend.function('q_shift')(x, (3, 4)))


@on()
def test_results_that_are_not_used(backend):
    """They are left out of the gradients, and an input that needs no gradient has none."""
    call = OPERATORS['token_shift'].make(device=backend.device)
    x, mixes = call.inputs['x'].requires_grad_(), call.inputs['mixes']
    function = backend.function('token_shift')
    first, _, third = function(x, mixes, (3, 5))
    (gx,) = torch.autograd.grad([first, third], x, call.grads[::2])
    (expected,) = torch.autograd.grad(function(x, mixes[::2], (3, 5)), x, call.grads[::2])
    torch.testing.assert_close(gx, expected)


def test_nothing_but_the_inputs_is_saved():
    x, mixes = OPERATORS['token_shift'].make().inputs.values()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda y: saved.append(y) or y, lambda y: y):
        token_shift(x, mixes.requires_grad_(), (3, 5))
    assert {y.data_ptr() for y in saved} == {x.data_ptr(), mixes.data_ptr()}
