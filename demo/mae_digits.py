"""Pre-train a small VRWKV on masked digits, fine-tune it on 100 labels, compare with from scratch.

Each of three seeds draws its own 100 labels and trains every model. Finished trainings are not
repeated, and an interrupted one continues from its last checkpoint.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from demo_tools import ROOT, is_newer, make_parser, measure, train, write_config
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import load_checkpoint
from mmpretrain.registry import MODELS
from torch import Tensor

from vrwkv.analysis.drawing import picture
from vrwkv_cls.datasets import write_digits
from vrwkv_ops.benchmarking import markdown_table

CONFIGS = ROOT / 'configs/classification/mae'
PRETRAIN = 'mae_vrwkv-nano_1xb64-30e_digits'
SCRATCH = 'vrwkv-nano_1xb50-100e_digits-100'
FINETUNE = 'vrwkv-nano_mae-pre_1xb50-100e_digits-100'
PER_CLASS = 10


def write_labels(data_root: Path, seed: int) -> Path:
    """Write an annotation file of mmpretrain with ten digits of each class, drawn by the seed."""
    rng = np.random.default_rng(seed)
    lines = []
    for folder in sorted((data_root / 'train').iterdir()):
        for path in rng.choice(sorted(folder.glob('*.png')), PER_CLASS, replace=False):
            lines.append(f'{folder.name}/{path.name} {folder.name}\n')
    out = data_root / f'digits-{len(lines)}-seed{seed}.txt'
    out.write_text(''.join(lines))
    return out


def path_of(name: str) -> Path:
    """Return the path of a config."""
    return CONFIGS / f'{name}.py'


def compare(
    work_dir: Path, data_root: Path, seed: int, options: Callable[[str], dict], verbose: bool
) -> tuple[float, float, Path]:
    """Train with one seed.

    Returns:
        The accuracies from scratch and after pre-training, and the pre-trained checkpoint.
    """

    def fit(name: str, extra: dict) -> tuple[Path, Path]:
        changes = {'randomness.seed': seed} | extra | options(name)
        config = write_config(path_of(name), work_dir / f'configs/{name}.py', changes)
        return config, train(config, work_dir / name, verbose)

    def accuracy(name: str, extra: dict) -> float:
        return measure(*fit(name, extra), verbose)['accuracy/top1']

    _, pretrained = fit(PRETRAIN, {})
    labels = {'train_dataloader.dataset.ann_file': str(write_labels(data_root, seed).resolve())}
    weights = {'model.backbone.init_cfg.checkpoint': str(pretrained)}
    return accuracy(SCRATCH, labels), accuracy(FINETUNE, labels | weights), pretrained


def reconstruct(config: Path, checkpoint: Path, paths: list[Path]) -> tuple[Tensor, Tensor, Tensor]:
    """Reconstruct images with a masked autoencoder.

    Returns:
        The images with grey at masked patches, with predictions at masked patches, and unchanged:
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

    def pixels(patches: Tensor) -> Tensor:
        return ((model.head.unpatchify(patches) * std + mean) / 255).clamp(0, 1)

    masked = original * (1 - mask)
    return pixels(masked), pixels(masked + predicted * mask), pixels(original)


def draw(rows: tuple[Tensor, Tensor, Tensor], out: Path) -> None:
    """Draw masked, reconstructed and original images below each other."""
    count = len(rows[0])
    with picture(out, 3, count, figsize=(count + 1.2, 3.5)) as (fig, axes):
        fig.suptitle('Unseen digits with three quarters masked, filled in by a VRWKV', fontsize=15)
        for line, images, label in zip(
            axes, rows, ('masked', 'filled in', 'original'), strict=True
        ):
            line[0].set_ylabel(label, fontsize=12)
            for ax, image in zip(line, images, strict=True):
                ax.imshow(image.permute(1, 2, 0))
                ax.set(xticks=[], yticks=[])


def table(results: dict[int, tuple[float, float]]) -> str:
    """Format accuracies by seed as a Markdown table, with means and standard deviations."""
    rows = [
        (str(seed), f'{scratch:.2f}', f'{tuned:.2f}', f'{tuned - scratch:+.2f}')
        for seed, (scratch, tuned) in results.items()
    ]
    columns = [*zip(*results.values(), strict=True), [b - a for a, b in results.values()]]
    means = [f'{statistics.mean(c):.2f} ± {statistics.stdev(c):.2f}' for c in columns]
    header = ('seed', 'from scratch', 'pre-trained', 'gain')
    return markdown_table(header, [*rows, ('mean ± sd', *means)])


def run(
    work_dir: Path,
    data_root: Path,
    seeds: tuple[int, ...] = (0, 1, 2),
    options: Callable[[str], dict] = lambda name: {},
    verbose: bool = False,
) -> None:
    """Compare with each seed, then print the table and draw the first seed's pictures.

    Args:
        work_dir: Folder for all output.
        data_root: Folder of the digits, which are written if they are missing.
        seeds: At least two seeds.
        options: Returns settings to change in a config, given its name.
        verbose: Whether to show everything that the log files contain.
    """
    write_digits(data_root)
    results, checkpoints = {}, []
    for seed in seeds:
        *accuracies, checkpoint = compare(
            work_dir / f'seed{seed}', data_root, seed, options, verbose
        )
        results[seed] = tuple(accuracies)
        checkpoints.append(checkpoint)
    drawn = work_dir / 'reconstruction.png'
    if not is_newer(drawn, checkpoints[0]):
        config = work_dir / f'seed{seeds[0]}/configs/{PRETRAIN}.py'
        paths = [sorted((data_root / 'val' / str(digit)).glob('*.png'))[0] for digit in range(10)]
        draw(reconstruct(config, checkpoints[0], paths), drawn)
    print(f"""
Top-1 accuracy on unseen digits in percent, after training on {10 * PER_CLASS} labels:

{table(results)}

Picture of masked, filled-in and original digits: {drawn}""")


def main() -> None:
    """Run the comparison from the command line."""
    args = make_parser(__doc__, 'work_dirs/mae_digits').parse_args()
    work_dir = (args.work_dir or ROOT / 'work_dirs/mae_digits').resolve()
    run(work_dir, ROOT / 'data/digits', verbose=args.verbose)


if __name__ == '__main__':
    main()
