"""Train a small VRWKV on handwritten digits, test it, and draw what it makes of unseen ones.

What is already done is not done again: a second run only prints the result, and an interrupted
training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from mmengine.config import Config

import vrwkv.engine  # noqa: F401 (configs that inherit from a library's, under onedl too)

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs/classification/vrwkv-nano_1xb64_digits.py'

# What makes a training another one: resuming with other values would mix the two.
SETTINGS = (
    'model.backbone',
    'model.neck',
    *(f'model.{kind}head' for kind in ('', 'rpn_', 'roi_', 'decode_', 'auxiliary_')),
    'optim_wrapper',
    'param_scheduler',
)

# Told apart by the colour-blind too.
RIGHT, WRONG = '#00876c', '#d1495b'


class Prediction(NamedTuple):
    """What the model makes of one image."""

    path: Path
    label: str
    predicted: str
    confidence: float

    @property
    def right(self) -> bool:
        """Whether the predicted class is the true one."""
        return self.predicted == self.label


def parse_arguments(documentation: str, default: Path) -> tuple[Path, Path]:
    """Read a demo's command line: the config, and the folder for checkpoints and results."""
    parser = argparse.ArgumentParser(description=documentation.partition('\n')[0])
    parser.add_argument(
        'config', nargs='?', default=default, type=Path, help='default: %(default)s'
    )
    parser.add_argument(
        '--work-dir', type=Path, help='default: work_dirs/<name of the config> in the checkout'
    )
    args = parser.parse_args()
    config = args.config.resolve()
    return config, (args.work_dir or ROOT / 'work_dirs' / config.stem).resolve()


def run_tool(name: str, *args: str | os.PathLike) -> None:
    """Run a script of ``tools/`` in the root of the checkout, where data paths start."""
    subprocess.run([sys.executable, ROOT / 'tools' / name, *args], cwd=ROOT, check=True)


def is_newer(path: Path, than: Path) -> bool:
    """Say whether a file is there and was written after another."""
    return path.is_file() and path.stat().st_mtime >= than.stat().st_mtime


def write_config(source: Path, out: Path, options: dict) -> Path:
    """Write a config with some settings changed."""
    cfg = Config.fromfile(source)
    cfg.merge_from_dict(options)
    out.parent.mkdir(parents=True, exist_ok=True)
    cfg.dump(out)
    return out


def train(config: Path, work_dir: Path) -> Path:
    """Train, unless that is done, and return the last checkpoint."""
    cfg = Config.fromfile(config)
    used = work_dir / config.name
    if used.is_file():
        before = Config.fromfile(used)
        for key in SETTINGS:
            if _lookup(before, key) != _lookup(cfg, key):
                raise SystemExit(
                    f'{work_dir} holds a training with another {key} than {config} has now: '
                    'remove the folder, or name another one with --work-dir'
                )
    iters = cfg.train_cfg.get('max_iters')
    name = f'iter_{iters}' if iters else f'epoch_{cfg.train_cfg.max_epochs}'
    checkpoint = work_dir / f'{name}.pth'
    if not checkpoint.is_file():
        run_tool('train.py', config, '--work-dir', work_dir, '--resume')
    return checkpoint


def _lookup(cfg: Config, key: str) -> object:
    for part in key.split('.'):
        cfg = cfg.get(part, {})
    return cfg


def test(config: Path, checkpoint: Path) -> float:
    """Test the checkpoint, unless that is done, and return the top-1 accuracy in percent."""
    return measure(config, checkpoint)['accuracy/top1']


def measure(config: Path, checkpoint: Path) -> dict[str, float]:
    """Test the checkpoint, unless that is done, and return all metrics by name."""
    out = checkpoint.with_name('metrics.json')
    if not is_newer(out, checkpoint):
        work_dir = checkpoint.parent / 'test'
        args = ('--work-dir', work_dir, '--out', out, '--out-item', 'metrics')
        run_tool('test.py', config, checkpoint, *args)
    return json.loads(out.read_text())


def predict(config: Path, checkpoint: Path, folder: Path) -> list[Prediction]:
    """Classify every image of a folder ``<label>/<name>.png`` with mmpretrain's inferencer."""
    from mmpretrain import ImageClassificationInferencer

    paths = sorted(folder.glob('*/*.png'))
    inferencer = ImageClassificationInferencer(str(config), pretrained=str(checkpoint))
    results = inferencer([str(path) for path in paths], batch_size=64)
    return [
        Prediction(path, path.parent.name, result['pred_class'], result['pred_score'])
        for path, result in zip(paths, results, strict=True)
    ]


def draw(predictions: list[Prediction], accuracy: float, out: Path) -> None:
    """Draw a sample of the images and, above it, those that were hardest for the model.

    Hardest are the mistakes, the most confident ones first, then the right answers that the model
    was least sure of.
    """
    mpl.use('Agg')
    from matplotlib import pyplot as plt

    columns = 12
    mistakes = sorted((p for p in predictions if not p.right), key=lambda p: -p.confidence)
    unsure = sorted((p for p in predictions if p.right), key=lambda p: p.confidence)
    hardest = (mistakes + unsure)[: 2 * columns]
    sample = np.random.default_rng(0).permutation(len(predictions))[: 3 * columns]
    parts = (
        (
            'Hardest: mistakes (true digit in brackets), then the least sure right answers',
            hardest,
        ),
        ('Picked at random', [predictions[index] for index in sample]),
    )

    fig = plt.figure(figsize=(13, 8.8), dpi=120, layout='constrained', facecolor='white')
    total = len(predictions)
    fig.suptitle(
        f'VRWKV on handwritten digits: {accuracy:.1f} % of {total} unseen images right',
        fontsize=20,
        fontweight='bold',
    )
    rows = [-(-len(chosen) // columns) for _, chosen in parts]
    for subfigure, (heading, chosen), n in zip(
        fig.subfigures(2, 1, height_ratios=rows), parts, rows, strict=True
    ):
        subfigure.suptitle(heading, fontsize=13, x=0.012, ha='left')
        for axes in subfigure.subplots(n, columns, squeeze=False).flat:
            axes.axis('off')
        for axes, prediction in zip(subfigure.axes, chosen, strict=False):
            _draw_tile(axes, prediction)
    fig.savefig(out)
    plt.close(fig)


def _draw_tile(axes: mpl.axes.Axes, prediction: Prediction) -> None:
    """Draw an image, the answer below it, and how sure of it the model was as a bar."""
    image = mpl.image.imread(prediction.path)
    side = image.shape[0]
    colour = RIGHT if prediction.right else WRONG
    axes.imshow(image, cmap='gray', vmin=0, vmax=1, extent=(0, side, side, 0))
    axes.add_patch(mpl.patches.Rectangle((0, 0), side, side, fill=False, ec=colour, lw=3))
    axes.barh(1.1 * side, side, height=0.08 * side, color='#e6e6e6')
    axes.barh(1.1 * side, side * prediction.confidence, height=0.08 * side, color=colour)
    axes.set(xlim=(0, side), ylim=(1.16 * side, -0.02 * side))
    mark = '✓' if prediction.right else f'✗ ({prediction.label})'
    axes.set_title(
        f'{prediction.predicted} {mark}  {prediction.confidence:.0%}', color=colour, fontsize=10
    )


def main() -> None:
    """Run the demo from the command line."""
    # Not above: the demos of the other tasks share this file, and need no mmpretrain.
    from vrwkv_cls.datasets import write_digits

    config, work_dir = parse_arguments(__doc__, CONFIG)

    data_root = ROOT / Config.fromfile(config).test_dataloader.dataset.data_root
    write_digits(data_root)
    checkpoint = train(config, work_dir)
    accuracy = test(config, checkpoint)
    picture = work_dir / 'predictions.png'
    if not is_newer(picture, checkpoint):
        draw(predict(config, checkpoint, data_root / 'val'), accuracy, picture)

    log = max(work_dir.glob('2*/*.log'))  # folders are named by date
    print(f"""
Top-1 accuracy on unseen digits: {accuracy:.2f} %
  picture     {picture}
  checkpoint  {checkpoint}
  log         {log}
Next, your own images: see classification/README.md, or train a larger VRWKV on ImageNet-1K with
  python tools/train.py configs/classification/vrwkv-tiny_8xb128_in1k.py""")


if __name__ == '__main__':
    main()
