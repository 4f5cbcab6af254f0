"""Mixed precision on a CPU."""

import pytest
import torch
from torch import nn

from vrwkv.engine import CPUAmpOptimWrapper, cli


def wrapper_of(model):
    return CPUAmpOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def test_forward_is_bfloat16_and_weights_stay_float32():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before, bias = model.weight.detach().clone(), model.bias.detach().clone()
    wrapper = wrapper_of(model)
    with wrapper.optim_context(model):
        output = model(torch.ones(4, 3))
    assert output.dtype == torch.bfloat16
    wrapper.update_params(output.float().square().mean())
    assert model.weight.dtype == torch.float32
    # By hand: the mean of 4 x 2 squares of y, at inputs of 1, has gradient y for each weight of an
    # output. bfloat16 keeps 8 bits, and rounds y, the incoming gradient and the sum of 4.
    y = (before.sum(1) + bias)[:, None].expand(2, 3)
    torch.testing.assert_close(model.weight.data, before - 0.1 * y, rtol=0, atol=0.1 * 3 * 2**-8)


@pytest.mark.parametrize(
    'operator',
    [
        lambda x: torch.bincount(x[0]),  # not implemented
        lambda x: x.numpy(),  # numpy has no such type
        lambda x: torch.zeros(3, 3).index_put_((torch.tensor([0]),), x[:1]),  # types must be equal
    ],
)
def test_an_operator_that_cannot(operator):
    model = nn.Linear(3, 3)
    with (
        pytest.raises(
            RuntimeError,
            match=r'(?is)cannot run in mixed precision on a CPU: .*bfloat16.*without --amp',
        ),
        wrapper_of(model).optim_context(model),
    ):
        operator(model(torch.ones(3, 3)).detach())


def test_other_errors_pass():
    model = nn.Linear(3, 3)
    context = wrapper_of(model).optim_context(model)
    with pytest.raises(RuntimeError, match='shapes cannot be multiplied') as caught, context:
        model(torch.ones(3, 4))
    assert 'mixed precision' not in str(caught.value)


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("no kernel for 'BFloat16'")


def test_an_operator_that_cannot_backward():
    model = nn.Linear(3, 3)
    wrapper = wrapper_of(model)
    with wrapper.optim_context(model):
        loss = NoBackward.apply(model(torch.ones(3, 3))).sum()
    with pytest.raises(RuntimeError, match='cannot run in mixed precision on a CPU'):
        wrapper.update_params(loss)


def test_training(toy_config, load, tmp_path):
    changes = 'randomness = dict(seed=0)\ntrain_cfg = dict(by_epoch=True, max_epochs=2)'
    final = []
    for name, options in (('float32', []), ('bfloat16', ['--amp'])):
        cli.train([str(toy_config(name, changes)), '--work-dir', str(tmp_path / name), *options])
        final.append(load(tmp_path / name / 'epoch_2.pth')['state_dict'])
    assert final[1]['head.weight'].dtype == torch.float32
    difference = (final[0]['head.weight'] - final[1]['head.weight']).abs().max()
    assert 0 < difference < 0.2  # it was mixed, and it did train
    scores = [path.name for path in tmp_path.glob('bfloat16/best_*')]
    assert len(scores) == 1
