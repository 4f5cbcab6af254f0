"""Everything that fits a state dict to a model, and the files that state dicts are saved to.

Needs torch alone. In this order: the checks that the models and mmengine's loading call, the
position embedding, classifiers, the names of upstream's weights, and lean files for the converters.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ._files import write_atomically
from .layers import resize_pos_embed

#: The family of models that each of these parameters marks.
FAMILY_MARKERS = {
    'layers.0.att.spatial_decay': 'VRWKV',
    'layers.0.att.time_decay': 'VRWKV6',
    'layers.0.attn.qkv.weight': 'ViT',
    'decoder_blocks.0.att.spatial_decay': 'MAEVRWKVDecoder',
}
#: Constructor arguments that can be read from the shape of a parameter: its name, the number of
#: its dimensions, and how to compute the argument.
ARGUMENTS = (
    ('embed_dims', 'patch_embed.projection.weight', 4, lambda shape: shape[0]),
    ('num_heads', 'layers.0.att.time_faaaa', 2, lambda shape: shape[0]),
    ('hidden_rate', 'layers.0.ffn.key.weight', 2, lambda shape: shape[0] / shape[1]),
    ('mlp_ratio', 'layers.0.ffn.layers.0.0.weight', 2, lambda shape: shape[0] / shape[1]),
    ('in_channels', 'patch_embed.projection.weight', 4, lambda shape: shape[1]),
    ('patch_size', 'patch_embed.projection.weight', 4, lambda shape: shape[2]),
    ('decoder_embed_dims', 'decoder_embed.weight', 2, lambda shape: shape[0]),
    ('embed_dims', 'decoder_embed.weight', 2, lambda shape: shape[1]),
    ('num_patches', 'decoder_pos_embed', 3, lambda shape: shape[1]),
)
#: Name of the grid of ``pos_embed`` in the state dict of a model whose grid is not square.
GRID_KEY = 'pos_embed_grid'
#: First parts of the names of an adapter's own weights.
ADAPTER_NAMES = ('level_embed', 'spm.', 'interactions.', 'up.', 'norm1', 'norm2', 'norm3', 'norm4')
#: Files that :func:`save_weights` writes.
SUFFIXES = ('.safetensors', '.pth')
#: How to load only the backbone of a checkpoint, for error messages.
LOAD_BACKBONE = (
    "model.backbone.init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.')"
)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or whose weights do not fit the model."""


# --- weights and models that do not fit ---------------------------------------------------------


def require_fit(
    module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str = '', remedy: str = ''
) -> None:
    """Raise an error unless the weights are those of a model of the same family and shapes.

    PyTorch with ``strict=False`` ignores the weights of another model, and mmengine only logs
    them: the model would train from scratch. Missing and additional weights are left to them.

    Args:
        module: A model of one of the :data:`FAMILY_MARKERS`.
        state_dict: The weights.
        prefix: The prefix of the model's own names in the state dict.
        remedy: A sentence that the error message ends with.

    Raises:
        CheckpointError: If the weights are those of another model. The message names the
            constructor arguments that differ, or else the shapes.
    """
    _require_family(module, state_dict, prefix, remedy)
    own, loaded = dict(module.named_parameters()), _below(state_dict, prefix)
    ours, theirs = _arguments(own), _arguments(loaded)
    if _is_part(module, state_dict, prefix):  # which may have fewer layers
        theirs = {name: theirs[name] for name in theirs if not name.endswith('depth')}
    differing = [
        f'{name}={theirs[name]} (here {ours[name]})'
        for name in ours
        if name in theirs and theirs[name] != ours[name]
    ]
    if not differing:
        differing = [
            f'{prefix + name} of shape {tuple(loaded[name].shape)} (here {tuple(value.shape)})'
            for name, value in own.items()
            if name in loaded and loaded[name].shape != value.shape
        ]
    if differing:
        raise CheckpointError(
            f'the state dict is of a {type(module).__name__} with {", ".join(differing[:5])}: '
            f'build the model with the arguments of the checkpoint{remedy and f". {remedy}"}'
        )


def require_whole(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Raise an error unless there are all weights of an adapter, or all of a plain backbone.

    mmengine would only log the missing weights, and train them from scratch.

    Args:
        module: A backbone with an adapter.
        state_dict: The weights.
        prefix: The prefix of the model's own names in the state dict.

    Raises:
        CheckpointError: If weights of an adapter are missing or superfluous, or if weights of the
            plain backbone are missing. A plain backbone may have a final norm layer in addition,
            and may have no layer scale.
    """
    ignored = ('num_batches_tracked', GRID_KEY)
    names = {name for name in module.state_dict() if not name.endswith(ignored)}
    backbone = {name for name in names if not name.startswith(ADAPTER_NAMES)}
    found = {name for name in _below(state_dict, prefix) if not name.endswith(ignored)}
    if found.isdisjoint(names - backbone):  # the weights of a classifier
        missing = {name for name in backbone - found if '.gamma' not in name}
        extra = set()
    else:
        missing, extra = names - found, found - names
    if missing or extra:
        raise CheckpointError(
            f'the state dict does not fit this {type(module).__name__}: it lacks '
            f'{_some(missing)}, and has {_some(extra)} in addition. Build the model with the '
            'arguments of the checkpoint (interaction_indexes, norm_cfg, ...). The weights of a '
            'plain backbone must be complete'
        )


def require_head_fit(head: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Raise an error if a classifier's checkpoint has a head of another shape.

    mmengine skips weights of another shape with a warning: the head would stay random.

    Args:
        head: The head of one of mmpretrain's classifiers.
        state_dict: The weights of a classifier, under upstream's or mmpretrain's names.

    Raises:
        CheckpointError: If a weight under ``head.`` has another shape than in ``head``.
    """
    state_dict = dict(state_dict)
    rename_mlp_head(state_dict)
    for name, own in head.named_parameters(prefix='head'):
        theirs = state_dict.get(name, own)
        if theirs.shape == own.shape:
            continue
        remedy = f'To fine-tune, load the backbone alone: {LOAD_BACKBONE}'
        if theirs.shape[1:] == own.shape[1:] and own.shape[0] == head.num_classes:
            raise CheckpointError(
                f'the checkpoint is of a classifier with {theirs.shape[0]} classes, but the model '
                f'has num_classes={head.num_classes} ({name}). To test, use the config that the '
                f'checkpoint was trained with. {remedy}, or keep the rows of the classes that '
                'both have: tools/model_converters/subset_head.py'
            )
        raise CheckpointError(
            f'the checkpoint has another head: {name} has the shape {tuple(theirs.shape)} there, '
            f'and {tuple(own.shape)} in the model. {remedy}'
        )


def _require_family(
    module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, remedy: str = ''
) -> None:
    own = {name for name, _ in module.named_parameters()}
    marker = next((name for name in FAMILY_MARKERS if name in own), None)
    # Wrappers of the layers, as of FSDP and torch.compile, rename the marker.
    if marker is None or prefix + marker in state_dict or _is_part(module, state_dict, prefix):
        return
    message = (
        f'no weights of {type(module).__name__} in the state dict: there is no '
        f'{prefix + marker!r} among its {len(state_dict)} keys'
    )
    if state_dict:
        message += f' ({", ".join(list(state_dict)[:3])}, ...)'
    elsewhere = [key.removesuffix(marker) for key in state_dict if key.endswith(marker)]
    other = [family for name, family in FAMILY_MARKERS.items() if prefix + name in state_dict]
    if elsewhere:
        message += (
            f'. There are such weights under {elsewhere[0]!r}: load the whole model, or give the '
            f"prefix, as in init_cfg=dict(type='Pretrained', checkpoint=..., "
            f'prefix={elsewhere[0]!r})'
        )
    elif other:
        kind = type(module).__name__.replace(FAMILY_MARKERS[marker], other[0])
        message += f'. It is the checkpoint of another model, a {other[0]}: build a {kind} instead'
    else:
        message += '. Is it the checkpoint of another model?'
    raise CheckpointError(f'{message} {remedy}'.rstrip())


def _is_part(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str) -> bool:
    """Return whether these are some of the model's own weights, as of the trained parameters."""
    names = _below(state_dict, prefix).keys()
    is_partial = bool(names) and FAMILY_MARKERS.keys().isdisjoint(names)
    return is_partial and names <= module.state_dict().keys()


def _below(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the weights whose names start with the prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def _arguments(params: Mapping[str, Tensor]) -> dict[str, float]:
    """Read constructor arguments from the shapes of a model's parameters."""
    args = {}
    for name, stack in (('depth', 'layers.'), ('decoder_depth', 'decoder_blocks.')):
        if depth := len({key.split('.')[1] for key in params if key.startswith(stack)}):
            args[name] = depth
    for name, key, dims, read in ARGUMENTS:
        if key in params and params[key].dim() == dims:
            args[name] = read(params[key].shape)
    return args


def _some(names: Collection[str]) -> str:
    """Name the first three of many."""
    if not names:
        return 'nothing'
    first = ', '.join(sorted(names)[:3])
    return first if len(names) <= 3 else f'{first} and {len(names) - 3} more'


# --- the position embedding ---------------------------------------------------------------------


def fit_pos_embed(module: nn.Module, state_dict: dict[str, Tensor], prefix: str = '') -> None:
    """Resize the position embedding of a state dict to a backbone's grid.

    The state dict records a grid that is not square (``pos_embed_grid``); without a record the
    grid is taken to be square, as in all released weights. A record is removed from the state
    dict, unless the model has one.

    Args:
        module: A backbone with ``num_slots``, ``patch_resolution`` and ``interpolate_mode``.
        state_dict: The weights, changed in place.
        prefix: The prefix of the backbone's own names in it.

    Raises:
        CheckpointError: If the weights are those of another family of models, or if the grid is
            neither recorded nor square and the model has another number of tokens.

    Warns:
        UserWarning: If the grid is not recorded and the model has as many tokens on a grid that is
            not square.
    """
    _require_family(module, state_dict, prefix)
    recorded = state_dict.pop(prefix + GRID_KEY, None)
    if GRID_KEY in dict(module.named_buffers(recurse=False)):
        state_dict[prefix + GRID_KEY] = torch.tensor(module.patch_resolution)
    key = f'{prefix}pos_embed'
    pos_embed = state_dict.get(key)
    target = tuple(module.patch_resolution)
    slots = module.num_slots  # of a class token
    if pos_embed is None or pos_embed.dim() != 3 or pos_embed.shape[1] <= slots:
        return
    tokens = pos_embed.shape[1] - slots
    source = (math.isqrt(tokens),) * 2
    if recorded is not None:
        source = tuple(recorded.tolist())
    elif tokens == math.prod(target) and target[0] != target[1]:
        if math.prod(source) != tokens:
            source = target
        warnings.warn(
            f'the state dict does not record the grid of {key}. Its {tokens} tokens are taken to '
            f'be a grid of {source[0]} x {source[1]}; this model has {target[0]} x {target[1]}. '
            f'If that is wrong, add the grid to the state dict, for example '
            f'{prefix + GRID_KEY!r}: torch.tensor({list(target)})',
            stacklevel=1,  # the caller is PyTorch's
        )
    if math.prod(source) != tokens:
        raise CheckpointError(
            f'cannot resize the {key} of shape {tuple(pos_embed.shape)} in the state dict to the '
            f'grid {target} of this model: '
            + (
                'without a record of its grid, it must be square. Build the model with the '
                'img_size of the checkpoint, which then takes images of other sizes, or add the '
                f'grid to the state dict as {prefix + GRID_KEY!r}: torch.tensor([height, width])'
                if recorded is None
                else f'{prefix + GRID_KEY} = {source} is not the grid of {tokens} tokens'
            )
        )
    resized = resize_pos_embed(pos_embed[:, slots:], source, target, module.interpolate_mode)
    state_dict[key] = torch.cat([pos_embed[:, :slots], resized], dim=1)


# --- the channels of images ---------------------------------------------------------------------


def fit_channels(module: nn.Module, state_dict: dict[str, Tensor], prefix: str = '') -> None:
    """Adapt weights for three channels to a backbone for images with another number.

    The rule is that of :func:`adapt_channels`.

    Args:
        module: A backbone.
        state_dict: The weights, changed in place. Weights for another number stay as they are.
        prefix: The prefix of the backbone's own names in it.

    Warns:
        UserWarning: If the weights are adapted.
    """
    own = dict(module.named_parameters())
    for name in ('patch_embed.projection.weight', 'spm.stem.0.weight'):
        weight = state_dict.get(prefix + name)
        if name not in own or weight is None or weight.dim() != 4 or weight.shape[1] != 3:
            continue
        channels = own[name].shape[1]
        if channels != 3:
            state_dict[prefix + name] = adapt_channels(weight, channels)
            warnings.warn(
                f'{prefix + name} is for images with 3 channels and is adapted to {channels}: '
                'train the model before you use it',
                stacklevel=1,  # the caller is PyTorch's
            )


def input_channels(model: nn.Module) -> int:
    """Return the number of image channels of a model: those of its backbone's first convolution.

    Args:
        model: A backbone, or a model with a ``backbone``.

    Returns:
        The number of channels; 3 for a model without a convolution.
    """
    backbone = getattr(model, 'backbone', None)
    modules = (backbone if isinstance(backbone, nn.Module) else model).modules()
    return next((m.in_channels for m in modules if isinstance(m, nn.Conv2d)), 3)


# --- classifiers --------------------------------------------------------------------------------


def load_classifier(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load weights under any of the names that upstream, mmpretrain and this project write.

    The weights may be those of a classifier, of a backbone alone, of masked pre-training, or of a
    detector or segmentor, whose adapter is left out. The first convolution is adapted to the
    model's channels. Where the numbers of classes differ, the last layer of the head keeps its
    values, with a warning.

    Args:
        model: A :class:`~vrwkv.VisionRWKV` or a plain backbone.
        state_dict: The weights, in a file's order.

    Raises:
        CheckpointError: If the weights are those of another model, or incomplete.

    Warns:
        UserWarning: If the head, or its last layer, keeps its values.
    """
    backbone = getattr(model, 'backbone', model)
    weights = classifier_weights(state_dict)
    if not any(name.startswith('backbone.') for name in weights):
        _require_family(backbone, state_dict, prefix='')
    weights, head = _below(weights, 'backbone.'), _below(weights, 'head.')
    projection = 'patch_embed.projection.weight'
    if projection in weights:
        channels = backbone.patch_embed.projection.in_channels
        weights[projection] = adapt_channels(weights[projection], channels)
    result = backbone.load_state_dict(weights, strict=False)
    if result.missing_keys or result.unexpected_keys:
        raise CheckpointError(
            f'the weights do not fit this {type(backbone).__name__}: they lack '
            f'{_some(result.missing_keys)}, and have {_some(result.unexpected_keys)} in addition: '
            'build the model with the arguments of the checkpoint (init_values, key_norm, '
            'final_norm, ...)'
        )
    if model is not backbone and model.head.state_dict():
        _load_head(model.head, head)


def classifier_weights(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename weights to ``backbone.*`` and ``head.*``, as mmpretrain's classifiers name them.

    Args:
        state_dict: Weights in one of the forms of :func:`load_classifier`.

    Returns:
        The weights of the backbone and of the head; others are left out.
    """
    weights = dict(state_dict)
    if 'blocks.0.att.spatial_decay' in weights:
        weights = from_upstream_mae(weights)
    elif not FAMILY_MARKERS.keys().isdisjoint(weights):
        weights = {
            name if name.startswith('head.') else f'backbone.{name}': value
            for name, value in weights.items()
        }
    rename_mlp_head(weights)
    adapter = tuple(f'backbone.{name}' for name in ADAPTER_NAMES)
    return {
        name: value
        for name, value in weights.items()
        if name.startswith(('backbone.', 'head.')) and not name.startswith(adapter)
    }


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """Adapt the first convolution to images with other channels, by timm's rule.

    The response to images whose channels are equal stays the same.

    Args:
        weight: The weight of the convolution, of shape ``(C, 3, P, P)``.
        channels: Channels of the images.

    Returns:
        A weight of shape ``(C, channels, P, P)``: the sum over the channels for one channel,
        otherwise the channels repeated in order and multiplied by ``3 / channels``.

    Raises:
        CheckpointError: If the weight is not for three channels, and ``channels`` is neither one
            nor the weight's own number.
    """
    source = weight.shape[1]
    if channels == source:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    if source != 3:
        raise CheckpointError(
            f'the weights are for images with {source} channels and cannot be adapted to '
            f'{channels}: only weights for 3 channels can'
        )
    return weight[:, [index % 3 for index in range(channels)]] * (3 / channels)


def _load_head(head: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a head; its last layer keeps its values if the number of classes differs."""
    own = head.state_dict()
    last = [name for name in own if name.startswith(f'{head.last_name}.')]
    if not weights:
        warnings.warn('the weights have no head: the head stays random', stacklevel=5)
        return
    if not last:  # the model has the hidden layer alone
        weights = {name: value for name, value in weights.items() if name in own}
    fits = weights.keys() == own.keys() and all(
        weights[name].shape[name in last :] == own[name].shape[name in last :] for name in own
    )
    if not fits:
        raise CheckpointError(
            f'the head of the weights ({_shapes(weights)}) does not fit the one of this model '
            f'({_shapes(own)}): build the model with the hidden_dims of the checkpoint, or with '
            'num_classes=0 and then call reset_classifier'
        )
    classes = [len(values[last[0]]) for values in (weights, own) if last]
    if len(set(classes)) > 1:
        warnings.warn(
            f'the weights are for {classes[0]} classes and the model has {classes[1]}: the last '
            'layer of the head stays random',
            stacklevel=5,
        )
        weights = {name: value for name, value in weights.items() if name not in last}
    head.load_state_dict(weights, strict=False)


def _shapes(weights: Mapping[str, Tensor]) -> str:
    """Name weights with their shapes."""
    return ', '.join(f'{name} of shape {tuple(value.shape)}' for name, value in weights.items())


# --- names of upstream's weights ----------------------------------------------------------------


def rename_mlp_head(state_dict: dict[str, Tensor], prefix: str = '') -> None:
    """Rename the MLP head of upstream's classifiers to mmpretrain's names.

    VRWKV-Large has ``head.0``, tanh and ``head.2``; in ``StackedLinearClsHead`` these are
    ``head.layers.0.fc`` and ``head.layers.1.fc``.

    Args:
        state_dict: The weights, changed in place. Other heads keep their names.
        prefix: The prefix of the classifier's names in it.
    """
    head = f'{prefix}head.'
    names = {
        f'{head}{upstream}.{kind}': f'{head}layers.{index}.fc.{kind}'
        for index, upstream in enumerate((0, 2))
        for kind in ('weight', 'bias')
    }
    if {key for key in state_dict if key.startswith(head)} == set(names):
        for old, new in names.items():
            state_dict[new] = state_dict.pop(old)


def from_upstream_mae(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of upstream's MAE to the names of mmpretrain's ``MAE``.

    Args:
        state_dict: Weights under upstream's names (``blocks.N``, ``decoder_blocks.N``, ...).

    Returns:
        The same weights under ``backbone.`` (``MAEVRWKV``) and ``neck.`` (``MAEVRWKVDecoder``).

    Raises:
        ValueError: If they are the weights of another model.
    """
    if 'blocks.0.att.spatial_decay' not in state_dict:
        raise ValueError(
            "not the weights of upstream's VRWKV MAE: there is no 'blocks.0.att.spatial_decay' "
            f'among the keys {list(state_dict)[:3]}...'
        )
    renamed = {}
    for name, value in state_dict.items():
        module = name.partition('.')[0]
        if module in ('pos_embed', 'patch_embed', 'ln1'):
            renamed[f'backbone.{name}'] = value
        elif module == 'blocks':
            renamed[f'backbone.layers.{name.removeprefix("blocks.")}'] = value
        else:
            renamed[f'neck.{name}'] = value
    return renamed


# --- files for the converters -------------------------------------------------------------------


def dataset_meta(checkpoint: Mapping) -> dict:
    """Return the names and colours of a checkpoint's classes, which inferencers show.

    Args:
        checkpoint: A checkpoint of OpenMMLab 1.x or 2.x.

    Returns:
        A dict with ``classes`` and ``palette``, each only if the checkpoint has it.
    """
    meta = checkpoint.get('meta') or {}
    old = {'classes': meta.get('CLASSES'), 'palette': meta.get('PALETTE')}
    return meta.get('dataset_meta') or {key: value for key, value in old.items() if value}


def save_weights(weights: Mapping[str, Tensor], path: str | os.PathLike, **meta) -> None:
    """Write weights to a file, completely or not at all.

    Args:
        weights: Tensors by name. Other values are left out.
        path: A ``.safetensors`` file, or a ``.pth`` file with the weights under ``'state_dict'``.
        **meta: Stored in a ``.pth`` file under ``'meta'``. A ``.safetensors`` file only has the
            names and colours of ``dataset_meta``.

    Raises:
        ValueError: If the path has another suffix.
        ImportError: If the file is to be ``.safetensors`` and that package is not installed.
        OSError: If the file cannot be written, for example because the disk is full.
    """
    path = Path(path)
    check_suffix(path)
    # Copy, because a view would be saved with all of the tensor that it is a part of.
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
        # JSON would turn the numbers of a label_map into text.
        known = (meta.get('dataset_meta') or {}).items()
        names = {key: value for key, value in known if key in ('classes', 'palette')}
        facts = {'vrwkv': json.dumps({'dataset_meta': names})} if names else {}
        data = save(weights, metadata={'format': 'pt', **facts})
    else:
        stream = io.BytesIO()
        torch.save({'state_dict': weights, 'meta': meta}, stream)
        data = stream.getbuffer()
    write_atomically(path, data)


def check_suffix(path: str | os.PathLike) -> None:
    """Raise an error unless :func:`save_weights` can write to this path.

    Args:
        path: The file to write.

    Raises:
        ValueError: If it has another suffix than the :data:`SUFFIXES`.
    """
    if Path(path).suffix not in SUFFIXES:
        raise ValueError(f'{path} must end in {" or ".join(SUFFIXES)}')


def read_classes(path: str | os.PathLike) -> list[str]:
    """Read the ids of a data set's classes.

    Args:
        path: A folder with a folder for each class, or a UTF-8 text file with an id at the start
            of each line. A byte order mark is ignored.

    Returns:
        The ids in sorted order, in which data sets number them.

    Raises:
        FileNotFoundError: If there is no such folder or file.
        ValueError: If the file is not UTF-8 text, has no class, or has a class twice.
    """
    path = Path(path)
    if path.is_dir():
        ids = [child.name for child in path.iterdir() if child.is_dir()]
    elif path.is_file():
        try:
            # Joined files have a mark before the first line of each.
            text = path.read_text(encoding='utf-8').replace('\ufeff', '')
        except UnicodeDecodeError as error:
            raise ValueError(f'{path} is not UTF-8 text ({error}): save it as UTF-8') from error
        ids = [line.split()[0] for line in text.splitlines() if line.strip()]
    else:
        raise FileNotFoundError(
            f'{path} does not exist: give a folder with a folder for each class, or a text file '
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
        weights: The weights of a classifier with one of mmpretrain's heads: ``head.fc`` or
            ``head.layers.N.fc``.
        classes: The ids of its classes, in the order of the head's rows.
        subset: The ids of the classes to keep, in their new order.

    Returns:
        The weights with a smaller head.

    Raises:
        ValueError: If there is no such head, if it has another number of rows, or if a class of
            the subset is not among the classes.
    """
    names = [name for name in weights if name.startswith('head.') and name.endswith('fc.weight')]
    if not names:
        raise ValueError(
            "the weights have none of mmpretrain's heads: no 'head.fc.weight' and no "
            f"'head.layers.N.fc.weight' ({', '.join(list(weights)[:3])}, ...)"
        )
    last = max(names).removesuffix('weight')
    rows = len(weights[f'{last}weight'])
    if rows != len(classes):
        raise ValueError(
            f'the head has {rows} classes, but {len(classes)} are listed: list all classes that '
            'the checkpoint was trained with'
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
