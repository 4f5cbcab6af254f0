"""Data sets that the classification examples write."""

from .digits import write_digits

__all__ = ['write_digits']
