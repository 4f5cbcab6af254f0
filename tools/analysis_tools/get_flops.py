"""Count parameters and FLOPs of models by their configs, in a table and a picture."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

from vrwkv.analysis import Complexity, complexity
from vrwkv.analysis.drawing import COLOURS, picture, table, write_json
from vrwkv.analysis.models import build_model, read_config

# What the paper counts at: pixels, height and width, by library.
SIZES = {'mmpretrain': (224, 224), 'mmdet': (800, 1344), 'mmseg': (512, 512)}
# Names in the picture for what tracing calls its operators; the rest is `other`.
KINDS = {
    'linear layers': ('linear', 'addmm', 'matmul', 'mm'),
    'convolutions': ('conv',),
    'Bi-WKV and its gate': ('bi_wkv_forward',),
    'attention': ('scaled_dot_product_attention', 'bmm', 'einsum'),
    'deformable attention': ('grid_sampler', 'PythonOp.MultiScaleDeformableAttnFunction'),
    'norms': ('layer_norm', 'batch_norm', 'group_norm'),
}


def prepare(model: nn.Module, scope: str, size: tuple[int, int]) -> nn.Module:
    """Give a detector, which asks for more than images, a description of its image."""
    if scope == 'mmdet':
        from mmdet.structures import DetDataSample

        keys = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
        sample = DetDataSample(metainfo=dict.fromkeys(keys, size) | dict(scale_factor=(1.0, 1.0)))
        model.forward = partial(model.forward, data_samples=[sample])
    return model


def count(cfg: Config, size: tuple[int, int], backbone_only: bool = False) -> Complexity:
    """Count what a config's model costs for one image of a size."""
    model = build_model(cfg, backbone_only)
    if not backbone_only:
        model = prepare(model, cfg.get('default_scope'), size)
    return complexity(model, torch.zeros(1, 3, *size))


def draw(results: dict[str, Complexity], out: Path) -> None:
    """Draw parameters as bars and FLOPs as bars that are stacked by operator."""
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
        'configs', nargs='+', help='paths, or package::path for configs that a library ships'
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
        '--backbone', action='store_true', help='run the backbone alone, which takes less time'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/flops'), help='folder (default: %(default)s)'
    )
    args = parser.parse_args(argv)
    shape = args.shape
    if shape is not None and (len(shape) > 2 or min(shape) < 1):
        parser.error(f'--shape takes one or two numbers above 0, got {shape}')

    rows, results = [], {}
    for name in args.configs:
        try:
            cfg = read_config(name)
            size = SIZES.get(cfg.get('default_scope'), (224, 224))
            if shape is not None:
                size = (shape[0], shape[-1])
            cost = count(cfg, size, args.backbone)
        except (FileNotFoundError, ValueError) as error:
            sys.exit(f'Error: {error}')
        stem = Path(name).stem
        results[stem if stem not in results else name] = cost
        numbers = (cost.parameters, cost.backbone_parameters, cost.flops, cost.backbone_flops)
        rows.append(
            (
                stem,
                f'{size[0]}x{size[1]}',
                *(f'{n / 1e6:.2f}' for n in numbers[:2]),
                *(f'{n / 1e9:.2f}' for n in numbers[2:]),
            )
        )
    header = ('config', 'input', 'params (M)', 'of backbone', 'FLOPs (G)', 'of backbone')
    print(table(header, rows))
    draw(results, args.out / 'flops.png')
    content = {
        name: cost._asdict() | dict(input=row[1])
        for (name, cost), row in zip(results.items(), rows, strict=True)
    }
    write_json(args.out / 'flops.json', dict(models=content))
    print(f'\nFLOPs are multiply-adds. Picture: {args.out / "flops.png"}')


if __name__ == '__main__':
    main()
