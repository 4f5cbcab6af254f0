"""Models for the analysis tools, from the configs of any of the libraries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mmengine.config import Config
from mmengine.hub import get_config
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
        FileNotFoundError: If there is no such file.
        ValueError: If it is no config of a model.
    """
    if '::' in name:
        cfg = get_config(name)
    elif not Path(name).is_file():
        raise FileNotFoundError(
            f"config '{name}' does not exist (looked for {Path(name).absolute()}). One that a "
            'library ships is named like mmpretrain::deit/deit-tiny_4xb256_in1k.py'
        )
    else:
        cfg = Config.fromfile(name)
    if 'model' not in cfg:
        raise ValueError(f"'{name}' has no model: expected the config of one")
    return cfg


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model as it is before any weights are loaded, for one process.

    Args:
        cfg: The config.

    Returns:
        The model, in evaluation mode. Its ``SyncBN`` layers are plain ones, which a CPU can run.
    """
    scope = cfg.get('default_scope', 'mmengine')
    with DefaultScope.overwrite_default_scope(scope):
        arguments = dict(cfg.model)
        if scope == 'mmpretrain' and 'data_preprocessor' in cfg:
            arguments.setdefault('data_preprocessor', cfg.data_preprocessor)
        with _quiet():
            return revert_sync_batchnorm(MODELS.build(arguments)).eval()


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
