"""Models for the analysis tools, from the configs of any of the libraries."""

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


def read_config(name: str) -> Config:
    """Read a config.

    Args:
        name: Its path, or ``package::path`` for one that a library ships, such as
            ``mmpretrain::deit/deit-tiny_4xb256_in1k.py``.

    Returns:
        The config, its ``custom_imports`` imported.

    Raises:
        FileNotFoundError: If there is no such file, or no such library.
        ValueError: If it is no config of a model.
    """
    path = _shipped(name) if '::' in name else Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"config '{name}' does not exist (looked for {path.absolute()}). One that a library "
            'ships is named like mmpretrain::deit/deit-tiny_4xb256_in1k.py'
        )
    cfg = Config.fromfile(path)
    if 'model' not in cfg:
        raise ValueError(f"'{name}' has no model: expected the config of one")
    return cfg


def _shipped(name: str) -> Path:
    """Find a config that an installed library ships.

    mmengine's ``get_config`` does so, too, but reads the library's whole model index each time.
    """
    package, _, path = name.partition('::')
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"'{name}' is a config of {package}, which is not installed")
    return Path(spec.origin).parent / '.mim/configs' / path


def build_model(cfg: Config, backbone_only: bool = False) -> nn.Module:
    """Build a config's model as it is before any weights are loaded, for one process.

    Args:
        cfg: The config.
        backbone_only: Whether to build its ``backbone`` alone.

    Returns:
        The model, in evaluation mode. Its ``SyncBN`` layers are plain ones, which a CPU can run.

    Raises:
        ValueError: If there is no backbone to build alone.
    """
    scope = cfg.get('default_scope', 'mmengine')
    arguments = dict(cfg.model)
    if backbone_only:
        if 'backbone' not in arguments:
            raise ValueError(f'the model, a {arguments.get("type")}, has no backbone of its own')
        arguments = arguments['backbone']
    elif scope == 'mmpretrain' and 'data_preprocessor' in cfg:
        arguments.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(scope), _quiet():
        model = revert_sync_batchnorm(MODELS.build(arguments))
    model.eval()  # mmdet's ResNet returns nothing here
    return model


def load_model(cfg: Config, checkpoint: str | None = None) -> nn.Module:
    """Build a config's model with weights, random ones unless a checkpoint is given.

    Args:
        cfg: The config.
        checkpoint: File or URL of weights, all of which must fit. None draws random ones, as a
            training would start from, save that ``Pretrained`` ones are not looked for.

    Returns:
        The model, in evaluation mode.
    """
    model = build_model(cfg)
    if checkpoint is not None:
        load_checkpoint(model, str(checkpoint), map_location='cpu', strict=True, logger='silent')
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
    """Keep mmengine from logging how it builds a model and draws each of its weights."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
