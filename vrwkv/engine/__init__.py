"""Training and loading for every task, on mmengine.

Importing it makes mmengine load checkpoints safely, find packages, prepare configs once and skip
byte order marks; see :mod:`.patches`. Without mmengine there are only the modules ``cache``,
``download`` and ``model_index``.
"""

from ..checkpoint import CheckpointError, read_checkpoint

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
else:
    from . import patches
    from .hooks import AtomicCheckpointHook, EpochSeedHook
    from .layer_decay import LayerDecayOptimWrapperConstructor
    from .optim import CPUAmpOptimWrapper
    from .outputs import LabelMapsHook, PicturesHook
    from .runner import VRWKVRunner, find_checkpoints

    patches.read_checkpoints_safely()
    patches.find_packages_without_pkg_resources()
    patches.prepare_configs_once()
    patches.skip_byte_order_marks()

__all__ = [
    'AtomicCheckpointHook',
    'CPUAmpOptimWrapper',
    'CheckpointError',
    'EpochSeedHook',
    'LabelMapsHook',
    'LayerDecayOptimWrapperConstructor',
    'PicturesHook',
    'VRWKVRunner',
    'find_checkpoints',
    'patches',
    'read_checkpoint',
]
