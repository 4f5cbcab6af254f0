"""Training and loading for every task, on mmengine; importing it makes :mod:`.compat` active."""

from . import compat  # noqa: F401
from .checkpoint import CheckpointError, read_checkpoint
from .hooks import AtomicCheckpointHook, EpochSeedHook
from .layer_decay import LayerDecayOptimWrapperConstructor
from .optim import CPUAmpOptimWrapper
from .runner import VRWKVRunner, find_checkpoints

__all__ = [
    'AtomicCheckpointHook',
    'CPUAmpOptimWrapper',
    'CheckpointError',
    'EpochSeedHook',
    'LayerDecayOptimWrapperConstructor',
    'VRWKVRunner',
    'find_checkpoints',
    'read_checkpoint',
]
