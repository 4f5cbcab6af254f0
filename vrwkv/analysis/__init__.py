"""Analysis of the models."""

from .flops import FlopAnalyzer

__all__ = ['FlopAnalyzer']
