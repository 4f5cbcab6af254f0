"""Models for the analysis tools, built from the configs of any task or library."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from torch import nn

import vrwkv.engine  # noqa: F401 (safe checkpoint loading)
from vrwkv.mmcv_ops import serve_mmcv_ops
from vrwkv.weights import dataset_meta


def read_config(name: str) -> Config:
    """Read a config.

    Args:
        name: Its path, or ``package::path`` for a config of an installed library, such as
            ``mmpretrain::deit/deit-tiny_4xb256_in1k.py``.

    Returns:
        The config, its ``custom_imports`` imported.

    Raises:
        FileNotFoundError: If there is no such file, or no such library.
        ValueError: If the config has no model.
    """
    if name.startswith(('mmdet::', 'mmseg::')):
        serve_mmcv_ops()  # which these configs do not import
    path = _shipped(name) if '::' in name else Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"config '{name}' does not exist (looked for {path.absolute()}). Name a config of a "
            'library like mmpretrain::deit/deit-tiny_4xb256_in1k.py'
        )
    cfg = Config.fromfile(path)
    if 'model' not in cfg:
        raise ValueError(f"'{name}' has no model: expected the config of a model")
    return cfg


def _shipped(name: str) -> Path:
    """Find a config of an installed library.

    mmengine's ``get_config`` also finds it, but installs a missing library with pip.
    """
    package, _, path = name.partition('::')
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"'{name}' is a config of {package}, which is not installed")
    return Path(spec.origin).parent / '.mim/configs' / path


def build_model(cfg: Config, backbone_only: bool = False) -> nn.Module:
    """Build a config's model for one process, without loading weights.

    Args:
        cfg: The config.
        backbone_only: Whether to build only its ``backbone``.

    Returns:
        The model, in evaluation mode, with ``BatchNorm`` in place of ``SyncBN``.

    Raises:
        ValueError: If the model has no backbone.
    """
    scope = cfg.get('default_scope', 'mmengine')
    arguments = dict(cfg.model)
    if backbone_only:
        if 'backbone' not in arguments:
            raise ValueError(f'the model, a {arguments.get("type")}, has no backbone')
        arguments = arguments['backbone']
    elif scope == 'mmpretrain' and 'data_preprocessor' in cfg:
        arguments.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(scope), _quiet():
        model = revert_sync_batchnorm(MODELS.build(arguments))
    model.eval()  # mmdet's ResNet returns nothing here
    return model


def load_model(cfg: Config, checkpoint: str | None = None) -> nn.Module:
    """Build a config's model with the weights of a checkpoint, or with random weights.

    Args:
        cfg: The config.
        checkpoint: File or URL of weights, which must all fit. None initialises the model as a
            training does, but without loading ``Pretrained`` weights.

    Returns:
        The model, in evaluation mode. Its ``dataset_meta`` has the classes that the checkpoint
        names.
    """
    model = build_model(cfg)
    if checkpoint is not None:
        loaded = load_checkpoint(
            model, str(checkpoint), map_location='cpu', strict=True, logger='silent'
        )
        model.dataset_meta = dataset_meta(loaded)
        return model
    for module in model.modules():
        init_cfg = getattr(module, 'init_cfg', None)
        if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
            module.init_cfg = None
    with _quiet():
        model.init_weights()
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress mmengine's logs of building and initialising a model."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
