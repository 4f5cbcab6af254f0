"""Data sets that the classification examples make themselves."""

from .digits import write_digits

__all__ = ['write_digits']
