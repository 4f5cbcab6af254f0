"""Analysis of models: FLOPs and receptive fields; the tables and pictures of the analysis tools.

Importing this package changes nothing in mmengine; :func:`register_flop_handlers` does.
:mod:`.drawing` needs matplotlib and is imported separately.
"""

from ..weights import input_channels
from .flops import Complexity, complexity, register_flop_handlers
from .receptive_field import area_of_share, effective_receptive_field

__all__ = [
    'Complexity',
    'area_of_share',
    'complexity',
    'effective_receptive_field',
    'input_channels',
    'register_flop_handlers',
]
