"""Tests of what training keeps: cheap results are computed again in the backward pass."""

import gc

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vrwkv.backbones import VRWKV, VRWKV6, ViT
from vrwkv.layers import recompute
from vrwkv_ops import squared_relu

SMALL = dict(img_size=64, embed_dims=32, depth=2)


def gradients(model, images, dtype=None):
    model.zero_grad()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        loss = model(images)[0].float().square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=pytest.mark.cuda)])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize(
    ('cls', 'options'),
    [
        (VRWKV, {}),
        (VRWKV, dict(key_norm=True, init_values=0.5)),
        (VRWKV, dict(post_norm=True, shift_mode='none')),
        (VRWKV6, dict(num_heads=4)),
    ],
)
def test_recomputation_gives_the_same_bits(cls, options, dtype, device, monkeypatch):
    """On a GPU, autograd calls functions again in a thread of its own."""
    monkeypatch.setattr(torch.backends.cudnn, 'deterministic', True)
    torch.manual_seed(0)
    model, images = cls(**SMALL, **options).to(device), torch.randn(2, 3, 64, 64, device=device)
    ours = gradients(model, images, dtype)
    monkeypatch.setattr(recompute, '_hooks_are_free', lambda: False)
    for x, expected in zip(ours, gradients(model, images, dtype), strict=True):
        assert torch.equal(x, expected)


def bytes_kept(cls, depth, **options):
    """Count the bytes that the CPU's allocator holds after a forward pass."""
    model = cls(img_size=128, embed_dims=64, depth=depth, **options)
    images = torch.randn(2, 3, 128, 128)
    gc.collect()  # A cycle of an earlier model that dies while we measure would count as negative.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        output = model(images)  # noqa: F841 (keeps the graph)
    events = profiler.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events if event.name() == '[memory]')


def test_a_layer_keeps_thirteen_times_its_tokens_and_deit_sixteen():
    """VRWKV: twice x, k, v, y and its denominator, receptance of both, hidden (4), value."""
    tokens = 2 * 8 * 8 * 64 * 4

    def per_layer(cls, **options):
        difference = bytes_kept(cls, 3, **options) - bytes_kept(cls, 1, **options)
        return difference / 2 / tokens

    # Means and deviations of the norms, decays and mixes take the rest.
    assert 13 <= per_layer(VRWKV) < 13.5
    assert per_layer(ViT, num_heads=1) >= 16


def test_backward_passes_can_be_repeated_and_weights_must_not_change_before():
    torch.manual_seed(0)
    model, images = VRWKV(**SMALL), torch.randn(1, 3, 64, 64)
    loss = model(images)[0].square().sum()
    first, second = (
        torch.autograd.grad(loss, model.parameters(), retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    for weight in ('ffn.value.weight', 'att.spatial_mix_k'):
        loss = model(images)[0].square().sum()
        with torch.no_grad():
            model.layers[0].get_parameter(weight).mul_(2)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            loss.backward()


@pytest.mark.parametrize('change', ['another module', 'a hook'])
def test_a_changed_norm_layer_runs_once(change, monkeypatch):
    """A second run could draw other random numbers."""
    torch.manual_seed(0)
    model, images = VRWKV(**SMALL), torch.randn(1, 3, 64, 64)
    norm = model.layers[0].ln1
    if change == 'a hook':
        norm.register_forward_hook(lambda module, inputs, output: torch.dropout(output, 0.5, True))
    else:
        model.layers[0].ln1 = nn.Sequential(norm, nn.Dropout(0.5))
    torch.manual_seed(1)
    ours = gradients(model, images)
    monkeypatch.setattr(recompute, '_hooks_are_free', lambda: False)
    torch.manual_seed(1)
    assert all(map(torch.equal, ours, gradients(model, images)))


def test_a_tensor_with_the_memory_of_a_result_that_is_gone_is_not_taken_for_it():
    x, other = torch.randn(3, requires_grad=True), torch.randn(3)
    calls = recompute.Recompute(x)
    gone = recompute._storage(calls.cheap(squared_relu, x))
    calls.known[recompute._storage(other)] = calls.known[gone]
    with torch.autograd.graph.saved_tensors_hooks(calls._pack, recompute._unpack):
        product = (x * other).sum()
    assert torch.equal(torch.autograd.grad(product, x)[0], other)
