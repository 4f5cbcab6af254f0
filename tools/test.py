#!/usr/bin/env python
"""Evaluate a model of any task: ``tools/test.py CONFIG CHECKPOINT [--out FILE] [--tta] ...``."""

from vrwkv.engine.cli import test

if __name__ == '__main__':
    test()
