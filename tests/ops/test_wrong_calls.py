"""One table of wrong calls, run through every implementation: each refuses alike, and helps."""

import pytest
import torch

from vrwkv_ops import bi_wkv

from .backends import has_kernels, on


def wkv(**changes):
    arguments = dict(
        w=torch.zeros(4), u=torch.zeros(4), k=torch.zeros(2, 6, 4), v=torch.zeros(2, 6, 4)
    )
    return {**arguments, **changes}


def shift(**changes):
    return {**dict(x=torch.zeros(2, 6, 8), resolution=(2, 3)), **changes}


# Arguments, exception, and what its message must name: argument, what came, what is accepted.
WRONG_WKV = {
    'no tensor': (wkv(k=[[[1.0]]]), TypeError, "'k'.*torch.Tensor.*list"),
    'w a number': (wkv(w=0.5), TypeError, "'w'.*torch.Tensor.*float"),
    'u missing': (wkv(u=None), TypeError, "'u'.*torch.Tensor.*NoneType"),
    'rank 2': (wkv(k=torch.zeros(6, 4)), ValueError, r"'k'.*\(B, T, C\).*\(6, 4\)"),
    'rank 4': (wkv(k=torch.zeros(1, 2, 6, 4)), ValueError, r"'k'.*\(B, T, C\).*\(1, 2, 6, 4\)"),
    'v of other T': (wkv(v=torch.zeros(2, 5, 4)), ValueError, r"'v'.*\(2, 6, 4\).*\(2, 5, 4\)"),
    'v broadcasts': (wkv(v=torch.zeros(1, 6, 4)), ValueError, r"'v'.*\(2, 6, 4\).*\(1, 6, 4\)"),
    'v of rank 2': (wkv(v=torch.zeros(6, 4)), ValueError, r"'v'.*\(2, 6, 4\).*\(6, 4\)"),
    'w of other C': (wkv(w=torch.zeros(5)), ValueError, r"'w'.*\(4,\).*\(5,\)"),
    'u of rank 2': (wkv(u=torch.zeros(1, 4)), ValueError, r"'u'.*\(4,\).*\(1, 4\)"),
    'u a scalar': (wkv(u=torch.zeros(())), ValueError, r"'u'.*\(4,\).*\(\)"),
    'integer k': (wkv(k=torch.zeros(2, 6, 4).long()), TypeError, "'k'.*int64.*float32"),
    'integer w': (wkv(w=torch.zeros(4).int()), TypeError, "'w'.*int32.*float32"),
    'bool u': (wkv(u=torch.zeros(4).bool()), TypeError, "'u'.*bool.*float32"),
    'complex v': (wkv(v=torch.zeros(2, 6, 4) * 1j), TypeError, "'v'.*complex64.*float32"),
    'mixed dtypes': (
        wkv(v=torch.zeros(2, 6, 4).half()),
        TypeError,
        "'k' and 'v'.*float32.*float16",
    ),
    'no tokens': (
        wkv(k=torch.zeros(2, 0, 4), v=torch.zeros(2, 0, 4)),
        ValueError,
        r'T >= 1.*\(2, 0, 4\)',
    ),
    'no channels': (
        wkv(k=torch.zeros(2, 6, 0), v=torch.zeros(2, 6, 0), w=torch.zeros(0), u=torch.zeros(0)),
        ValueError,
        r'C >= 1.*\(2, 6, 0\)',
    ),
    'devices': (
        wkv(v=torch.zeros(2, 6, 4, device='meta')),
        ValueError,
        "'v' is on meta.*'k' is on cpu",
    ),
    'device of w': (
        wkv(w=torch.zeros(4, device='meta')),
        ValueError,
        "'w' is on meta.*'k' is on cpu",
    ),
    'causal a number': (wkv(causal=1), TypeError, "'causal'.*bool.*int"),
}
WRONG_SHIFT = {
    'no tensor': (shift(x='x'), TypeError, "'x'.*torch.Tensor.*str"),
    'an image': (
        shift(x=torch.zeros(2, 8, 2, 3)),
        ValueError,
        r"'x'.*\(B, H\*W, C\).*\(2, 8, 2, 3\)",
    ),
    'integers': (shift(x=torch.zeros(2, 6, 8).long()), TypeError, "'x'.*int64.*float32"),
    'other grid': (
        shift(resolution=(3, 3)),
        ValueError,
        r"'resolution' \(3, 3\) has 9 tokens.*T = 6",
    ),
    'negative grid': (
        shift(resolution=(-2, -3)),
        ValueError,
        r"'resolution'.*positive.*\(-2, -3\)",
    ),
    'float grid': (shift(resolution=(2.0, 3.0)), TypeError, r"'resolution'.*ints.*\(2\.0, 3\.0\)"),
    'bool grid': (shift(resolution=(True, 6)), TypeError, "'resolution'.*ints.*True"),
    'grid a number': (shift(resolution=6), TypeError, "'resolution'.*pair.*int"),
    'grid of three': (shift(resolution=(1, 2, 3)), ValueError, "'resolution'.*pair.*3 values"),
    'shift below 0': (shift(shift_pixel=-1), ValueError, "'shift_pixel'.*>= 0.*-1"),
    'shift a float': (shift(shift_pixel=1.0), TypeError, "'shift_pixel'.*int.*float"),
    'shift a bool': (shift(shift_pixel=True), TypeError, "'shift_pixel'.*int.*bool"),
    'gamma 0': (shift(channel_gamma=0.0), ValueError, r"'channel_gamma'.*\(0, 1/4\].*0\.0"),
    'gamma too large': (shift(channel_gamma=0.3), ValueError, r"'channel_gamma'.*\(0, 1/4\].*0\.3"),
    'gamma nan': (shift(channel_gamma=float('nan')), ValueError, "'channel_gamma'.*nan"),
    'gamma a string': (shift(channel_gamma='1/4'), TypeError, "'channel_gamma'.*float.*str"),
    'few channels': (shift(x=torch.zeros(2, 6, 3)), ValueError, 'C = 3 channels, too few.*C >= 4'),
    'heads that do not divide': (shift(heads=3), ValueError, "'heads'.*divide the C = 8.*got 3"),
    'no heads': (shift(heads=0), ValueError, "'heads' must be at least 1.*got 0"),
    'heads a float': (shift(heads=2.0), TypeError, "'heads' must be an int, got float"),
    'small heads': (shift(heads=4), ValueError, 'C = 2 channels in each of 4 heads, too few'),
    'few for gamma': (
        shift(x=torch.zeros(2, 6, 8), channel_gamma=0.1),
        ValueError,
        'C = 8 channels.*C >= 10',
    ),
}
# What is wrong for Q-Shift is wrong for the mix of it; and more is.
MIXES = [torch.zeros(8), torch.zeros(1, 1, 8)]
WRONG_TOKEN_SHIFT = {
    name: ({'mixes': MIXES, **arguments}, error, message)
    for name, (arguments, error, message) in WRONG_SHIFT.items()
} | {
    'no grid': (shift(mixes=MIXES, resolution=None), TypeError, "'resolution'.*pair.*NoneType"),
    'other mode': (
        shift(mixes=MIXES, mode='quad_shift'),
        ValueError,
        "'mode'.*'q_shift', 'single_shift', 'double_shift'.*'quad_shift'",
    ),
    'mode none': (shift(mixes=MIXES, mode=None), ValueError, "'mode'.*'q_shift'.*None"),
    'two groups': (
        shift(mixes=MIXES, mode='double_shift', channel_gamma=0.1),
        ValueError,
        'too few for two groups.*C >= 10',
    ),
    'gamma missing': (
        shift(mixes=MIXES, mode='double_shift', channel_gamma=None),
        TypeError,
        "'channel_gamma'.*float.*NoneType",
    ),
    'image without a grid': (
        shift(mixes=MIXES, mode='single_shift', x=torch.zeros(2, 8, 2, 3)),
        ValueError,
        r"'x'.*\(B, T, C\).*\(2, 8, 2, 3\)",
    ),
    'no mixes': (shift(mixes=[]), ValueError, "'mixes'.*1 to 3.*0"),
    'four mixes': (shift(mixes=MIXES * 2), ValueError, "'mixes'.*1 to 3.*4"),
    'a lone mix': (shift(mixes=torch.zeros(8)), ValueError, r"'mixes'.*\(n, C\).*\(8,\)"),
    'a dict of mixes': (shift(mixes={'k': MIXES[0]}), TypeError, "'mixes'.*sequence.*dict"),
    'a number for a mix': (shift(mixes=[0.5]), TypeError, r"'mixes\[0\]'.*Tensor.*float"),
    'a mix missing': (
        shift(mixes=[MIXES[0], None]),
        TypeError,
        r"'mixes\[1\]'.*torch.Tensor.*NoneType",
    ),
    'integer mixes': (shift(mixes=[MIXES[0].long()]), TypeError, r"'mixes\[0\]'.*int64.*float32"),
    'mix of other C': (
        shift(mixes=[MIXES[0], torch.zeros(7)]),
        ValueError,
        r"'mixes\[1\]'.*C = 8.*\(2, 6, 8\).*\(7,\)",
    ),
    'mix per token': (
        shift(mixes=[torch.zeros(2, 6, 8)]),
        ValueError,
        r"'mixes\[0\]'.*\(1, 1, C\).*\(2, 6, 8\)",
    ),
    'device of a mix': (
        shift(mixes=[torch.zeros(8, device='meta')]),
        ValueError,
        r"'mixes\[0\]' is on meta.*'x' is on cpu",
    ),
}


def deform(**changes):
    arguments = dict(
        value=torch.zeros(2, 7, 3, 4),
        spatial_shapes=[(2, 3), (1, 1)],
        sampling_locations=torch.zeros(2, 5, 3, 2, 6, 2),
        attention_weights=torch.zeros(2, 5, 3, 2, 6),
    )
    return {**arguments, **changes}


WRONG_DEFORM = {
    'no tensor': (deform(value=[1.0]), TypeError, "'value'.*torch.Tensor.*list"),
    'integers': (deform(value=torch.zeros(2, 7, 3, 4).int()), TypeError, "'value'.*int32.*float32"),
    'rank 3': (
        deform(value=torch.zeros(2, 7, 12)),
        ValueError,
        r"'value'.*\(B, S, H, D\).*\(2, 7, 12\)",
    ),
    'shapes a tensor': (
        deform(spatial_shapes=torch.tensor([[2, 3], [1, 1]])),
        TypeError,
        "'spatial_shapes'.*pairs of ints.*Tensor.*tolist",
    ),
    'a flat list': (
        deform(spatial_shapes=[2, 3, 1, 1]),
        TypeError,
        "'spatial_shapes'.*pairs.*list",
    ),
    'floats': (
        deform(spatial_shapes=[(2.0, 3.0), (1, 1)]),
        TypeError,
        r'pairs of ints.*\(2\.0, 3\.0\)',
    ),
    'an empty map': (deform(spatial_shapes=[(7, 1), (0, 1)]), ValueError, r'positive.*\(0, 1\)'),
    'no levels': (deform(spatial_shapes=[]), ValueError, '1 to 16 levels.*0'),
    'other values': (deform(spatial_shapes=[(2, 3), (2, 1)]), ValueError, 'hold 8 values.*S = 7'),
    'other levels': (
        deform(spatial_shapes=[(7, 1)]),
        ValueError,
        r"'sampling_locations'.*L = 1.*\(2, 5, 3, 2, 6, 2\)",
    ),
    'other weights': (
        deform(attention_weights=torch.zeros(2, 5, 3, 2, 5)),
        ValueError,
        r"'attention_weights'.*\(2, 5, 3, 2, 6\).*\(2, 5, 3, 2, 5\)",
    ),
    'devices': (
        deform(attention_weights=torch.zeros(2, 5, 3, 2, 6, device='meta')),
        ValueError,
        "'attention_weights' is on meta.*'value' is on cpu",
    ),
}
# For functions of x alone, and for those of r and x.
WRONG_POINTWISE = {
    'no tensor': (dict(x=[1.0]), TypeError, "'x'.*torch.Tensor.*list"),
    'nothing': (dict(x=None), TypeError, "'x'.*torch.Tensor.*NoneType"),
    'integers': (dict(x=torch.zeros(3).long()), TypeError, "'x'.*int64.*float32"),
}
WRONG_GATE = {
    name: ({'r': torch.zeros(3), **arguments}, error, message)
    for name, (arguments, error, message) in WRONG_POINTWISE.items()
} | {
    'other shape': (
        dict(r=torch.zeros(2, 3), x=torch.zeros(3)),
        ValueError,
        r"'x'.*shape of 'r', \(2, 3\).*\(3,\)",
    ),
    'devices': (
        dict(r=torch.zeros(3), x=torch.zeros(3, device='meta')),
        ValueError,
        "'x' is on meta.*'r' is on cpu",
    ),
}


WRONG = {
    f'{name}-{what}': (name, *case)
    for name, cases in {
        'bi_wkv': WRONG_WKV,
        'q_shift': WRONG_SHIFT,
        'token_shift': WRONG_TOKEN_SHIFT,
        'ms_deform_attn': WRONG_DEFORM,
        'squared_relu': WRONG_POINTWISE,
        'sigmoid_gate': WRONG_GATE,
    }.items()
    for what, case in cases.items()
}


@on('name arguments error message', WRONG, only=lambda backend: backend.device == 'cpu')
def test_refuses(backend, name, arguments, error, message):
    with pytest.raises(error, match=message):
        backend.function(name)(**arguments)


@on(only=lambda backend: backend.device == 'cuda')
def test_refuses_tensors_on_two_devices(backend):
    on_gpu = dict(w=torch.zeros(4), u=torch.zeros(4), k=torch.zeros(2, 6, 4))
    on_gpu = {name: x.to(backend.device) for name, x in on_gpu.items()}
    with pytest.raises(ValueError, match="'v' is on cpu but 'k' is on cuda:0"):
        backend.function('bi_wkv')(**wkv(**on_gpu))


def test_refuses_mixed_dtypes_on_the_meta_device():
    """PyTorch has no autocast there, and raises an error if it is asked."""
    w, u, k, v = (x.to('meta') for x in wkv().values() if isinstance(x, torch.Tensor))
    with pytest.raises(TypeError, match='must have one dtype'):
        bi_wkv(w, u, k, v.bfloat16())


@on(only=lambda backend: has_kernels(backend) and 'pytorch' not in backend.name)
def test_kernels_guard_direct_calls(backend):
    """Calls that go around the Python API end in an exception too, and not in foreign memory."""
    ops = torch.ops.vrwkv_ops
    w, k = (torch.zeros(*shape, device=backend.device) for shape in ((4,), (2, 6, 4)))
    for wrong in (
        (w[:3], w, k, k),
        (w.double(), w, k, k),
        (w, w, k, k[:, :5]),
        (w, w, k, k.half()),
        (w, w, k[0], k[0]),
        (w.new_zeros(4, 2)[:, 0], w, k, k),  # not contiguous
    ):
        with pytest.raises(RuntimeError):
            ops.bi_wkv_forward(*wrong, False, False)
    y, residual, z = ops.bi_wkv_forward(w, w, k, k, False, False)
    with pytest.raises(RuntimeError):
        ops.bi_wkv_backward(k, w, w, k, k, y, residual, z, False)  # z was not saved
    for height, width, gamma in ((3, 3, 0.25), (2**62 + 1, 4, 0.25), (2, 2, 0.0)):
        with pytest.raises(RuntimeError):
            ops.q_shift(k[:, :4], height, width, 1, gamma, False)
    grid = (2, 3, 1, 0.25, 'q_shift')
    for x, mixes, *args in (
        (k, w[:3], *grid),
        (k, w[None, :3], *grid),
        (k, w.double()[None], *grid),
        (k, w.expand(4, 4).contiguous(), *grid),
        (k, w[None], 3, 3, 1, 0.25, 'q_shift'),
        (k, w[None], 2, 3, -1, 0.25, 'q_shift'),
        (k, w[None], 2, 3, 1, 0.5, 'q_shift'),
        (k, w[None], 2, 3, 1, 0.25, 'other'),
        (k, w[None], 2, 3, 1, 0.25, 'double_shift'),
        (k, w[None], *grid, 3),
        (k, w[None], *grid, 0),
    ):
        with pytest.raises(RuntimeError):
            ops.token_shift_forward(x, mixes, *args)
    for grads in ([], [k, k], [k[:, :5]], [k.half()]):
        with pytest.raises(RuntimeError):
            ops.token_shift_backward(grads, k, w[None], *grid)
    for wrong in ((k, k[0]), (k, k.half())):
        with pytest.raises(RuntimeError):
            ops.sigmoid_gate(*wrong)
    six = [k.new_zeros(2, 6, 8)] * 4
    u = k.new_zeros(1, 8)
    for wrong in ((*six, u[:, :4]), (*six[:3], six[0].half(), u), (*six, u.half())):
        with pytest.raises((RuntimeError, TypeError, ValueError)):
            ops.bi_wkv6_forward(*wrong, False)
    for grad in (six[0][:, :5], six[0].half()):
        with pytest.raises(RuntimeError):
            ops.bi_wkv6_backward(grad, *six, u, False)
    value, places, weights = (
        x.to(backend.device) for x in deform().values() if not isinstance(x, list)
    )
    for wrong in (
        (value[0], [2, 3, 1, 1], places, weights),
        (value, [2, 3], places, weights),
        (value, [2, 3, 2, 1], places, weights),
        (value, [7, 1, 0, 1], places, weights),
        (value, [2**62 + 1, 4, 3, 1], places, weights),  # 7 values in 64 bits
        (value, [2, 3, 1, 1], places[..., 0], weights),
        (value, [2, 3, 1, 1], places, weights[..., :5]),
        (value, [2, 3, 1, 1], places.half(), weights.half()),
        (value, [2, 3, 1, 1], places, weights.double()),
    ):
        with pytest.raises(RuntimeError):
            ops.ms_deform_attn(*wrong)
    for grad in (torch.zeros(2, 5, 11), torch.zeros(2, 5, 12).half()):
        grad = grad.to(backend.device)
        with pytest.raises(RuntimeError):
            ops.ms_deform_attn_backward(grad, value, [2, 3, 1, 1], places, weights)
