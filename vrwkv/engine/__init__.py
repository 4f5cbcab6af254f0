"""Training and loading for every task, on mmengine.

Importing it makes mmengine load checkpoints safely, find packages and skip byte order marks; see
:mod:`.patches`.
"""

from . import patches
from .checkpoint import CheckpointError, read_checkpoint
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
