"""Test classifiers at several resolutions, as in the paper's figure 4: a table and a plot."""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path

from mmengine.config import Config, ConfigDict

from vrwkv.analysis.drawing import COLOURS, MARKERS, picture
from vrwkv.analysis.models import read_config
from vrwkv.analysis.report import distinct_names, write_results
from vrwkv.engine import CheckpointError, cli
from vrwkv_ops.benchmarking import markdown_table

SIZES = (224, 256, 288, 320, 384, 448, 512, 640, 768, 1024)
# Transforms that set the size of an image, and their argument for it.
RESIZING = {
    'Resize': 'scale',
    'ResizeEdge': 'scale',
    'EfficientNetCenterCrop': 'crop_size',
    'CenterCrop': 'crop_size',
}


def scale_pipeline(pipeline: list[dict], size: int) -> list[dict]:
    """Change a test pipeline so that it produces square images of another size.

    Resizing and cropping keep their ratio: a resize to 256 and a crop of 224 become 512 and 448. A
    pipeline without either gets a resize after the loading.

    Args:
        pipeline: Transforms of mmpretrain.
        size: Height and width in pixels.

    Returns:
        The new pipeline.

    Raises:
        ValueError: If a size in the pipeline is neither one number nor a square.
    """
    pipeline = copy.deepcopy(pipeline)
    resizing = [step for step in pipeline if step['type'] in RESIZING]
    if not resizing:
        pipeline.insert(1, ConfigDict(type='Resize', scale=size, interpolation='bicubic'))
        return pipeline
    final = _side(resizing[-1])
    for step in resizing:
        step[RESIZING[step['type']]] = round(_side(step) * size / final)
    return pipeline


def _side(step: dict) -> int:
    """Read the side of the square that a transform resizes or crops to."""
    value = step.get(RESIZING[step['type']])
    sides = set(value) if isinstance(value, (tuple, list)) else {value}
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(
            f'cannot scale the test pipeline: {step["type"]} has {RESIZING[step["type"]]}={value!r}'
            ', expected one number of pixels'
        )
    return sides.pop()


def evaluate(cfg: Config, checkpoint: str, size: int, work_dir: str) -> float:
    """Test at one size and return the top-1 accuracy in percent."""
    cfg = copy.deepcopy(cfg)
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:  # a wrapper
        dataset = dataset.dataset
    dataset.pipeline = scale_pipeline(dataset.pipeline, size)
    cfg.work_dir, cfg.load_from, cfg.resume = work_dir, checkpoint, False
    cfg.experiment_name = f'{Path(checkpoint).stem}-{size}'
    cfg.log_level = 'WARNING'
    cli.complete_loaders(cfg)
    metrics = cli.build_runner(cfg).test()
    if 'accuracy/top1' not in metrics:
        raise ValueError(f'the test gave {sorted(metrics)}, expected accuracy/top1 among them')
    return metrics['accuracy/top1']


def draw(sizes: list[int], results: dict[str, list[float]], out: Path) -> None:
    """Draw accuracy over resolution, a line for each model."""
    with picture(out, figsize=(7.5, 4.8)) as (_, axes):
        for (name, accuracies), colour, marker in zip(
            results.items(), COLOURS[1:], MARKERS[1:], strict=False
        ):
            axes.plot(sizes, accuracies, color=colour, marker=marker, label=name)
        axes.set(xlabel='test resolution (pixels)', ylabel='top-1 accuracy (%)')
        axes.set_xticks(sizes, sizes, rotation=45 if len(sizes) > 8 else 0)
        axes.legend(loc='best')


def name_models(models: list[str]) -> list[str]:
    """Name models by their configs or, where several share a config, by their checkpoints."""
    configs, checkpoints = models[::2], distinct_names(models[1::2])
    if len(set(configs)) == len(configs):
        return distinct_names(configs)
    return [f'{Path(c).stem}, {name}' for c, name in zip(configs, checkpoints, strict=True)]


def main(argv: list[str] | None = None) -> None:
    """Test from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'models',
        nargs='+',
        metavar='CONFIG CHECKPOINT',
        help='one or several models to compare on the test sets of their configs',
    )
    parser.add_argument(
        '--sizes', type=int, nargs='+', default=list(SIZES), help='pixels (default: %(default)s)'
    )
    parser.add_argument(
        '--batch-size', type=int, help="images at a time (default: the config's, which may be too "
        'many for large images)'
    )  # fmt: skip
    parser.add_argument(
        '--cfg-options', nargs='+', action=cli.ConfigOption, metavar='KEY=VALUE',
        help='change settings of every config, as for tools/test.py',
    )  # fmt: skip
    parser.add_argument('--out', type=Path, default=Path('work_dirs/resolution'))
    args = parser.parse_args(argv)
    if len(args.models) % 2:
        parser.error('each CONFIG needs a CHECKPOINT')
    if min(args.sizes) < 1:
        parser.error(f'--sizes must be above 0, got {args.sizes}')
    if len(args.models) > 2 * (len(COLOURS) - 1):
        parser.error(f'at most {len(COLOURS) - 1} models fit into a plot')

    sizes, accuracies = sorted(set(args.sizes)), []
    try:
        for config, checkpoint in zip(args.models[::2], args.models[1::2], strict=True):
            cfg = read_config(config)
            if cfg.get('default_scope') != 'mmpretrain' or cfg.get('test_dataloader') is None:
                raise ValueError(f"'{config}' is no config of a classifier with a test set")
            if args.cfg_options:
                cfg.merge_from_dict(args.cfg_options)
            if args.batch_size:
                cfg.test_dataloader.batch_size = args.batch_size
            with tempfile.TemporaryDirectory() as work_dir:
                accuracies.append([evaluate(cfg, checkpoint, n, work_dir) for n in sizes])
    except (OSError, ValueError, CheckpointError) as error:
        sys.exit(f'Error: {error}')
    results = dict(zip(name_models(args.models), accuracies, strict=True))
    rows = [(name, *(f'{value:.2f}' for value in values)) for name, values in results.items()]
    print(markdown_table(('top-1 (%) at', *map(str, sizes)), rows))
    out = args.out / 'resolution_accuracy.png'
    draw(sizes, results, out)
    write_results(out.with_suffix('.json'), dict(sizes=sizes, top1=results, models=args.models))
    print(f'\nPicture: {out}')


if __name__ == '__main__':
    main()
