"""Pre-train a small VRWKV on masked digits, fine-tune it on 100 labels, compare with from scratch.

Everything is trained once for each of three seeds, which also draw the 100 labels. What is already
done is not done again, and an interrupted training goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from digits_demo import ROOT, is_newer, test, train, write_config
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS
from torch import Tensor

from vrwkv_cls.datasets import write_digits

CONFIGS = ROOT / 'configs/classification/mae'
PRETRAIN = 'mae_vrwkv-nano_1xb64-30e_digits'
SCRATCH = 'vrwkv-nano_1xb50-100e_digits-100'
FINETUNE = 'vrwkv-nano_mae-pre_1xb50-100e_digits-100'
PER_CLASS = 10


def write_labels(data_root: Path, seed: int) -> Path:
    """List ten digits of each class, drawn by the seed, as mmpretrain's annotation file."""
    rng = np.random.default_rng(seed)
    lines = []
    for folder in sorted((data_root / 'train').iterdir()):
        for path in rng.choice(sorted(folder.glob('*.png')), PER_CLASS, replace=False):
            lines.append(f'{folder.name}/{path.name} {folder.name}\n')
    out = data_root / f'digits-{len(lines)}-seed{seed}.txt'
    out.write_text(''.join(lines))
    return out


def path_of(name: str) -> Path:
    """Say where the config of that name lies."""
    return CONFIGS / f'{name}.py'


def compare(
    work_dir: Path, data_root: Path, seed: int, options: Callable[[str], dict]
) -> tuple[float, float, Path]:
    """Train with one seed.

    Returns:
        The accuracy from scratch, the one after pre-training, and the pre-trained checkpoint.
    """

    def fit(name: str, extra: dict) -> tuple[Path, Path]:
        changes = {'randomness.seed': seed} | extra | options(name)
        config = write_config(path_of(name), work_dir / f'configs/{name}.py', changes)
        return config, train(config, work_dir / name)

    _, pretrained = fit(PRETRAIN, {})
    labels = {'train_dataloader.dataset.ann_file': str(write_labels(data_root, seed).resolve())}
    weights = {'model.backbone.init_cfg.checkpoint': str(pretrained)}
    return test(*fit(SCRATCH, labels)), test(*fit(FINETUNE, labels | weights)), pretrained


def reconstruct(config: Path, checkpoint: Path, paths: list[Path]) -> tuple[Tensor, Tensor, Tensor]:
    """Have a masked autoencoder fill in images.

    Returns:
        The images, with grey where they are masked; with the prediction there; and as they are:
        each of shape ``(N, 3, H, W)``, from 0 to 1.
    """
    cfg = Config.fromfile(config)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model | dict(data_preprocessor=cfg.data_preprocessor)).eval()
    load_checkpoint(model, str(checkpoint), map_location='cpu')
    images = torch.stack([torch.from_numpy(mpl.image.imread(path)) for path in paths])
    images = (255 * images).round().unsqueeze(1).expand(-1, 3, -1, -1)
    inputs = model.data_preprocessor(dict(inputs=images, data_samples=None))['inputs']
    torch.manual_seed(0)
    with torch.no_grad():
        latent, mask, ids_restore = model.backbone(inputs)
        predicted = model.neck(latent, ids_restore)
    original, mask = model.head.patchify(inputs), mask.unsqueeze(2)
    mean, std = model.data_preprocessor.mean, model.data_preprocessor.std

    def picture(patches: Tensor) -> Tensor:
        return ((model.head.unpatchify(patches) * std + mean) / 255).clamp(0, 1)

    masked = picture(original * (1 - mask))
    return masked, picture(original * (1 - mask) + predicted * mask), picture(original)


def draw(rows: tuple[Tensor, Tensor, Tensor], out: Path) -> None:
    """Draw masked, reconstructed and original images below each other."""
    mpl.use('Agg')
    from matplotlib import pyplot as plt

    count = len(rows[0])
    fig, axes = plt.subplots(
        3, count, figsize=(count + 1.2, 3.5), dpi=120, layout='constrained', facecolor='white'
    )
    fig.suptitle('Unseen digits with three quarters masked, filled in by a VRWKV', fontsize=15)
    for line, images, label in zip(axes, rows, ('masked', 'filled in', 'original'), strict=True):
        line[0].set_ylabel(label, fontsize=12)
        for ax, image in zip(line, images, strict=True):
            ax.imshow(image.permute(1, 2, 0))
            ax.set(xticks=[], yticks=[])
    fig.savefig(out)
    plt.close(fig)


def table(results: dict[int, tuple[float, float]]) -> str:
    """Write accuracies by seed as a Markdown table, with means and standard deviations."""
    lines = ['| seed | from scratch | pre-trained | gain |', '|---|---|---|---|']
    for seed, (scratch, tuned) in results.items():
        lines.append(f'| {seed} | {scratch:.2f} | {tuned:.2f} | {tuned - scratch:+.2f} |')
    columns = [*zip(*results.values(), strict=True), [b - a for a, b in results.values()]]
    cells = [f'{statistics.mean(c):.2f} ± {statistics.stdev(c):.2f}' for c in columns]
    return '\n'.join([*lines, f'| mean ± sd | {" | ".join(cells)} |'])


def main() -> None:
    """Run the comparison from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument(
        '--work-dir',
        type=Path,
        default=ROOT / 'work_dirs/mae_digits',
        help='default: %(default)s',
    )
    work_dir = parser.parse_args().work_dir.resolve()
    run(work_dir, ROOT / 'data/digits')


def run(
    work_dir: Path,
    data_root: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    options: Callable[[str], dict] = lambda name: {},
) -> None:
    """Compare with each seed, then print the table and draw the first seed's pictures.

    Args:
        work_dir: Where everything is written.
        data_root: Folder of the digits, written where it is missing.
        seeds: At least two.
        options: Gives, for a config's name, settings to change in it.
    """
    write_digits(data_root)
    results, checkpoints = {}, []
    for seed in seeds:
        *accuracies, checkpoint = compare(work_dir / f'seed{seed}', data_root, seed, options)
        results[seed] = tuple(accuracies)
        checkpoints.append(checkpoint)
    picture = work_dir / 'reconstruction.png'
    if not is_newer(picture, checkpoints[0]):
        config = work_dir / f'seed{seeds[0]}/configs/{PRETRAIN}.py'
        paths = [sorted((data_root / 'val' / str(digit)).glob('*.png'))[0] for digit in range(10)]
        draw(reconstruct(config, checkpoints[0], paths), picture)
    print(f"""
Top-1 accuracy on unseen digits in percent, after training on {10 * PER_CLASS} labels:

{table(results)}

Picture of masked, filled-in and original digits: {picture}""")


if __name__ == '__main__':
    main()
