#!/usr/bin/env python
"""Train a model of any task: ``tools/train.py CONFIG [--work-dir DIR] [--resume] [--amp] ...``."""

from vrwkv.engine.cli import train

if __name__ == '__main__':
    train()
