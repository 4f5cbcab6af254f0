"""Training and loading for every task, on mmengine.

The import makes :mod:`.compat` and :mod:`.text` active.
"""

from . import compat, text  # noqa: F401
from .checkpoint import CheckpointError, read_checkpoint
from .hooks import AtomicCheckpointHook, EpochSeedHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .optim import CPUAmpOptimWrapper
from .outputs import LabelMapsHook, PicturesHook
from .runner import VRWKVRunner, find_checkpoints

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
    'read_checkpoint',
]
