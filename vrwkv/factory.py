"""Models by name: ``vrwkv.create_model`` and ``vrwkv.list_models``."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from torch import nn

from .classifier import FAMILIES, VisionRWKV
from .variants import SHORT_NAMES, VARIANTS, Variant
from .weights import CheckpointError, load_classifier

_REPOSITORY = re.compile(r'(?:hf-hub:)?([\w.-]+/[\w.-]+?)(?:@([\w./-]+))?')
#: Files of weights in a repository or folder, in the order of the search.
_FILES = ('model.safetensors', 'pytorch_model.bin')
_SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')


def list_models(pattern: str = '*') -> list[str]:
    """List the names that :func:`create_model` takes.

    Args:
        pattern: A pattern with ``*`` and ``?``, such as ``'vrwkv6*'``, in any case.

    Returns:
        The names of the model index, and those without the recipe, such as ``'vrwkv-tiny'``.
    """
    return fnmatch.filter(sorted([*SHORT_NAMES, *VARIANTS]), pattern.lower())


def create_model(
    name: str,
    pretrained: bool | str | os.PathLike = False,
    *,
    num_classes: int | None = None,
    in_channels: int = 3,
    img_size: int | Sequence[int] | None = None,
    out_indices: int | Sequence[int] | None = None,
    features_only: bool = False,
    **model_args,
) -> nn.Module:
    """Build a model by its name; it needs torch alone.

    Args:
        name: One of :func:`list_models`, in any case. A name without a recipe, such as
            ``'vrwkv-large'``, stands for the model for ImageNet-1k.
        pretrained: The weights to load. True for the released file; a path; an address; or a
            repository on the Hugging Face Hub, such as ``'owner/name'`` or
            ``'owner/name@revision'``, which has ``model.safetensors`` or ``pytorch_model.bin``.
        num_classes: Number of classes; 0 for no head. If the weights have another number, the last
            layer of the head keeps its random weights, with a warning. Defaults to the model's.
        in_channels: Channels of the images. If the weights have three, the first convolution is
            adapted as in timm: summed for one channel, otherwise repeated and scaled.
        img_size: Height and width of the position embedding's grid in pixels, to which that of the
            weights is resized. Images of other sizes are accepted, too.
        out_indices: With ``features_only``, the layers whose maps are returned, from 0; negative
            ones count from the end. Defaults to the last.
        features_only: Whether to return the backbone, which returns a tuple of maps ``(B, C,
            h, w)``.
        **model_args: Further arguments of :class:`~vrwkv.VisionRWKV` and its backbone, such as
            ``drop_path_rate``; with ``features_only``, of the backbone.

    Returns:
        A :class:`~vrwkv.VisionRWKV`, or its backbone.

    Raises:
        CheckpointError: If the weights cannot be read or do not fit.
        DownloadError: If the weights cannot be downloaded.
        FileNotFoundError: If there is no such file.
        TypeError: If an argument has a wrong type.
        ValueError: If there is no model of that name, or an argument is out of its range.
    """
    variant = find_variant(name)
    args = variant.backbone | dict(in_channels=in_channels) | model_args
    if img_size is not None:
        args['img_size'] = img_size
    if features_only:
        if num_classes:
            raise ValueError(
                f'a model with features_only=True has no head, but num_classes={num_classes}'
            )
        args['out_indices'] = -1 if out_indices is None else out_indices
        model = FAMILIES[variant.family](**args)
    elif out_indices is not None:
        raise ValueError(f'out_indices={out_indices!r} needs features_only=True')
    else:
        num_classes = variant.num_classes if num_classes is None else num_classes
        args = dict(hidden_dims=variant.hidden_dims if num_classes else None) | args
        model = VisionRWKV(variant.family, num_classes, **args)
    if pretrained not in (False, None):
        _load(model, pretrained, variant)
    return model


def find_variant(name: str) -> Variant:
    """Look a classifier up.

    Args:
        name: Its name in the model index, or the name without the recipe, in any case.

    Raises:
        ValueError: If there is no such model. The message suggests similar names.
    """
    full_name = SHORT_NAMES.get(name.lower(), name.lower())
    if full_name not in VARIANTS:
        from .engine.model_index import unknown_model

        raise ValueError(unknown_model(name, list_models()))
    return VARIANTS[full_name]


def _load(model: nn.Module, source: bool | str | os.PathLike, variant: Variant) -> None:
    """Load weights from a source of :func:`create_model`."""
    from .checkpoint import read_checkpoint

    path = _find_weights(variant.url if source is True else source)
    try:
        load_classifier(model, read_checkpoint(path, 'cpu')['state_dict'])
    except CheckpointError as error:
        raise CheckpointError(f'Cannot load {path}: {error}') from error


def _find_weights(source: str | os.PathLike) -> Path:
    """Return the path of a file of weights, downloaded where that is needed."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            'pretrained must be True, False, a path, an address or a repository of the Hugging '
            f'Face Hub, got {source!r}'
        )
    path, text = Path(source).expanduser(), os.fspath(source)
    if path.is_dir():
        return next((path / file for file in _FILES if (path / file).is_file()), path)
    repository = _REPOSITORY.fullmatch(text)
    if '://' not in text and (path.is_file() or path.suffix in _SUFFIXES or not repository):
        return path
    from .engine.cache import fetch
    from .engine.download import AbsentError, DownloadError

    if '://' in text:
        return fetch(text)
    owner, revision = repository[1], quote(repository[2] or 'main', safe='')
    for file in _FILES:
        try:
            return fetch(
                f'https://huggingface.co/{owner}/resolve/{revision}/{file}',
                name='--'.join([*owner.split('/'), revision, file]),
            )
        except AbsentError:
            continue
    raise DownloadError(
        f'the repository {owner} has none of the files {" and ".join(_FILES)}: give the address of '
        f'a file in it, such as https://huggingface.co/{owner}/resolve/{revision}/FILE'
    )
