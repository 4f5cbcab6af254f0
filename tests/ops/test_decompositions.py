"""The operators in PyTorch's own operators, against a dense float64 formula and our kernels."""

import math

import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim

import vrwkv_ops
from vrwkv_ops.decomposition import decompositions
from vrwkv_ops.reference import bi_wkv6_reference

from .dense_bi_wkv import dense_bi_wkv


class BiWKV(nn.Module):
    def __init__(self, causal=False):
        super().__init__()
        self.causal = causal

    def forward(self, w, u, k, v):
        return vrwkv_ops.bi_wkv(w, u, k, v, causal=self.causal)


def export(module, inputs, dynamic_shapes=None, **kwargs):
    with torch.no_grad():
        program = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes)
        return program.run_decompositions(decompositions(**kwargs))


def operators(program):
    return [str(node.target) for node in program.graph.nodes if node.op == 'call_function']


def problem(tokens, decay, seed=0):
    """Both signs of decay; the largest reaches ``decay`` over the tokens."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(2, tokens, 16, generator=generator) for _ in range(2))
    return (
        torch.linspace(-1, 1, 16) * decay / tokens,
        torch.randn(16, generator=generator),
        2 * k,
        v,
    )


@pytest.mark.parametrize(
    ('form', 'chunk', 'limit', 'causal'),
    [
        ('cumsum', 1, 40, False),
        ('blocked', 1, 40, False),
        ('chunked', 16, 900, False),
        ('chunked', 4, 3000, False),
        ('auto', 16, 900, True),  # chunks
    ],
)
def test_forms_against_the_dense_formula(form, chunk, limit, causal):
    """One graph of symbolic T, in PyTorch and ONNX Runtime; decays up to what the docs promise."""
    dims = dict(w=None, u=None, k={1: Dim('T', min=2)}, v={1: Dim('T', min=2)})
    program = export(BiWKV(causal), problem(50, 1), dims, form=form, chunk=chunk)
    assert not any('vrwkv_ops' in name for name in operators(program))
    module = program.module()
    file = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for tokens in (9, 196, 250, 500):
        for decay in (d for d in (0, 5, 40, 150, 900, 3000) if d <= limit):
            if tokens == 9 and decay > 40:  # the decay over a chunk would be too large
                continue
            inputs = dict(zip('wukv', problem(tokens, decay, seed=decay), strict=True))
            expected = dense_bi_wkv(**inputs, causal=causal)
            (in_onnx,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
            for found in (module(*inputs.values()), torch.from_numpy(in_onnx)):
                error = (found - expected).abs().max() / expected.abs().max()
                # The rounding of float32 exponents of up to 40: 40 * 2^-24 = 2e-6, a few times.
                assert error <= 1e-5, (tokens, decay, error)


@pytest.mark.parametrize(
    ('form', 'causal'), [('cumsum', False), ('blocked', False), ('chunked', False), ('auto', True)]
)
def test_a_key_of_minus_infinity_hides_its_token(form, causal):
    """Whole chunks of them, too."""
    inputs = problem(80, 5)
    inputs[2][:, 40:] = -math.inf
    found = export(BiWKV(causal), inputs, form=form, chunk=16).module()(*inputs)
    expected = dense_bi_wkv(*inputs, causal=causal)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('form', ['cumsum', 'blocked'])
def test_one_frame_is_not_causal(form):
    with pytest.raises(ValueError, match="use form='chunked'"):
        export(BiWKV(causal=True), problem(9, 1), form=form)


@pytest.mark.parametrize('form', ['cumsum', 'blocked', 'chunked'])
def test_number_of_operators_does_not_depend_on_tokens(form):
    counts = {len(operators(export(BiWKV(), problem(t, 1), form=form))) for t in (64, 200, 1000)}
    assert len(counts) == 1


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_dtypes(dtype):
    w, u, k, v = problem(100, 5)
    k, v = k.to(dtype), v.to(dtype)
    found = export(BiWKV(), (w, u, k, v)).module()(w, u, k, v)
    assert found.dtype == dtype
    bar = 1e-12 if dtype == torch.float64 else 2**-8  # rounding of the result
    w, u = w.to(torch.promote_types(dtype, torch.float32)), u
    expected = dense_bi_wkv(w, u, k, v)
    assert (found.double() - expected).abs().max() <= bar * expected.abs().max()


class BiWKV6(nn.Module):
    def __init__(self, causal):
        super().__init__()
        self.causal = causal

    def forward(self, r, k, v, w, u):
        return vrwkv_ops.bi_wkv6(r, k, v, w, u, causal=self.causal)


@pytest.mark.parametrize('causal', [False, True])
def test_bi_wkv6_at_every_decay(causal):
    """One graph of symbolic T, in PyTorch and ONNX Runtime, against the loop in float64."""
    generator = torch.Generator().manual_seed(0)

    def inputs(tokens, mean):
        r, k, v, w = (torch.randn(1, tokens, 16, generator=generator) for _ in range(4))
        return r, k, v, w + mean, torch.randn(2, 8, generator=generator)

    dims = {name: {1: Dim('T', min=2)} for name in 'rkvw'} | dict(u=None)
    program = export(BiWKV6(causal), inputs(50, 0), dims)
    assert not any('vrwkv_ops' in name for name in operators(program))
    module = program.module()
    file = torch.onnx.export(program, dynamo=True, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    for tokens, mean in ((2, 0), (40, -20), (48, -3), (70, 0), (70, 3), (70, 90)):
        values = inputs(tokens, mean)
        expected = bi_wkv6_reference(*(x.double() for x in values), causal=causal)
        names = dict(zip('rkvwu', (x.numpy() for x in values), strict=True))
        for found in (module(*values), torch.from_numpy(session.run(None, names)[0])):
            error = (found - expected).abs().max() / expected.abs().max()
            assert error <= 2e-6, (tokens, mean, error)  # a few roundings of float32


class Shifts(nn.Module):
    def __init__(self, mode, pixel, gamma, heads):
        super().__init__()
        self.arguments = dict(shift_pixel=pixel, channel_gamma=gamma, heads=heads)
        self.mode = mode

    def forward(self, x, mixes):
        grid = (5, 7)
        shifted = vrwkv_ops.q_shift(x, grid, **self.arguments)
        return shifted, *vrwkv_ops.token_shift(x, mixes, grid, mode=self.mode, **self.arguments)


@pytest.mark.parametrize('mode', ['q_shift', 'single_shift', 'double_shift'])
@pytest.mark.parametrize(
    ('pixel', 'gamma', 'heads'),
    [(1, 1 / 4, 1), (2, 1 / 5, 1), (0, 1 / 4, 1), (9, 1 / 4, 1), (1, 1 / 4, 3)],
)
def test_shifts_equal_the_operators(mode, pixel, gamma, heads):
    torch.manual_seed(0)
    x, mixes = torch.randn(2, 35, 18), torch.rand(3, 18)
    module = Shifts(mode, pixel, gamma, heads)
    program = export(module, (x, mixes))
    assert not any('vrwkv_ops' in name for name in operators(program))
    for found, expected in zip(program.module()(x, mixes), module(x, mixes), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


class Deformable(nn.Module):
    def forward(self, value, locations, weights):
        return vrwkv_ops.ms_deform_attn(value, [(3, 4), (1, 1), (2, 2)], locations, weights)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_deformable_attention(dtype):
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(2, 17, 3, 4, generator=generator).to(dtype)
    locations = torch.rand(2, 6, 3, 3, 2, 2, generator=generator) * 1.4 - 0.2
    inputs = (value, locations, torch.randn(2, 6, 3, 3, 2, generator=generator))
    program = export(Deformable(), inputs)
    assert not any('vrwkv_ops' in name for name in operators(program))
    found, expected = program.module()(*inputs), Deformable()(*inputs)
    # Float32 sums in another order, then at most one more rounding of the result.
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-5)


def test_wrong_calls():
    with pytest.raises(ValueError, match='form must be one of auto, cumsum'):
        decompositions('scan')
    with pytest.raises(ValueError, match='chunk must be at least 1, got 0'):
        decompositions(chunk=0)
    table = decompositions()
    forward = table[torch.ops.vrwkv_ops.bi_wkv_forward.default]
    with pytest.raises(ValueError, match=r'export it under torch\.no_grad'):
        forward(*problem(9, 1), False, save=True)
