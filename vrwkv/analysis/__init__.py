"""Analysis of the models: FLOPs and receptive fields.

:mod:`.drawing`, which the tools draw with, needs matplotlib and is imported by itself.
"""

from .flops import Complexity, FlopAnalyzer, complexity
from .receptive_field import area_of_share, effective_receptive_field

__all__ = [
    'Complexity',
    'FlopAnalyzer',
    'area_of_share',
    'complexity',
    'effective_receptive_field',
]
