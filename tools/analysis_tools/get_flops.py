"""Count parameters and FLOPs of the models of configs, in a table and a picture."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from vrwkv.analysis import Complexity, complexity, input_channels
from vrwkv.analysis.drawing import COLOURS, picture
from vrwkv.analysis.models import build_model, read_config
from vrwkv.analysis.report import distinct_names, write_results
from vrwkv_ops.benchmarking import markdown_table

# Height and width of the paper's images in pixels, by library.
SIZES = {'mmpretrain': (224, 224), 'mmdet': (800, 1344), 'mmseg': (512, 512)}
# Names in the picture for the operators of a trace; the others are drawn as `other`.
KINDS = {
    'linear layers': ('linear', 'addmm', 'matmul', 'mm'),
    'convolutions': ('conv',),
    'Bi-WKV and its gate': ('bi_wkv',),
    'attention': ('scaled_dot_product_attention', 'bmm', 'einsum'),
    'deformable attention': (
        'ms_deform_attn',
        'grid_sampler',
        'PythonOp.MultiScaleDeformableAttnFunction',
    ),
    'norms': ('layer_norm', 'batch_norm', 'group_norm'),
}


def prepare(model: nn.Module, scope: str, size: tuple[int, int]) -> nn.Module:
    """Give a detector the description of its image, which it needs beside the image."""
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample

        keys = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
        sample = DetDataSample(metainfo=dict.fromkeys(keys, size) | dict(scale_factor=(1.0, 1.0)))
        model.forward = partial(model.forward, data_samples=[sample])
    return model


def count(cfg: Config, size: tuple[int, int], backbone_only: bool = False) -> Complexity:
    """Count parameters and FLOPs of a config's model for one image."""
    model = build_model(cfg, backbone_only)
    if not backbone_only:
        model = prepare(model, cfg.get('default_scope'), size)
    return complexity(model, torch.zeros(1, input_channels(model), *size))


def draw(results: dict[str, Complexity], out: Path) -> None:
    """Draw parameters as bars, and FLOPs as bars stacked by operator."""
    names = list(results)
    costs = list(results.values())
    kinds = {
        kind: [sum(c.operators.get(o, 0) for o in KINDS[kind]) for c in costs] for kind in KINDS
    }
    known = [sum(column) for column in zip(*kinds.values(), strict=True)]
    kinds['other'] = [c.flops - n for c, n in zip(costs, known, strict=True)]
    height = 1.6 + 0.42 * len(names)
    with picture(out, 1, 2, figsize=(13, height), sharey=True) as (fig, (left, right)):
        bars = left.barh(names, [c.parameters / 1e6 for c in costs], color='#7f7f7f', height=0.7)
        left.bar_label(bars, fmt='%.1f', padding=3)
        left.set(xlabel='parameters (millions)')
        left.invert_yaxis()
        start = [0.0] * len(names)
        for (kind, flops), colour in zip(kinds.items(), COLOURS[1:], strict=True):
            if not any(flops):
                continue
            values = [f / 1e9 for f in flops]
            bars = right.barh(names, values, left=start, label=kind, color=colour, height=0.7)
            start = [a + b for a, b in zip(start, values, strict=True)]
        right.bar_label(bars, labels=[f'{s:.1f}' for s in start], padding=3)
        right.set(xlabel='FLOPs (billions of multiply-adds)')
        for axes, most in ((left, max(c.parameters for c in costs) / 1e6), (right, max(start))):
            axes.grid(axis='y', visible=False)
            axes.set_xlim(0, 1.12 * most)
        fig.legend(loc='outside upper center', ncols=4)


def main(argv: list[str] | None = None) -> None:
    """Count from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'configs', nargs='+', help='paths, or package::path for configs of an installed library'
    )
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar=('H', 'W'),
        help='pixels of the image, one number for a square (default: 224 224 for a classifier, '
        "800 1344 for a detector, 512 512 for a segmentor, the paper's)",
    )
    parser.add_argument(
        '--backbone', action='store_true', help='count only the backbone, which takes less time'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/flops'), help='folder (default: %(default)s)'
    )
    args = parser.parse_args(argv)
    shape = args.shape
    if shape is not None and (len(shape) > 2 or min(shape) < 1):
        parser.error(f'--shape takes one or two numbers above 0, got {shape}')

    sizes, costs = [], []
    try:
        for name in args.configs:
            cfg = read_config(name)
            default = SIZES.get(cfg.get('default_scope'), (224, 224))
            sizes.append(default if shape is None else (shape[0], shape[-1]))
            costs.append(count(cfg, sizes[-1], args.backbone))
    except (OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    names = distinct_names(args.configs)
    inputs = [f'{height}x{width}' for height, width in sizes]
    rows = [
        (
            name,
            size,
            *(f'{n / 1e6:.2f}' for n in (cost.parameters, cost.backbone_parameters)),
            *(f'{n / 1e9:.2f}' for n in (cost.flops, cost.backbone_flops)),
        )
        for name, size, cost in zip(names, inputs, costs, strict=True)
    ]
    header = ('config', 'input', 'params (M)', 'of backbone', 'FLOPs (G)', 'of backbone')
    print(markdown_table(header, rows))
    results = dict(zip(names, costs, strict=True))
    draw(results, args.out / 'flops.png')
    content = {
        name: cost._asdict() | dict(input=size)
        for (name, cost), size in zip(results.items(), inputs, strict=True)
    }
    write_results(args.out / 'flops.json', dict(models=content))
    print(f'\nFLOPs are multiply-adds. Picture: {args.out / "flops.png"}')


if __name__ == '__main__':
    main()
