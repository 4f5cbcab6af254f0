"""Train small versions of the five models of the paper's ablation (table 5) on digits.

The digits lie at random places, so a model must combine some 20 of its 64 tokens anywhere in the
image. Finished trainings are not repeated, and an interrupted one continues from its last
checkpoint.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from demo_tools import ROOT, make_parser, measure, train, write_config
from mmengine.config import Config
from PIL import Image

from vrwkv._files import new_folder
from vrwkv.analysis.drawing import COLOURS, picture
from vrwkv.analysis.report import write_results
from vrwkv_cls.datasets import write_digits
from vrwkv_ops.benchmarking import markdown_table

CONFIGS = ROOT / 'configs/classification'
CONFIG = CONFIGS / 'ablation/vrwkv-nano_1xb64-8e_scattered-digits.py'
CANVAS = 48  # pixels
SIDES = (24, 32)  # pixels; the smallest and the largest digit
PLACES = dict(train=2, val=3)  # images of each digit


class Variant(NamedTuple):
    """A row of the paper's table 5."""

    config: str  #: Its ImageNet config in ``configs/classification``.
    shift: str
    bidirectional: bool
    paper: float  #: The paper's top-1 accuracy on ImageNet-1K.


VARIANTS = {
    'RWKV': Variant('ablation/vrwkv-tiny_rwkv_8xb128_in1k', 'original', False, 71.1),
    'Variant 1': Variant('ablation/vrwkv-tiny_no-shift_8xb128_in1k', 'none', True, 71.5),
    'Variant 2': Variant('ablation/vrwkv-tiny_single-shift_8xb128_in1k', 'original', True, 74.4),
    'Variant 3': Variant('ablation/vrwkv-tiny_causal_8xb128_in1k', 'Q-Shift', False, 72.8),
    'VRWKV': Variant('vrwkv-tiny_8xb128_in1k', 'Q-Shift', True, 75.1),
}
FULL = 'VRWKV'


def scatter(digits: Path, out: Path) -> Path:
    """Write every digit of a folder at random, but reproducible, places and sizes on black.

    Args:
        digits: Folder ``{train,val}/<digit>/*.png``.
        out: The folder to write, in the same layout; it is created completely or not at all.

    Returns:
        ``out``.

    Raises:
        FileExistsError: If ``out`` exists and does not contain all of them.
    """
    sources = {split: sorted((digits / split).glob('*/*.png')) for split in PLACES}
    if out.exists():
        found = len(list(out.glob('*/*/*.png')))
        count = sum(places * len(sources[split]) for split, places in PLACES.items())
        if found != count:
            raise FileExistsError(
                f'{out} exists and holds {found} digits, not {count}: remove it, and run this again'
            )
        return out
    with new_folder(out) as part:
        for split, places in PLACES.items():
            rng = np.random.default_rng(tuple(split.encode()))
            for path in sources[split]:
                folder = part / split / path.parent.name
                folder.mkdir(parents=True, exist_ok=True)
                digit = Image.open(path)
                for place in range(places):
                    side = int(rng.integers(SIDES[0], SIDES[1] + 1))
                    corner = tuple(int(n) for n in rng.integers(0, CANVAS - side + 1, 2))
                    image = Image.new('L', (CANVAS, CANVAS))
                    image.paste(digit.resize((side, side), Image.Resampling.BICUBIC), corner)
                    image.save(folder / f'{path.stem}-{place}.png')
    return out


def settings(name: str) -> dict:
    """Return the settings of a variant's ImageNet config, as options for the small config."""
    backbone = Config.fromfile(CONFIGS / f'{VARIANTS[name].config}.py').model.backbone
    return {
        f'model.backbone.{key}': backbone[key]
        for key in ('shift_mode', 'causal')
        if key in backbone
    }


def fit(name: str, seed: int, work_dir: Path, options: dict, verbose: bool) -> float:
    """Train a variant with a seed, unless that is done, and return its accuracy in percent."""
    run = f'{name.lower().replace(" ", "-")}-seed{seed}'
    changes = settings(name) | {'randomness.seed': seed} | options
    config = write_config(CONFIG, work_dir / f'configs/{run}.py', changes)
    return measure(config, train(config, work_dir / run, verbose), verbose)['accuracy/top1']


def rows(results: dict[str, list[float]]) -> list[tuple[str, ...]]:
    """Format accuracies by variant and seed as rows of the printed table."""
    lines = []
    for name, accuracies in results.items():
        variant = VARIANTS[name]
        gaps = [a - full for a, full in zip(accuracies, results[FULL], strict=True)]
        lines.append(
            (
                name,
                variant.shift,
                'yes' if variant.bidirectional else 'no',
                *(f'{a:.2f}' for a in accuracies),
                spread(accuracies),
                '' if name == FULL else spread(gaps),
                f'{variant.paper:.1f}',
                '' if name == FULL else f'{variant.paper - VARIANTS[FULL].paper:.1f}',
            )
        )
    return lines


def spread(values: Sequence[float]) -> str:
    """Format a mean, with the standard deviation of several values."""
    mean = f'{statistics.mean(values):.2f}'
    return f'{mean} ± {statistics.stdev(values):.2f}' if len(values) > 1 else mean


def draw(results: dict[str, list[float]], out: Path) -> None:
    """Draw the accuracy of every run and the means, with the paper's."""
    names = list(results)
    rows = range(len(names))
    means = [statistics.mean(results[name]) for name in names]
    with picture(out, 1, 2, figsize=(11, 3.6), sharey=True) as (fig, (ours, paper)):
        for name, y in zip(names, rows, strict=True):
            ours.plot(results[name], [y] * len(results[name]), 'o', color='black', mfc='none')
        for axes, values, colour in (
            (ours, means, COLOURS[1]),
            (paper, [VARIANTS[name].paper for name in names], COLOURS[2]),
        ):
            axes.plot(values, rows, 'D', color=colour, ms=9, zorder=3)
            for value, y in zip(values, rows, strict=True):
                axes.annotate(f'{value:.1f}', (value, y), xytext=(0, 9),
                              textcoords='offset points', ha='center', color=colour,
                              fontweight='bold')  # fmt: skip
            axes.margins(x=0.1)
        seeds = len(results[FULL])
        runs = f'mean of {seeds} seeds (circles)' if seeds > 1 else 'one seed'
        ours.set(xlabel=f'top-1 (%), scattered digits: {runs}', ylim=(len(names) - 0.6, -0.8))
        paper.set(xlabel='top-1 (%), ImageNet-1K: the paper, not measured here')
        shifts = dict(none='no shift', original="RWKV's shift")
        labels = [
            f'{name}\n{shifts.get(variant.shift, variant.shift)}, '
            f'{"both directions" if variant.bidirectional else "causal"}'
            for name, variant in VARIANTS.items()
        ]
        ours.set_yticks(rows, labels)
        fig.suptitle('The effect of token shift and bidirectional attention', fontsize=13)


def run(
    work_dir: Path,
    data: Path,
    seeds: Sequence[int] = (0, 1, 2),
    options: Callable[[Path], dict] = lambda root: {},
    verbose: bool = False,
) -> None:
    """Train all variants with each seed, print the table, write it and draw it.

    Args:
        work_dir: Folder for all output.
        data: Folder for the data, which are written if they are missing.
        seeds: Seeds of the weights and of the order of the images, at least one.
        options: Returns settings to change in the config, given the folder of scattered digits.
        verbose: Whether to show everything that the log files contain.
    """
    root = scatter(write_digits(data / 'digits'), data / 'scattered_digits')
    changes = {
        f'{split}_dataloader.dataset.data_root': str(root) for split in ('train', 'val', 'test')
    } | options(root)
    results: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in seeds:
        for name, accuracies in results.items():
            accuracies.append(fit(name, seed, work_dir, changes, verbose))
    header = ('method', 'token shift', 'bidirectional', *(f'seed {seed}' for seed in seeds))
    mean = 'mean ± sd' if len(seeds) > 1 else 'mean'
    header += (mean, 'gap to VRWKV', 'ImageNet (paper)', 'gap on ImageNet (paper)')
    printed = markdown_table(header, rows(results))
    draw(results, work_dir / 'ablation.png')
    write_results(work_dir / 'ablation.json', dict(seeds=list(seeds), top1=results))
    print(f"""
Top-1 accuracy in percent on {len(list(root.glob('val/*/*.png')))} images of held-out digits; the \
paper's is on ImageNet-1K:

{printed}

Picture: {work_dir / 'ablation.png'}""")


def main() -> None:
    """Run the ladder from the command line."""
    parser = make_parser(__doc__, 'work_dirs/ablation')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2], help='default: 0 1 2')
    args = parser.parse_args()
    work_dir = (args.work_dir or ROOT / 'work_dirs/ablation').resolve()
    run(work_dir, ROOT / 'data', args.seeds, verbose=args.verbose)


if __name__ == '__main__':
    main()
