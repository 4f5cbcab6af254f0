"""Measure time and memory of VRWKV and DeiT over resolutions, as in the paper's figures 1 and 3.

DeiT runs with plain attention, which holds a matrix of all pairs of tokens, and with flash
attention, which does not. Every figure comes from its own process. Memory is that of the model, its
input and the passes: resident memory on a CPU, PyTorch's allocations on a GPU. In inference the
first pass counts; then the C library keeps freed memory, so that page faults do not count as time.
The table reports models that do not fit in memory or take longer than --timeout. DeiT's time beyond
its last measurement is computed: it grows with the square of the tokens.

A peer replaces bi_wkv in a VRWKV. It is refused if its result differs in any layer. --vrwkv6 adds
VRWKV6.

  python tools/analysis_tools/benchmark_resolution.py --resolutions 224 512 --sizes tiny small
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vrwkv.analysis.drawing import COLOURS, picture
from vrwkv.analysis.measurement import peak_memory
from vrwkv.backbones import VRWKV, VRWKV6, ViT
from vrwkv.layers import mix
from vrwkv_ops import bi_wkv
from vrwkv_ops.benchmarking import (
    ArgumentParser,
    Peer,
    describe_environment,
    keep_freed_memory,
    markdown_table,
    positive_int,
    seconds,
    write_json,
)

# All depths are 12; DeiT and VRWKV of one size have about the same number of parameters.
WIDTHS = {'tiny': 192, 'small': 384, 'base': 768}
HEAD_DIMS = 64
ATTENTION = {
    'DeiT, plain attention': [SDPBackend.MATH],
    'DeiT, flash attention': [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION],
}
OURS, SIX = 'VRWKV', 'VRWKV6'
PATCH = 16
# Accepted difference of a peer's result from ours: each has an error up to 1e-5, or 2^-9.
PEER_BAR = {'float32': 2e-5, 'bfloat16': 2**-8}
MARK = 'RESULT '


@dataclass
class Row:
    """One line of the results.

    Attributes:
        size: ``'tiny'``, ``'small'`` or ``'base'``.
        model: The model or a peer's name.
        resolution: Side of the images in pixels.
        images_per_second: The median; None without a result.
        memory: Peak bytes of model, input and pass; None without a result.
        note: The reason for a missing result.
        computed: Whether the time is computed from that of smaller images.
    """

    size: str
    model: str
    resolution: int
    images_per_second: float | None = None
    memory: int | None = None
    note: str = ''
    computed: bool = False


# --- In the process of one figure -------------------------------------------------------------


def build(model: str, size: str, resolution: int) -> nn.Module:
    """Build a model with random weights for images of one resolution."""
    torch.manual_seed(0)
    sizes = dict(img_size=resolution, embed_dims=WIDTHS[size], depth=12)
    if model in ATTENTION:
        return ViT(num_heads=WIDTHS[size] // HEAD_DIMS, **sizes)
    if model == SIX:
        return VRWKV6(num_heads=WIDTHS[size] // HEAD_DIMS, **sizes)
    return VRWKV(**sizes)


@contextlib.contextmanager
def attention_of(model: str, kernel: Callable | None = None):
    """Run a DeiT with the attention of its name, or a VRWKV with another kernel."""
    if model in ATTENTION:
        with sdpa_kernel(ATTENTION[model]):
            yield
        return
    ours = mix.bi_wkv
    mix.bi_wkv = kernel or ours
    try:
        yield
    finally:
        mix.bi_wkv = ours


def refusal(args: argparse.Namespace, network: nn.Module, images: Tensor, peer: Peer) -> str:
    """Explain why a peer's result is wrong in some layer; an empty text if it is right."""
    ours, errors = mix.bi_wkv, []

    def compare(w: Tensor, u: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        expected = ours(w, u, k, v).double()
        difference = peer.function(w, u, k, v).double() - expected
        errors.append((difference.norm() / expected.norm()).item())
        return expected.to(v.dtype)

    with attention_of(OURS, compare), autocast(args), torch.no_grad():
        network(images)
    bar = PEER_BAR[args.dtype]
    if all(error <= bar for error in errors):  # false for NaN
        return ''
    return f'refused: differs from bi_wkv by {max(errors):.1e}, at most {bar:.0e} is right'


def autocast(args: argparse.Namespace):
    """Return the context in which the models run."""
    enabled = args.dtype != 'float32'
    return torch.autocast(args.device.type, torch.bfloat16, enabled=enabled)


def compiled(network: nn.Module, images: Tensor, runtime: str) -> Callable:
    """Compile a model for images of one size."""
    if runtime == 'compile':
        return torch.compile(network, fullgraph=True)
    program = torch.export.export(network, (images,))
    with tempfile.TemporaryDirectory() as folder:
        path = f'{folder}/model.pt2'
        torch._inductor.aoti_compile_and_package(program, package_path=path)
        return torch._inductor.aoti_load_package(path)


def measure(args: argparse.Namespace, size: str, model: str, resolution: int) -> Row:
    """Measure one model at one resolution in this process."""
    row = Row(size, model, resolution)
    peer = next((peer for peer in args.peer if peer.name == model), None)
    if args.memory_limit and args.device.type == 'cpu':
        # A limit on allocations makes them fail here rather than in another program.
        limit = int(args.memory_limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    before = peak_memory(args.device)
    with torch.device(args.device):
        network = build(model, size, resolution)
        images = torch.randn(args.batch_size, 3, resolution, resolution)
    network.train(args.train)
    if peer is not None:
        small = torch.randn(1, 3, min(resolution, 224), min(resolution, 224), device=args.device)
        row.note = refusal(args, network, small, peer)
        if row.note:
            return row

    def kernel(w: Tensor, u: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
        return (peer.function if peer else bi_wkv)(w, u, k, v)

    if args.runtime != 'eager':
        with attention_of(model, kernel), torch.no_grad():
            network = compiled(network, images, args.runtime)

    def step() -> None:
        with attention_of(model, kernel), torch.set_grad_enabled(args.train):
            with autocast(args):
                output = network(images)[0]
            if args.train:
                output.float().square().mean().backward()

    times = [seconds(step, args.device)]
    row.memory = peak_memory(args.device) - before
    warm_up = 1
    if not args.train:
        keep_freed_memory()
        warm_up = 2  # the next step still asks the system for the memory that it then keeps
    while len(times) < warm_up + args.repeats and sum(times) <= args.timeout / 4:
        times.append(seconds(step, args.device))
    if args.train:  # a later step holds the gradients of the one before
        row.memory = peak_memory(args.device) - before
    # The last step counts if the others are skipped because they take so long.
    row.images_per_second = args.batch_size / statistics.median(times[warm_up:] or times[-1:])
    return row


# --- In the process that the user started -----------------------------------------------------


def measure_apart(args: argparse.Namespace, size: str, model: str, resolution: int) -> Row:
    """Call :func:`measure` in a new process, which may fail."""
    row = Row(size, model, resolution)
    command = [sys.executable, __file__, *args.argv, '--one', size, model, str(resolution)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=args.timeout + 60)
    except subprocess.TimeoutExpired:
        row.note = f'more than {args.timeout} s'
        return row
    lines = [line for line in result.stdout.splitlines() if line.startswith(MARK)]
    if result.returncode == 0 and lines:
        return Row(**json.loads(lines[-1].removeprefix(MARK)))
    errors = result.stderr.strip().splitlines() or [f'ended with {result.returncode}']
    short = ('out of memory', "can't allocate memory", 'MemoryError', 'bad_alloc')
    killed = result.returncode == -9
    if killed or any(text in line for line in errors for text in short):
        row.note = 'out of memory'
    else:
        row.note = f'failed: {errors[-1][:150]}'
    return row


def run(args: argparse.Namespace) -> list[Row]:
    """Measure all rows. A model that failed at a resolution is not tried at larger ones."""
    rows = []
    ours = (OURS, SIX) if args.vrwkv6 else (OURS,)
    models = [*ours, *(peer.name for peer in args.peer), *ATTENTION]
    for size in args.sizes:
        failed = {}
        for resolution in sorted(args.resolutions):
            fastest = {}
            for model in models * args.rounds:
                known = [r for r in rows if (r.size, r.model) == (size, model) and r.memory]
                guess = _by_the_square(known[-1], resolution) if known else math.inf
                if model in failed:
                    row = Row(size, model, resolution, note=f'not tried after {failed[model]}')
                elif model in ATTENTION and known and args.batch_size / guess > 4 * args.timeout:
                    row = Row(size, model, resolution, note=f'far more than {args.timeout} s')
                else:
                    row = measure_apart(args, size, model, resolution)
                if row.note:
                    failed.setdefault(model, resolution)
                    if model in ATTENTION and known and 'fail' not in row.note:
                        row.images_per_second, row.computed = guess, True
                before = fastest.setdefault(model, row)
                if not (row.note or before.note):
                    fastest[model] = max(before, row, key=lambda r: r.images_per_second)
                print(f'{size}, {resolution}, {model}: {row.note or "done"}', file=sys.stderr)
            rows += fastest.values()
    return rows


def _by_the_square(row: Row, resolution: int) -> float:
    """Compute a DeiT's images per second at a larger resolution."""
    return row.images_per_second * (row.resolution / resolution) ** 4


def table(rows: list[Row]) -> str:
    """Format the rows."""
    cells = []
    for r in rows:
        line = [r.size, str(r.resolution), r.model]
        if r.images_per_second is None:
            cells.append([*line, r.note, ''])
        elif r.computed:
            cells.append([*line, f'{r.images_per_second:.3g} computed', r.note])
        else:
            cells.append([*line, f'{r.images_per_second:.3g}', f'{r.memory / 2**20:.0f}'])
    return markdown_table(('size', 'pixels', 'model', 'images/s', 'memory (MiB)'), cells)


def plot(rows: list[Row], title: str, path: Path) -> None:
    """Draw images per second and memory over resolution, a line for each model and size."""
    with picture(path, 1, 2, figsize=(11, 4.4)) as (figure, axes):
        models = list(dict.fromkeys(r.model for r in rows))
        for size, style in zip(WIDTHS, ('-', '--', ':'), strict=True):
            for index, model in enumerate(models):
                chosen = [r for r in rows if (r.size, r.model) == (size, model)]
                measured = [r for r in chosen if r.memory]
                if not measured:
                    continue
                colour = COLOURS[1 + index % (len(COLOURS) - 1)]
                options = dict(color=colour, marker='o', ms=3)
                pixels = [r.resolution for r in measured]
                speed = [r.images_per_second for r in measured]
                axes[0].loglog(pixels, speed, style, label=f'{model}, {size}', **options)
                axes[1].loglog(pixels, [r.memory / 2**20 for r in measured], style, **options)
                if computed := [r for r in chosen if r.computed]:
                    pixels = [r.resolution for r in computed]
                    speed = [r.images_per_second for r in computed]
                    hollow = dict(mfc='none', ls='', label=f'{model}, {size}, computed')
                    axes[0].loglog(pixels, speed, **options, **hollow)
        resolutions = sorted({r.resolution for r in rows})
        for axis, label in zip(axes, ('images per second', 'peak memory (MiB)'), strict=True):
            axis.set_xticks(resolutions, [str(x) for x in resolutions], rotation=45)
            axis.tick_params(axis='x', which='minor', bottom=False, labelbottom=False)
            axis.set(xlabel='side of the image (pixels)', ylabel=label)
        axes[0].legend(fontsize=8)
        figure.suptitle(title)
    print(f'Wrote {path}')


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = ArgumentParser(__doc__, 'benchmarks', (OURS, SIX, *ATTENTION))
    parser.add_argument(
        '--sizes', nargs='+', choices=WIDTHS, default=['tiny'], help='default: tiny'
    )
    parser.add_argument(
        '--dtype',
        choices=PEER_BAR,
        default='float32',
        help='bfloat16: under autocast (default: float32)',
    )
    parser.add_argument('--vrwkv6', action='store_true', help='measure VRWKV6, too')
    parser.add_argument('--train', action='store_true', help='forward and backward pass')
    parser.add_argument(
        '--rounds',
        type=positive_int,
        default=1,
        help='measure the models in turns, so many times; the fastest counts (default: 1)',
    )
    parser.add_argument(
        '--runtime',
        choices=('eager', 'compile', 'aotinductor'),
        default='eager',
        help='compile: torch.compile; memory includes the compiler then (default: eager)',
    )
    parser.add_argument(
        '--timeout', type=positive_int, default=120, help='seconds for a figure (default: 120)'
    )
    parser.add_argument(
        '--memory-limit',
        type=float,
        default=available_memory() * 0.8,
        metavar='GIB',
        help='memory for a figure on a CPU; 0: no limit (default: 80 %% of the free memory)',
    )
    parser.add_argument('--one', nargs=3, help=argparse.SUPPRESS)  # a figure, in its process
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    if args.train and args.peer:
        parser.error('--peer is checked in the forward pass only: leave out --train')
    if min(args.resolutions) < PATCH:
        parser.error(f'--resolutions start at {PATCH} (a patch), got {min(args.resolutions)}')
    if args.train and args.runtime == 'aotinductor':
        parser.error('AOTInductor runs the forward pass only: leave out --train')
    return args


def available_memory() -> float:
    """Return the free memory of the machine in GiB; 0 if it is unknown."""
    with contextlib.suppress(OSError):
        for line in Path('/proc/meminfo').read_text().splitlines():
            if line.startswith('MemAvailable:'):
                return math.floor(int(line.split()[1]) / 2**20 * 10) / 10
    return 0.0


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write the results; return the exit status."""
    args = parse_args(argv)
    if args.one:
        size, model, resolution = args.one
        print(MARK + json.dumps(asdict(measure(args, size, model, int(resolution)))))
        return 0
    facts = describe_environment(args.device)
    for name, value in facts.items():
        print(f'{name}: {value}')
    rows = run(args)
    print('\n' + table(rows) + '\n')
    step = 'training step' if args.train else 'inference'
    keys = ('batch_size', 'repeats', 'rounds', 'dtype', 'runtime')
    settings = {key: getattr(args, key) for key in keys} | dict(step=step)
    results = args.out / 'resolution.json'
    content = dict(environment=facts, settings=settings, rows=list(map(asdict, rows)))
    write_json(results, content)
    print(f'Wrote {results}')
    title = f'{step}, {args.runtime}, {args.batch_size} image(s), {args.dtype}, {facts["device"]}'
    plot(rows, title, args.out / 'resolution.png')
    return 1 if any(r.note.startswith(('refused', 'failed')) for r in rows) else 0


if __name__ == '__main__':
    sys.exit(main())
