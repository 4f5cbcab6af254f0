"""Times the operators of vrwkv_ops: forward, and forward with backward, from 224 to 2048 pixels.

Every kernel is first held against float64 on the same inputs; a wrong one is refused, and no time
of it is printed. On a GPU a time is the replay of a CUDA graph, with the time from Python beside
it. Yardsticks are PyTorch's scaled_dot_product_attention over the same tokens and channels,
torch.exp over the same elements, and a copy's bandwidth. Exits with 1 if one was refused.

  python vrwkv_ops/benchmarks/operators.py --resolutions 224 1024
  python vrwkv_ops/benchmarks/operators.py --elements 33554432 --heads 0     # a whole GPU
  python vrwkv_ops/benchmarks/operators.py --peer mine=my_kernel.py:bi_wkv
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vrwkv_ops import (
    bi_wkv,
    bi_wkv6,
    deform,
    ms_deform_attn,
    pointwise,
    scan,
    shift,
    sigmoid_gate,
    squared_relu,
    token_shift,
    wkv6,
)
from vrwkv_ops.benchmarking import (
    DTYPES,
    ArgumentParser,
    copy_bandwidth,
    describe_environment,
    keep_freed_memory,
    markdown_table,
    positive_int,
    replay,
    time_calls,
    write_json,
)
from vrwkv_ops.checks import MAX_HEAD

PATCH = 16
OURS = {
    *('bi_wkv', 'token_shift', 'sigmoid_gate', 'squared_relu', 'attention', 'exp'),
    *('bi_wkv6', 'ms_deform_attn', 'mmcv_deform_attn'),
}
PATIENCE = 5.0  # seconds that a call may take to be measured more than once


@dataclass
class Row:
    """One line of the results.

    Attributes:
        dtype: Of k, v or x.
        resolution: Side of the images in pixels.
        batch: B.
        tokens: T.
        kernel: Which.
        direction: ``'forward'`` or ``'forward+backward'``.
        error: Largest relative error of a result against float64 (norm over norm); None for
            yardsticks.
        seconds: Median of a call, on a GPU of its kernels alone; None if the kernel was refused.
        eager_seconds: On a GPU, median of a call from Python.
        bytes: What it must read and write at the least; None where that says nothing.
        refused: Why no time is given.
    """

    dtype: str
    resolution: int
    batch: int
    tokens: int
    kernel: str
    direction: str
    error: float | None = None
    seconds: float | None = None
    eager_seconds: float | None = None
    bytes: int | None = None
    refused: str = ''


@dataclass
class Kernel:
    """A function of tensors to measure.

    Attributes:
        function: From inputs to one tensor or several.
        inputs: Its tensors, which all take part in the backward pass.
        bytes: Least traffic of the forward pass, and of forward and backward.
        truth: Results, then gradients of the inputs under ``grads``, in float64; None for a
            yardstick.
        grads: Gradients of the results.
    """

    function: Callable
    inputs: list[Tensor]
    bytes: tuple[int | None, int | None]
    truth: list[Tensor] | None
    grads: list[Tensor]

    def forward(self) -> list[Tensor]:
        """Results, without a graph."""
        with torch.no_grad():
            return as_list(self.function(*self.inputs))

    def forward_backward(self) -> list[Tensor]:
        """Results and gradients of the inputs."""
        leaves = [x.detach().requires_grad_() for x in self.inputs]
        results = as_list(self.function(*leaves))
        return [*results, *torch.autograd.grad(results, leaves, self.grads)]


def as_list(x: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """One result or several as a list."""
    return [x] if isinstance(x, Tensor) else list(x)


def error_of(got: list[Tensor], truth: list[Tensor]) -> tuple[float, str]:
    """Largest relative error, and why it is too large, if so.

    The bar: 1e-5 in float32; half types one rounding of the float64 result and 3e-5 (the outputs
    that are saved for a backward pass have 16 bits in bfloat16), as in tests/ops.
    """
    worst = 0.0
    for x, expected in zip(got, truth, strict=True):
        if x.shape != expected.shape:
            return worst, f'result of shape {tuple(x.shape)} in place of {tuple(expected.shape)}'
        norm = expected.norm().clamp_min(torch.finfo(torch.float64).tiny)
        error = ((x.double() - expected).norm() / norm).item()
        rounding = ((expected.to(x.dtype).double() - expected).norm() / norm).item()
        half = torch.finfo(got[0].dtype).bits == 16
        bar = 1.001 * rounding + (3e-5 if half else 1e-5)
        worst = max(worst, error)
        if not error <= bar:  # NaN is wrong, too
            return error, f'wrong: relative error {error:.1e}, at most {bar:.1e} is right'
    return worst, ''


def make_kernels(
    args: argparse.Namespace, dtype: torch.dtype, resolution: int
) -> dict[str, Kernel]:
    """All that is measured at one resolution."""
    side = resolution // PATCH
    tokens, channels = side * side, args.channels
    batch = max(args.batch_size, math.ceil(args.elements / (tokens * channels)))
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int, limit: float = 1.0) -> Tensor:
        x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (x * limit).to(args.device)

    # Decays and keys as in a model that is being trained; |w| T up to 8.
    w, u = (uniform(channels, limit=limit).float() for limit in (8 / tokens, 1))
    k, v, gy = (uniform(batch, tokens, channels, limit=3).to(dtype) for _ in range(3))
    size, count = k.element_size(), k.numel()
    saved = 4 + (size if size == 2 else 0)  # z, and y's residual in half types

    wide = [x.double() for x in (w, u, k, v)]
    y, z = scan.forward(*wide, False)
    wkv_truth = [y, *scan.backward(gy.double(), *wide, y, z, False)]
    wkv_bytes = (3 * size * count, (3 * size + saved) * count + (6 * size + saved) * count)
    kernels = {'bi_wkv': Kernel(bi_wkv, [w, u, k, v], wkv_bytes, wkv_truth, [gy])}
    for peer in args.peer:
        kernels[peer.name] = Kernel(peer.function, [w, u, k, v], wkv_bytes, wkv_truth, [gy])

    mixes = uniform(3, channels).float().abs()
    grads = [k, v, gy]
    grid = (side, side, 1, 1 / 4, 'q_shift')
    x = v
    shift_truth = [
        *shift.forward(x.double(), mixes.double(), *grid),
        *shift.backward([g.double() for g in grads], x.double(), mixes.double(), *grid),
    ]
    kernels['token_shift'] = Kernel(
        functools.partial(token_shift, resolution=(side, side)),
        [x, mixes],
        (4 * size * count, 4 * size * count + 5 * size * count),
        shift_truth,
        grads,
    )
    r, g = k.double(), gy.double()
    kernels['sigmoid_gate'] = Kernel(
        sigmoid_gate,
        [k, v],
        (3 * size * count, 8 * size * count),
        [torch.sigmoid(r) * v.double(), *pointwise.sigmoid_gate_backward(g, r, v.double())],
        [gy],
    )
    kernels['squared_relu'] = Kernel(
        squared_relu,
        [k],
        (2 * size * count, 5 * size * count),
        [r.clamp(min=0).square(), 2 * g * r.clamp(min=0)],
        [gy],
    )
    if args.heads:
        heads = [t.unflatten(2, (args.heads, -1)).transpose(1, 2) for t in (k, v, gy)]
        kernels['attention'] = Kernel(
            F.scaled_dot_product_attention,
            [heads[0], heads[0] / 2, heads[1]],
            (None, None),
            None,
            [heads[2]],
        )
        size_of_head = channels // args.heads
        if size_of_head % 8 == 0 and size_of_head <= MAX_HEAD:
            # Decays as at the start of a training.
            decays = (uniform(batch, tokens, channels, limit=2.5) - 3.5).float()
            inputs = [k, v / 2, v, decays, uniform(args.heads, size_of_head).float()]
            wide = [x.double() for x in inputs]
            kernels['bi_wkv6'] = Kernel(
                bi_wkv6,
                inputs,
                ((4 * size + 4) * count, (4 * size + 4 + 7 * size + 8) * count),
                [wkv6.forward(*wide, False), *wkv6.backward(gy.double(), *wide, False)],
                [gy],
            )
    kernels['exp'] = Kernel(torch.exp, [k], (2 * size * count, 5 * size * count), None, [gy])
    return kernels


def deformable_kernels(
    args: argparse.Namespace, dtype: torch.dtype, resolution: int, batch: int
) -> dict[str, Kernel]:
    """Deformable attention as in the adapter's injectors, and mmcv's PyTorch function.

    All tokens sample three maps with six heads and four points.
    """
    side, channels = resolution // PATCH, args.channels
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        x = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        return x.to(args.device)

    shapes = [(2 * side, 2 * side), (side, side), (max(1, side // 2),) * 2]
    samples = (batch, side * side, 6, 3, 4)
    value = uniform(batch, sum(h * w for h, w in shapes), 6, channels // 6).to(dtype)
    # Gradients of places jump from pixel to pixel: keep half a step of 1/4096 away from centres.
    places = (((uniform(*samples, 2) + 1) * 2048).floor() + 0.5) / 4096
    points = [places.float(), uniform(*samples).float()]
    grad = uniform(batch, side * side, channels).to(dtype)
    wide = [value.double(), [n for shape in shapes for n in shape], *(x.double() for x in points)]
    truth = [deform.forward(*wide), *deform.backward(grad.double(), *wide)]
    size, read = value.element_size(), 4 * sum(x.numel() for x in points)
    forward = size * (value.numel() + grad.numel()) + read
    traffic = (forward, 2 * forward + size * value.numel() + read)

    def ours(value, places, weights):
        return ms_deform_attn(value, shapes, places, weights)

    kernels = {'ms_deform_attn': Kernel(ours, [value, *points], traffic, truth, [grad])}
    try:
        from vrwkv.mmcv_ops import serve_mmcv_ops

        serve_mmcv_ops()
        from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
    except ImportError:
        return kernels

    def theirs(value, places, weights):
        return multi_scale_deformable_attn_pytorch(value, shapes, places, weights)

    if dtype == torch.float32:  # it rounds the places to half types
        kernels['mmcv_deform_attn'] = Kernel(theirs, [value, *points], traffic, truth, [grad])
    return kernels


def measure(args: argparse.Namespace, dtype: torch.dtype, resolution: int) -> list[Row]:
    """All rows of one resolution, the kernels checked before they are timed."""
    kernels = make_kernels(args, dtype, resolution)
    batch, tokens, _ = kernels['bi_wkv'].inputs[2].shape
    if args.deformable:
        kernels |= deformable_kernels(args, dtype, resolution, batch)
    rows = []
    for index, direction in enumerate(('forward', 'forward+backward')):
        calls = {}
        for name, kernel in kernels.items():
            call = kernel.forward_backward if index else kernel.forward
            row = Row(
                str(dtype).removeprefix('torch.'),
                resolution,
                batch,
                tokens,
                name,
                direction,
                bytes=kernel.bytes[index],
            )
            rows.append(row)
            try:
                results = call()
                if kernel.truth is not None:
                    truth = kernel.truth if index else kernel.truth[: len(results)]
                    row.error, row.refused = error_of(results, truth)
            # Out of memory, and whatever a peer does.
            except Exception as error:
                row.refused = f'failed: {type(error).__name__}: {error}'.splitlines()[0][:120]
            if not row.refused:
                calls[name] = call
        on_gpu = args.device.type == 'cuda'
        graphs = replays(calls, args.device) if on_gpu else {}
        eager, replayed = (
            time_calls(each, args.device, args.repeats, PATIENCE) for each in (calls, graphs)
        )
        for row in rows:
            if row.direction == direction and row.kernel in calls:
                row.seconds = replayed.get(row.kernel, eager[row.kernel])
                row.eager_seconds = eager[row.kernel] if on_gpu else None
    return rows


def replays(calls: dict[str, Callable], device: torch.device) -> dict[str, Callable]:
    """Replays of the calls that a CUDA graph can hold."""
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = replay(call, device)
        except RuntimeError as error:
            print(f'{name} is timed from Python, no CUDA graph holds it: {error}')
    return graphs


def table(rows: list[Row], bandwidth: float) -> str:
    """Rows for people."""
    attention = {
        (r.dtype, r.resolution, r.direction): r.seconds for r in rows if r.kernel == 'attention'
    }
    on_gpu = any(r.eager_seconds is not None for r in rows)
    cells = []
    for r in rows:
        line = [*map(str, (r.dtype, r.resolution, r.batch, r.tokens)), r.kernel, r.direction]
        line.append('' if r.error is None else f'{r.error:.0e}')
        if r.seconds is None:
            cells.append([*line, r.refused, *[''] * (3 if on_gpu else 2)])
            continue
        share = '' if r.bytes is None else f'{r.bytes / r.seconds / bandwidth:.0%}'
        yardstick = attention.get((r.dtype, r.resolution, r.direction))
        gain = '' if yardstick is None else f'{yardstick / r.seconds:.3g}'
        eager = [f'{r.eager_seconds * 1e3:.3f}'] if on_gpu else []
        cells.append([*line, f'{r.seconds * 1e3:.3f}', *eager, share, gain])
    header = (
        'dtype',
        'pixels',
        'B',
        'T',
        'kernel',
        'pass',
        'error',
        'ms',
        *(['eager ms'] if on_gpu else []),
        'of copy',
        'x attention',
    )
    return markdown_table(header, cells)


def plot(rows: list[Row], title: str, path) -> None:
    """Time over resolution, a panel for each pass and dtype."""
    try:
        import matplotlib as mpl
    except ImportError:
        print("No plot: matplotlib is not installed ('pip install matplotlib')")
        return
    mpl.use('Agg')
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys((r.dtype, r.direction) for r in rows))
    figure, axes = plt.subplots(
        *(1, len(panels)),
        figsize=(4.6 * len(panels), 4.4),
        sharey=True,
        squeeze=False,
        layout='constrained',
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        for index, name in enumerate(dict.fromkeys(r.kernel for r in rows)):
            points = [
                (r.resolution, r.seconds * 1e3)
                for r in rows
                if (r.dtype, r.direction, r.kernel) == (*panel, name) and r.seconds is not None
            ]
            if points:
                style = '--' if name in ('attention', 'exp') else '-'
                axis.loglog(
                    *zip(*points, strict=True),
                    style,
                    color=f'C{index}',
                    marker='o',
                    ms=3,
                    label=name,
                )
        resolutions = sorted({r.resolution for r in rows})
        axis.set_xticks(resolutions, [str(x) for x in resolutions], rotation=45)
        axis.minorticks_off()
        axis.set(title=f'{panel[0]}, {panel[1]}', xlabel='side of the image (pixels)')
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel('time (ms)')
    axes[0][0].legend()
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, bbox_inches='tight')
    plt.close(figure)
    print(f'Wrote {path}')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = ArgumentParser(__doc__, 'benchmarks', OURS)
    parser.add_argument(
        '--dtype',
        choices=DTYPES,
        nargs='+',
        help='of k, v and x (default: float32, and bfloat16 on a GPU)',
    )
    parser.add_argument(
        '--elements',
        type=int,
        default=0,
        help='at least so many in k: the batch of each resolution is as large as that takes',
    )
    parser.add_argument('--channels', type=positive_int, default=192, help='C (default: 192)')
    parser.add_argument(
        '--heads',
        type=int,
        default=3,
        help='of the attention, and of Bi-WKV6 if each has 8 to 64 channels in steps of 8; '
        '0: leave both out (default: 3)',
    )
    parser.add_argument(
        '--deformable',
        action='store_true',
        help="deformable attention of the adapter too, beside mmcv's PyTorch function",
    )
    args = parser.parse_args(argv)
    args.dtype = args.dtype or ['float32', *(['bfloat16'] if args.device.type == 'cuda' else [])]
    if args.heads < 0 or (args.heads and args.channels % args.heads):
        parser.error(f'--heads must divide --channels {args.channels}, got {args.heads}')
    if args.channels < 4:
        parser.error(
            f'--channels must be at least 4 (Q-Shift has four groups), got {args.channels}'
        )
    if args.deformable and args.channels % 6:
        parser.error(f'--deformable has six heads, which must divide --channels {args.channels}')
    if min(args.resolutions) < PATCH:
        parser.error(f'--resolutions start at {PATCH} (a patch), got {min(args.resolutions)}')
    return args


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and writes the results; returns the exit status."""
    args = parse_args(argv)
    facts = describe_environment(args.device)
    for name, value in facts.items():
        print(f'{name}: {value}')
    bandwidth = copy_bandwidth(args.device, args.repeats)
    print(f'a copy reads and writes {bandwidth / 1e9:.1f} GB/s\n')
    rows = []
    for dtype, resolution in itertools.product(args.dtype, args.resolutions):
        rows += measure(args, DTYPES[dtype], resolution)
    print(table(rows, bandwidth) + '\n')
    settings = {
        name: getattr(args, name)
        for name in ('batch_size', 'elements', 'channels', 'heads', 'repeats')
    }
    results = args.out / 'operators.json'
    content = dict(settings=settings, copy_bytes_per_second=bandwidth, rows=list(map(asdict, rows)))
    write_json(results, dict(environment=facts, **content))
    print(f'Wrote {results}')
    amount = f'{args.elements:,} elements' if args.elements else f'{args.batch_size} image(s)'
    title = f'{amount}, {args.channels} channels, {facts["device"]}'
    plot(rows, title, args.out / 'operators.png')
    refused = {r.kernel: r.refused for r in rows if r.refused}
    for name, why in refused.items():
        print(f'No time for {name}: {why}', file=sys.stderr)
    return 1 if refused else 0


if __name__ == '__main__':
    keep_freed_memory()
    sys.exit(main())
