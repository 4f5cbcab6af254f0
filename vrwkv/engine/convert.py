"""Writing weights lean: without optimizer, settings and other state of the training."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from .hooks import AtomicLocalBackend

#: The kinds of file that :func:`save_weights` writes.
SUFFIXES = ('.safetensors', '.pth')


def dataset_meta(checkpoint: Mapping) -> dict:
    """Find the names of a checkpoint's classes, which inferencers show.

    Args:
        checkpoint: A checkpoint of OpenMMLab's, 1.x or 2.x.

    Returns:
        ``classes`` and ``palette`` as far as they are there.
    """
    meta = checkpoint.get('meta') or {}
    old = {'classes': meta.get('CLASSES'), 'palette': meta.get('PALETTE')}
    return meta.get('dataset_meta') or {key: value for key, value in old.items() if value}


def save_weights(weights: Mapping[str, Tensor], path: str | os.PathLike, **meta) -> None:
    """Write weights to a file, whole or not at all.

    Args:
        weights: Tensors by name; what is no tensor is left out.
        path: A ``.safetensors`` file, or a ``.pth`` file with them under ``'state_dict'``.
        **meta: What to keep beside them under ``'meta'``. A ``.safetensors`` file has no place
            for it.

    Raises:
        ValueError: If the path ends otherwise.
        ImportError: If writing ``.safetensors`` needs its package.
        OSError: If the file cannot be written, the disk being full for example.
    """
    path = Path(path)
    check_suffix(path)
    # Copies, since a view would bring along all of the tensor that it is a part of.
    weights = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in weights.items()
        if isinstance(value, Tensor)
    }
    if path.suffix == '.safetensors':
        try:
            from safetensors.torch import save
        except ImportError as error:
            raise ImportError(
                f'writing {path} needs the safetensors package: pip install safetensors'
            ) from error
        data = save(weights, metadata={'format': 'pt'})
    else:
        stream = io.BytesIO()
        torch.save({'state_dict': weights, 'meta': meta}, stream)
        data = stream.getbuffer()
    AtomicLocalBackend().put(data, path)


def check_suffix(path: str | os.PathLike) -> None:
    """Raise an error unless :func:`save_weights` can write to this path.

    Args:
        path: The file to write.

    Raises:
        ValueError: If it ends otherwise.
    """
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f'{path} must end in {" or ".join(SUFFIXES)}')


def read_classes(path: str | os.PathLike) -> list[str]:
    """Read the ids of a data set's classes.

    Args:
        path: A folder that has one folder for each class, or a text file that has one id at the
            start of each line.

    Returns:
        The ids, sorted, as data sets number them.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If there is no class in it, or one twice.
    """
    path = Path(path)
    if path.is_dir():
        ids = [child.name for child in path.iterdir() if child.is_dir()]
    elif path.is_file():
        ids = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    else:
        raise FileNotFoundError(
            f'{path} does not exist: name a folder with a folder for each class, or a text file '
            'with an id on each line'
        )
    if not ids or len(set(ids)) != len(ids):
        twice = sorted({name for name in ids if ids.count(name) > 1})[:3] if ids else []
        raise ValueError(f'{path} has {f"classes twice: {twice}" if ids else "no classes"}')
    return sorted(ids)


def subset_head(
    weights: Mapping[str, Tensor], classes: Sequence[str], subset: Sequence[str]
) -> dict[str, Tensor]:
    """Reduce the last layer of a classifier's head to some of its classes.

    Args:
        weights: The classifier's weights, with a head of mmpretrain's: ``head.fc`` or
            ``head.layers.N.fc``.
        classes: The ids of its classes, in the order of the head's rows.
        subset: The ids of the classes to keep, in the order that they are to have.

    Returns:
        The weights with a smaller head.

    Raises:
        ValueError: If there is no such head, it has another number of rows, or a class of the
            subset is not among the classes.
    """
    names = [name for name in weights if name.startswith('head.') and name.endswith('fc.weight')]
    if not names:
        raise ValueError(
            "there is no head of mmpretrain's among the weights: no 'head.fc.weight' and no "
            f"'head.layers.N.fc.weight' ({', '.join(list(weights)[:3])}, ...)"
        )
    last = max(names).removesuffix('weight')
    rows = len(weights[f'{last}weight'])
    if rows != len(classes):
        raise ValueError(
            f'the head has {rows} classes, but {len(classes)} are listed: they must be all '
            'classes that the checkpoint was trained with'
        )
    row = {name: index for index, name in enumerate(classes)}
    missing = [name for name in subset if name not in row]
    if missing:
        raise ValueError(
            f'{len(missing)} of the {len(subset)} classes are not among the {rows} of the '
            f'checkpoint: {", ".join(missing[:5])}'
        )
    index = torch.tensor([row[name] for name in subset])
    return {
        name: value[index] if name in (f'{last}weight', f'{last}bias') else value
        for name, value in weights.items()
    }
