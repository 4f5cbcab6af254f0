"""The table of operators, for the tests that all of them share: test_operators.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .dense_bi_wkv import dense_bi_wkv
from .dense_bi_wkv6 import dense_bi_wkv6

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
HALF = [torch.float16, torch.bfloat16]


@dataclass(frozen=True)
class Operator:
    """An operator, or one mode of it.

    Attributes:
        name: Its public function.
        inputs: Makes float64 inputs by name, in the schema's order, from ``normal(*shape)``, which
            draws a tensor, and a shape (B, T, C).
        truth: The definition in PyTorch, for float64 and differentiable by autograd.
        options: Keyword arguments of the function and the truth.
        parameters: Inputs that kernels take in the accumulation dtype.
        bars: Largest relative error (norm over norm) on top of one rounding, in float64, in the
            others, and for ``less_exact`` results in half types.
        less_exact: Results that kernels compute from rounded ones: 'y0', 'y1', ..., 'gw', ...
        is_linear: Whether its gradient is differentiable.
        shape: A typical (B, T, C).
    """

    name: str
    inputs: Callable[..., dict[str, Tensor]]
    truth: Callable[..., Tensor | list[Tensor]]
    options: dict = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    bars: tuple[float, float, float] = (1e-14, 1e-6, 1e-6)
    less_exact: tuple[str, ...] = ()
    is_linear: bool = False
    shape: tuple[int, int, int] = (2, 15, 10)

    def make(
        self, shape: tuple[int, ...] | None = None, dtype=torch.float32, device='cpu', **options
    ) -> 'Call':
        """A call with random inputs, and gradients of its results."""
        shape = self.shape if shape is None else shape
        generator = torch.Generator().manual_seed(sum(shape))

        def normal(*sizes):
            return torch.randn(sizes, generator=generator, dtype=torch.float64)

        options = {**self.options, **options}
        wide = self.inputs(normal, *shape)
        results = as_list(self.truth(**{n: x.to('meta') for n, x in wide.items()}, **options))
        accumulation = torch.float64 if dtype == torch.float64 else torch.float32
        inputs = {
            name: x.to(device, accumulation if name in self.parameters else dtype)
            for name, x in wide.items()
        }
        grads = [normal(*x.shape).to(device, dtype) for x in results]
        return Call(self, inputs, grads, options, key=(shape, dtype, device, *options.items()))


_TRUTHS = {}


@dataclass
class Call:
    """Arguments of an operator, and gradients of its results.

    A call with a key has its truth computed once for all backends.
    """

    operator: Operator
    inputs: dict[str, Tensor]
    grads: list[Tensor]
    options: dict
    key: tuple | None = None

    def run(self, backend) -> list[Tensor]:
        """Results, and gradients of all inputs."""
        return self._run(backend.function(self.operator.name), self.inputs, self.grads)

    def truth(self) -> list[Tensor]:
        """The same in float64."""
        key = self.key and (self.operator.name, *self.key)
        if key is None or key not in _TRUTHS:
            inputs = {name: x.double() for name, x in self.inputs.items()}
            truth = self._run(self.operator.truth, inputs, [x.double() for x in self.grads])
            if key is None:
                return truth
            _TRUTHS[key] = truth
        return _TRUTHS[key]

    def _run(self, function, inputs, grads):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        results = as_list(function(**leaves, **self.options))
        gradients = torch.autograd.grad(
            results, list(leaves.values()), grads, materialize_grads=True
        )
        return [*(x.detach() for x in results), *gradients]

    def map(self, function: Callable[[Tensor], Tensor]) -> 'Call':
        """The same call with other tensors; parameters stay."""
        inputs = {
            name: x if name in self.operator.parameters else function(x)
            for name, x in self.inputs.items()
        }
        return Call(self.operator, inputs, list(map(function, self.grads)), self.options)

    def names(self) -> list[str]:
        """Names of what :meth:`run` returns."""
        return [*(f'y{i}' for i in range(len(self.grads))), *(f'g{name}' for name in self.inputs)]

    def check(self, results: Sequence[Tensor]) -> None:
        """Holds results to one rounding of the truth and the operator's bars."""
        for name, got, expected in zip(self.names(), results, self.truth(), strict=True):
            dtype = self.inputs.get(name[1:], self.grads[0]).dtype
            assert got.dtype == dtype and got.shape == expected.shape and got.is_contiguous(), name
            exact, bar, half_bar = self.operator.bars
            if got.dtype == torch.float64:
                bar = exact
            elif self.grads[0].dtype in HALF and name in self.operator.less_exact:
                bar = half_bar
            rounding = (expected.to(got.dtype).double() - expected).norm()
            scale = expected.norm()
            if scale < 1e-6 * self.grads[0].double().norm():  # 0 in exact arithmetic
                scale = 0.1 * self.grads[0].double().norm()
            error = (got.double() - expected).norm()
            assert error <= 1.001 * rounding + bar * scale, (name, got.dtype, error / scale)


def as_list(results: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One result or several as a list."""
    return [results] if isinstance(results, Tensor) else list(results)


# --- Definitions ------------------------------------------------------------------------------


def _moved(x, height, width, step, gamma, mode):
    """A token shift as crops of a zero-padded image (paper section 3.3)."""
    image = x.unflatten(1, (height, width))
    padded = F.pad(image, (0, 0, step, step, step, step))
    left, right, above, below, here = (
        padded[:, row : row + height, column : column + width]
        for row, column in ((step, 0), (step, 2 * step), (0, step), (2 * step, step), (step, step))
    )
    if mode == 'single_shift':
        return left.flatten(1, 2)
    groups = [left, right] if mode == 'double_shift' else [left, right, above, below]
    ends = [int(x.shape[2] * gamma * n) for n in range(len(groups) + 1)]
    parts = [y[..., a:b] for y, a, b in zip(groups, ends, ends[1:], strict=False)]
    return torch.cat([*parts, here[..., ends[-1] :]], -1).flatten(1, 2)


def _q_shift(x, resolution, shift_pixel=1, channel_gamma=1 / 4):
    return _moved(x, *resolution, shift_pixel, channel_gamma, 'q_shift')


def _token_shift(x, mixes, resolution, shift_pixel=1, channel_gamma=1 / 4, mode='q_shift'):
    grid = resolution if mode == 'q_shift' else (1, x.shape[1])
    moved = _moved(x, *grid, shift_pixel, channel_gamma, mode)
    return [x * mix + moved * (1 - mix) for mix in mixes]


def _wkv_inputs(normal, batch, tokens, channels):
    w = torch.linspace(-8, 8, channels, dtype=torch.float64) / tokens
    k, v = 2 * normal(2, batch, tokens, channels)
    return dict(w=w, u=normal(channels), k=k.clamp(-8, 8), v=v)


def _wkv(causal: bool) -> Operator:
    return Operator(
        'bi_wkv',
        _wkv_inputs,
        dense_bi_wkv,
        dict(causal=causal),
        parameters=('w', 'u'),
        # Half types: y is kept for the gradients in two halves, which are 16 bits of bfloat16.
        bars=(1e-12, 1e-5, 3e-5),
        less_exact=('gw', 'gu', 'gk'),
        shape=(2, 9, 5),
    )


def _wkv6_inputs(normal, batch, tokens, channels):
    size = next(n for n in (64, 40, 32, 24, 8) if channels % n == 0)
    r, k, v, w = normal(4, batch, tokens, channels)
    return dict(r=r, k=k, v=v, w=2 * w - 2, u=normal(channels // size, size))


def _wkv6(causal: bool) -> Operator:
    return Operator(
        'bi_wkv6',
        _wkv6_inputs,
        dense_bi_wkv6,
        dict(causal=causal),
        parameters=('w', 'u'),
        bars=(1e-13, 1e-6, 1e-6),
        shape=(1, 3, 16),
    )


def _mixed(mode: str, count: int) -> Operator:
    return Operator(
        'token_shift',
        lambda normal, b, t, c: dict(x=normal(b, t, c), mixes=normal(count, c)),
        _token_shift,
        dict(resolution=(3, 5), mode=mode),
        parameters=('mixes',),
    )


def _ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights):
    """The definition by PyTorch's grid_sample; tests/tasks/test_mmcv_ops.py compares with mmcv."""
    batch, _, heads, channels = value.shape
    queries = sampling_locations.shape[1]
    total = start = 0
    for level, (height, width) in enumerate(spatial_shapes):
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1)
        maps = maps.reshape(batch * heads, channels, height, width)
        places = 2 * sampling_locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1
        samples = F.grid_sample(maps, places, align_corners=False)  # (B H, D, Q, P)
        weights = attention_weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        total = total + (samples * weights).sum(3)
        start += height * width
    return total.view(batch, heads, channels, queries).permute(0, 3, 1, 2).flatten(2)


def _deformable(shapes: tuple[tuple[int, int], ...], points: int, wide: bool = False) -> Operator:
    """Points inside, near the borders and outside; ``wide``: with points in float32."""
    levels, values = len(shapes), sum(height * width for height, width in shapes)

    def inputs(normal, batch, queries, channels):
        return dict(
            value=normal(batch, values, 2, channels),
            sampling_locations=0.5 + 0.4 * normal(batch, queries, 2, levels, points, 2),
            attention_weights=normal(batch, queries, 2, levels, points),
        )

    return Operator(
        'ms_deform_attn',
        inputs,
        _ms_deform_attn,
        dict(spatial_shapes=shapes),
        parameters=('sampling_locations', 'attention_weights') if wide else (),
        # A place within a map is right to a rounding of the map's size, and gradients of places
        # are differences of pixels.
        bars=(1e-13, 3e-6, 3e-6),
        shape=(2, 5, 3),
    )


OPERATORS = {
    'bi_wkv': _wkv(causal=False),
    'causal_bi_wkv': _wkv(causal=True),
    'bi_wkv6': _wkv6(causal=False),
    'causal_bi_wkv6': _wkv6(causal=True),
    'q_shift': Operator(
        'q_shift',
        lambda normal, *shape: dict(x=normal(*shape)),
        _q_shift,
        dict(resolution=(3, 5)),
        bars=(0, 0, 0),
        is_linear=True,
    ),
    'token_shift': _mixed('q_shift', 3),
    'single_shift': _mixed('single_shift', 1),
    'double_shift': _mixed('double_shift', 2),
    'squared_relu': Operator(
        'squared_relu',
        lambda normal, *shape: dict(x=4 * normal(*shape)),
        lambda x: x * x * (x > 0),
        bars=(1e-14, 5e-7, 5e-7),
    ),
    'sigmoid_gate': Operator(
        'sigmoid_gate',
        lambda normal, *shape: dict(r=4 * normal(*shape), x=normal(*shape)),
        lambda r, x: x / (1 + torch.exp(-r)),
        bars=(1e-14, 5e-7, 5e-7),
    ),
    'ms_deform_attn': _deformable(((4, 3), (1, 1), (2, 5)), points=2),
    'ms_deform_attn_float32_points': _deformable(((8, 4),), points=1, wide=True),
}
