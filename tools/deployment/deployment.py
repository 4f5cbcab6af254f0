"""What the export tools share: their command line, and data of a config."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, DefaultScope
from torch import Tensor

from vrwkv.export import Deployable, Export
from vrwkv_ops.decomposition import FORMS

ERRORS = (FileNotFoundError, ImportError, OSError, RuntimeError, TypeError, ValueError)


def parser(description: str, suffix: str, forms: Sequence[str] = FORMS) -> argparse.ArgumentParser:
    """Return the command line of an export."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument('config', help='path, or package::path for one of an installed library')
    result.add_argument('checkpoint', help='file or URL of the weights')
    result.add_argument('out', type=Path, help=f'the file to write, {suffix}')
    size = result.add_mutually_exclusive_group()
    size.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'), help='pixels of the images')
    size.add_argument('--dynamic', action='store_true', help='take images of any size and number')
    result.add_argument('--batch', type=int, default=1, help='images at a time (default: 1)')
    result.add_argument(
        '--form',
        choices=forms,
        default=forms[0],
        help='how Bi-WKV is computed (default: %(default)s, see docs/deployment.md)',
    )
    result.add_argument(
        '--normalize',
        action='store_true',
        help="put the config's mean and standard deviation into the model: it takes RGB images "
        'with values from 0 to 255',
    )
    return result


def run(export: Callable[..., Export], args: argparse.Namespace, **kwargs: object) -> Export:
    """Export with the arguments of a command line, and print the differences."""
    try:
        result = export(
            args.config,
            weights=args.checkpoint,
            out=args.out,
            size=args.shape,
            batch=args.batch,
            dynamic=args.dynamic,
            form=args.form,
            normalize=args.normalize,
            **kwargs,
        )
    except ERRORS as error:
        sys.exit(f'Error: {error}')
    for shape, difference in result.errors.items():
        size = ' x '.join(map(str, shape))
        print(f'{size}: differs from PyTorch by {difference:.1e} of the largest output')
    files = [result.path]
    if result.path.suffix == '.xml':  # OpenVINO keeps the weights beside it
        files.append(result.path.with_suffix('.bin'))
    megabytes = sum(file.stat().st_size for file in files) / 1e6
    print(f'{result.path}, {megabytes:.1f} MB, form {result.form}')
    return result


def images_of(
    cfg: Config, model: Deployable, shape: tuple[int, ...] | None, number: int
) -> Iterator[tuple[Tensor, object]]:
    """Read images of a config's validation set, evenly spread, as the exported model takes them.

    Args:
        cfg: The config.
        model: The model in PyTorch.
        shape: Shape of the batch of a static model; images of another size raise an error.
        number: Number of images.

    Yields:
        A batch of one image, and its data sample.

    Raises:
        ValueError: If an image does not have the size of a static model.
    """
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope', 'mmengine')):
        data = DATASETS.build(cfg.val_dataloader.dataset)
    number = min(number, len(data))
    for i in range(number):
        batch = model.model.data_preprocessor(pseudo_collate([data[i * len(data) // number]]))
        images = model.unnormalize(batch['inputs'])
        if shape is not None and images.shape[1:] != torch.Size(shape[1:]):
            raise ValueError(
                f'the images of the validation set are {tuple(images.shape[2:])}, and the model '
                f'takes {tuple(shape[2:])}: export with --dynamic or --shape '
                f'{images.shape[2]} {images.shape[3]}'
            )
        yield images, batch['data_samples'][0]
