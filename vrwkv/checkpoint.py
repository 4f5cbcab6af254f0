"""Read checkpoints safely, and explain why a file cannot be read.

PyTorch always unpickles with ``weights_only=True`` here: a downloaded checkpoint cannot run code.
The other objects in mmengine's checkpoints, beside tensors, are allowed by name below.
"""

import argparse
import codecs
import json
import logging
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .weights import CheckpointError

try:
    from numpy._core import multiarray
except ImportError:  # numpy < 2
    from numpy.core import multiarray

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise

    class HistoryBuffer:
        """Unpickle mmengine's log histories without mmengine."""

    HistoryBuffer.__module__ = 'mmengine.logging.history_buffer'

    def print_log(message: str, logger: str) -> None:
        """Log through Python's logging, as mmengine's function does through mmengine's logger."""
        logging.getLogger('vrwkv').info(message)

else:
    from mmengine.logging import HistoryBuffer, print_log

#: Keys under which training codes store the weights in a checkpoint, in the order of the search.
#: The weights come before their moving average ('model_ema'), as in upstream's loading.
WEIGHT_KEYS = ('state_dict', 'model', 'module', 'model_ema')

_ZIP_MAGIC = b'PK\x03\x04'


def _history_statistic(owner: type, name: str) -> Callable:
    """Replace ``getattr``, which pickles of HistoryBuffer call to name its statistics."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'current', 'mean'):
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL getattr({owner!r}, {name!r})')
    return getattr(HistoryBuffer, name, None)


def _renamed(function: Callable, full_name: str) -> Callable:
    """Wrap ``function`` so that PyTorch's allow-list knows it as ``full_name``."""

    def alias(*args):
        return function(*args)

    alias.__module__, _, alias.__name__ = full_name.rpartition('.')
    alias.__qualname__ = alias.__name__
    return alias


class _Settings:
    """Unpickle ``yacs.config.CfgNode``, a dict, as a plain one.

    Swin's training code and its descendants, such as VRWKV-Large's, save their settings in it.
    """

    def __new__(cls) -> OrderedDict:
        return OrderedDict()  # not a dict, because the pickle also sets attributes


_Settings.__module__, _Settings.__name__ = 'yacs.config', 'CfgNode'
_Settings.__qualname__ = _Settings.__name__


def allow_harmless_globals() -> None:
    """Let ``torch.load(weights_only=True)`` read the objects that training codes save with weights.

    Once is not enough: PyTorch forgets an object where another library ends its own permission, as
    timm does for ``argparse.Namespace``.
    """
    torch.serialization.add_safe_globals(_harmless_globals())


@cache
def _harmless_globals() -> list:
    """Return what training codes save with weights, and nothing that runs any code.

    mmengine saves log histories (``HistoryBuffer``) and numpy arrays and numbers, written under
    numpy 1.x or 2.x, which differ in module names. Upstream's codes for Large and MAE save their
    settings: a yacs ``CfgNode`` (see :class:`_Settings`; yacs is not needed) and an
    ``argparse.Namespace``.
    """
    scalar_types = 'bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64'
    return [
        HistoryBuffer,
        np.ndarray,
        np.dtype,
        _Settings,
        argparse.Namespace,
        codecs.encode,  # the bytes of an array; PyTorch >= 2.5 allows it anyway
        *(type(np.dtype(name)) for name in scalar_types.split()),
        *(
            _renamed(function, f'{package}.multiarray.{function.__name__}')
            for function in (multiarray._reconstruct, multiarray.scalar)
            for package in ('numpy.core', 'numpy._core')
        ),
        *(_renamed(_history_statistic, f'{m}.getattr') for m in ('builtins', '__builtin__')),
    ]  # fmt: skip


def read_checkpoint(
    file: str | os.PathLike, map_location: Any = None, name: str | None = None
) -> dict:
    """Read a checkpoint without running code from the file.

    Args:
        file (str | PathLike): Path of a ``torch.save`` or ``.safetensors`` file.
        map_location: As for :func:`torch.load`.
        name (str, optional): Name of the file in messages. Defaults to its path.

    Returns:
        dict: The checkpoint, with its weights under ``'state_dict'``. In the file they are under
        one of :data:`WEIGHT_KEYS` (the first one counts) or flat.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the file is truncated, not a checkpoint, holds objects that
            ``weights_only`` refuses, or holds no weights.
        ImportError: If it is a ``.safetensors`` file and that package is not installed.
    """
    file = Path(file).expanduser()
    name = name or str(file)
    if file.is_dir():
        raise CheckpointError(f"Checkpoint '{name}' is a directory: give the path of a file in it.")
    if not file.is_file():
        raise FileNotFoundError(
            f"Checkpoint '{name}' does not exist (looked for {file.absolute()})."
        )
    allow_harmless_globals()
    if name.endswith('.safetensors'):
        checkpoint = _read_safetensors(file, map_location, name)
    else:
        try:
            checkpoint = torch.load(file, map_location=map_location, weights_only=True)
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception as error:  # unpickling garbage may raise anything
            raise CheckpointError(_explain(file, name, error)) from error
    return with_state_dict(checkpoint, name)


def _read_safetensors(file: Path, map_location: Any, name: str) -> dict:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f"Reading '{name}' needs the safetensors package: pip install safetensors"
        ) from error
    device = map_location if isinstance(map_location, (str, torch.device)) else 'cpu'
    try:
        with safe_open(file, 'pt', device=str(device)) as archive:
            weights = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            meta = json.loads((archive.metadata() or {}).get('vrwkv', 'null'))
        return {'state_dict': weights, **({'meta': meta} if meta else {})}
    except SafetensorError as error:
        raise CheckpointError(
            f"Checkpoint '{name}' is truncated or not a safetensors file: {error}"
        ) from error


def _explain(file: Path, name: str, error: Exception) -> str:
    """Explain why ``torch.load`` failed on ``file``, and the remedy."""
    # PyTorch surrounds its reason with advice to give up safety.
    advice = re.compile(r'\s*(Weights only load|\(\d\)|Check the documentation|$)')
    reason = ' '.join(line for line in str(error).split('\n') if not advice.match(line)).strip()
    refused = re.search(r'GLOBAL ([\w.]+(\(.*\))?)|[Uu]nsupported (class|type) .*', reason)
    if refused:
        return (
            f"Checkpoint '{name}' holds a Python object that cannot be loaded safely: "
            f'{refused[1] or refused[0]}. Only tensors, plain containers and what mmengine itself '
            'saves are accepted. If you trust the file, load it once inside '
            '`torch.serialization.safe_globals([...])` with that class, and save its weights '
            "alone: torch.save({'state_dict': weights}, new_path)."
        )
    size = file.stat().st_size
    with file.open('rb') as stream:
        head = stream.read(16)
    what = f"Checkpoint '{name}' ({size:,} bytes)"
    if size == 0:
        return f'{what} is empty. Write or download it again.'
    if head.startswith(_ZIP_MAGIC):
        if not zipfile.is_zipfile(file):
            return (
                f'{what} is truncated: the end of the file is missing. Write or download it again.'
            )
        with zipfile.ZipFile(file) as archive:
            if any(member.endswith('/data.pkl') for member in archive.namelist()):
                if archive.testzip() is None:
                    return f'{what} cannot be loaded: {reason}'
                return f'{what} is damaged (wrong checksum). Write or download it again.'
        return f'{what} is not a PyTorch checkpoint: it is a zip archive of something else.'
    if head.startswith(b'\x80'):  # a pickle: how PyTorch < 1.6 wrote its files
        return f'{what} is truncated, or a pickle that PyTorch did not write: {reason}'
    return f'{what} is not a PyTorch checkpoint: it begins with {head!r}.'


def with_state_dict(checkpoint: Any, name: str) -> dict:
    """Return a checkpoint with its weights under ``'state_dict'``.

    Args:
        checkpoint: Weights, flat or under one of :data:`WEIGHT_KEYS`, of a wrapped model or not.
        name (str): Name of the file in messages.

    Raises:
        CheckpointError: If there are no weights.
    """
    if not isinstance(checkpoint, Mapping):
        raise CheckpointError(
            f"Checkpoint '{name}' holds a {type(checkpoint).__name__}, not a dict of weights. Save "
            'model.state_dict() instead.'
        )
    for key in WEIGHT_KEYS:
        if _is_weights(checkpoint.get(key)):
            if key != 'state_dict':
                print_log(
                    f"Using the weights under '{key}' in checkpoint {name}.", logger='current'
                )
            rest = {k: v for k, v in checkpoint.items() if k not in (key, 'state_dict')}
            return {'state_dict': _unwrapped(checkpoint[key]), **rest}
    if _is_weights(checkpoint):
        return {'state_dict': _unwrapped(checkpoint)}
    raise CheckpointError(
        f"Checkpoint '{name}' holds no weights: expected a dict of named tensors, flat or under "
        f'one of {list(WEIGHT_KEYS)}, but its keys are {[str(key) for key in checkpoint][:10]}.'
    )


def _unwrapped(weights: Mapping) -> Mapping:
    """Remove what PyTorch's wrappers add: parallel, averaged and compiled models."""
    inner = {key: value for key, value in weights.items() if key not in ('n_averaged', 'steps')}
    for prefix in ('module.', '_orig_mod.'):
        if inner and all(key.startswith(prefix) for key in inner):
            return _unwrapped(OrderedDict((k.removeprefix(prefix), v) for k, v in inner.items()))
    return weights


def _is_weights(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(key, str) for key in value)
        and any(isinstance(tensor, torch.Tensor) for tensor in value.values())
    )
