"""Count the models of the paper's tables 1 to 4 and compare with the printed numbers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from get_flops import count
from mmengine.config import Config

from vrwkv.analysis.drawing import COLOURS, picture
from vrwkv.analysis.models import read_config
from vrwkv.analysis.report import write_results
from vrwkv_ops.benchmarking import markdown_table

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
TOLERANCE = 0.015


class Row(NamedTuple):
    """A row of a table of the paper."""

    table: int
    model: str
    config: str  #: In ``configs/``, or of mmpretrain.
    size: tuple[int, int] | None  #: Pixels of the image; None where the paper has no FLOPs.
    parameters: float  #: In millions, as printed.
    flops: float | None  #: In billions, as printed.
    held: bool = True  #: Whether our counts must agree.


def _table_2() -> list[Row]:
    small, large = (224, 224), (384, 384)
    others = [
        ('ResNet-18', 'resnet/resnet18_8xb32_in1k', small, 11.7, 1.8),
        ('ResNet-50', 'resnet/resnet50_8xb32_in1k', small, 25.6, 4.1),
        ('Swin-T', 'swin_transformer/swin-tiny_16xb64_in1k', small, 28.3, 4.4),
        ('ResNet-101', 'resnet/resnet101_8xb32_in1k', small, 44.6, 7.9),
        ('Swin-S', 'swin_transformer/swin-small_16xb64_in1k', small, 49.6, 8.7),
        ('Swin-B', 'swin_transformer/swin-base_16xb64_in1k', small, 87.8, 15.1),
        ('DeiT-T', 'deit/deit-tiny_4xb256_in1k', small, 5.7, 1.3),
        ('DeiT-S', 'deit/deit-small_4xb256_in1k', small, 22.1, 4.6),
        ('XCiT-S12', 'xcit/xcit-small-12-p16_8xb128_in1k', small, 26.0, 4.8),
        ('DeiT-B', 'deit/deit-base_16xb64_in1k', small, 86.6, 17.6),
        ('XCiT-L24', 'xcit/xcit-large-24-p16_8xb128_in1k', small, 189.0, 36.1),
        ('ViT-L', 'vision_transformer/vit-large-p16_64xb64_in1k-384px', large, 309.5, 191.1),
    ]
    ours = [
        ('VRWKV-T', 'classification/vrwkv-tiny_8xb128_in1k', small, 6.2, 1.2),
        ('VRWKV-S', 'classification/vrwkv-small_8xb128_in1k', small, 23.8, 4.6),
        ('VRWKV-B', 'classification/vrwkv-base_16xb64_in1k', small, 93.7, 18.2),
        (
            'VRWKV-L',
            'classification/vrwkv-large_in21k-pre_16xb64_in1k-384px',
            large,
            334.9,
            189.5,
        ),
    ]
    return [
        *(
            Row(2, model, f'mmpretrain::{config}.py', *rest, model.startswith('DeiT'))
            for model, config, *rest in others
        ),
        *(Row(2, *row) for row in ours),
    ]


def _table_1() -> list[Row]:
    rows = [row for row in _table_2() if row.model.startswith('VRWKV')]
    return [row._replace(table=1, size=None, flops=None) for row in rows]


# Size: millions of parameters of VRWKV and ViT with the adapter; then billions of FLOPs: table 4
# of both, table 3 of VRWKV, of ViT with windows and of ViT without (None: not in the table).
_ADAPTERS = {
    'tiny': (8.4, 8.0, 16.6, 20.9, 67.9, 95.4, 147.1),
    'small': (29.3, 27.5, 46.3, 54.0, 189.9, 241.2, 344.5),
    'base': (106.6, 99.5, 146.0, 157.9, 599.0, 686.7, 893.3),
    'large': (351.9, 327.0, 421.9, 446.8, 1730.6, 1799.3, None),
}


def _table_3() -> list[Row]:
    size = (800, 1344)  # the paper's 800x1333, padded to multiples of 32
    rows = []
    for name, numbers in _ADAPTERS.items():
        letter = name[0].upper()
        vrwkv, vit, _, _, flops, window, without = numbers
        for kind, label, counted in (('window', 'window', window), ('global', 'global', without)):
            if counted is not None:
                config = f'detection/mask-rcnn_vit-adapter-{name}_{kind}_fpn_1x_coco'
                rows.append(Row(3, f'ViT-{letter}, {label}', config, size, vit, counted))
        config = f'detection/mask-rcnn_vrwkv-adapter-{name}_fpn_1x_coco'
        rows.append(Row(3, f'VRWKV-{letter}', config, size, vrwkv, flops))
    return rows


def _table_4() -> list[Row]:
    size = (512, 512)
    rows = []
    for name, (vrwkv, vit, flops_vrwkv, flops_vit, *_) in _ADAPTERS.items():
        config = 'segmentation/upernet_{}-adapter-' + name + '_8xb2-160k_ade20k-512x512'
        letter = name[0].upper()
        rows.append(Row(4, f'ViT-{letter}', config.format('vit'), size, vit, flops_vit))
        rows.append(Row(4, f'VRWKV-{letter}', config.format('vrwkv'), size, vrwkv, flops_vrwkv))
    return rows


TABLES = {1: _table_1, 2: _table_2, 3: _table_3, 4: _table_4}


def tolerance(printed: float) -> float:
    """Return the accepted distance to a printed number with one digit behind the point."""
    return max(TOLERANCE * printed, 0.05)


class Comparison(NamedTuple):
    """A row of the paper with our counts."""

    row: Row
    parameters: float  #: Counted, in millions.
    flops: float | None  #: Counted, in billions; None where the paper has none.

    @property
    def differences(self) -> tuple[float, float | None]:
        """Differences of parameters and FLOPs, as fractions of the paper's numbers."""
        pairs = ((self.parameters, self.row.parameters), (self.flops, self.row.flops))
        return tuple(None if ours is None else ours / theirs - 1 for ours, theirs in pairs)

    @property
    def agrees(self) -> bool:
        """Whether both counts are within 1.5 % or half a unit of the paper's last digit."""
        pairs = [(self.parameters, self.row.parameters)]
        if self.row.flops is not None:
            pairs.append((self.flops, self.row.flops))
        return all(abs(a - b) <= tolerance(b) for a, b in pairs)


def read_row_config(row: Row) -> Config:
    """Read the config of a row."""
    name = row.config
    return read_config(name if '::' in name else str(CONFIGS / f'{name}.py'))


def compare(row: Row) -> Comparison:
    """Count a row's model: the whole classifier, or the backbone of a detector or segmentor."""
    # Table 1 has no FLOPs, and parameters do not depend on the size.
    cost = count(read_row_config(row), row.size or (64, 64), backbone_only=row.table in (3, 4))
    return Comparison(row, cost.parameters / 1e6, cost.flops / 1e9 if row.size else None)


def cells(result: Comparison) -> tuple[str | None, ...]:
    """Format a comparison as a row of the printed table."""
    row = result.row
    numbers = []
    for paper, ours, off in zip(
        (row.parameters, row.flops),
        (result.parameters, result.flops),
        result.differences,
        strict=True,
    ):
        numbers.append(None if paper is None else f'{paper:.1f}')
        numbers.append(None if ours is None else f'{ours:.2f}')
        numbers.append(None if off is None else f'{100 * off:+.1f} %')
    size = None if row.size is None else f'{row.size[0]}x{row.size[1]}'
    return (str(row.table), row.model, size, *numbers, 'yes' if result.agrees else 'no')


HEADER = (
    'table',
    'model',
    'input',
    'params (M), paper',
    'ours',
    'off',
    'FLOPs (G), paper',
    'ours',
    'off',
    'agrees',
)


def draw(results: Sequence[Comparison], out: Path) -> None:
    """Draw the differences of our counts as dots around zero."""
    names = [f'table {r.row.table}: {r.row.model}' for r in results]
    # The tolerance of the smaller number, which is rounded more coarsely.
    smaller = [min(r.row.parameters, r.row.flops or r.row.parameters) for r in results]
    widths = [200 * tolerance(number) / number for number in smaller]
    with picture(out, figsize=(9, 1.4 + 0.22 * len(names))) as (fig, axes):
        axes.barh(range(len(names)), widths, left=[-width / 2 for width in widths], height=0.9,
                  color='#e8e8e8', label='1.5 % or half of the last digit', zorder=0)  # fmt: skip
        axes.axvline(0, color='black', lw=0.8)
        for part, (label, marker) in enumerate((('parameters', 'o'), ('FLOPs', 'D'))):
            points = [(r.differences[part], y) for y, r in enumerate(results)]
            points = [(100 * x, y) for x, y in points if x is not None]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.scatter(xs, ys, color=COLOURS[1 + part], marker=marker, label=label, zorder=3)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set(ylim=(len(names) - 0.4, -0.6), xlabel="our count over the paper's, less 1 (%)")
        axes.grid(axis='y', visible=False)
        fig.legend(loc='outside upper center', ncols=3)


def main(argv: list[str] | None = None) -> None:
    """Compare from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--tables', type=int, nargs='+', choices=TABLES, default=list(TABLES), help='default: all'
    )
    parser.add_argument(
        '--out', type=Path, default=Path('work_dirs/paper_tables'), help='default: %(default)s'
    )
    args = parser.parse_args(argv)
    results = []
    for number in dict.fromkeys(args.tables):
        for row in TABLES[number]():
            print(f'table {number}: {row.model}', end='\r', flush=True)
            results.append(compare(row))
    print(markdown_table(HEADER, [cells(result) for result in results]))
    draw(results, args.out / 'paper_tables.png')
    content = [result.row._asdict() | dict(counted=result[1:]) for result in results]
    write_results(args.out / 'paper_tables.json', dict(rows=content))
    wrong = [r.row.model for r in results if r.row.held and not r.agrees]
    print('\nA row agrees within 1.5 % or half a unit of the last digit that the paper prints.')
    print(f'FLOPs are multiply-adds. Picture: {args.out / "paper_tables.png"}')
    if wrong:
        raise SystemExit(f'Error: these must agree with the paper and do not: {wrong}')


if __name__ == '__main__':
    main()
