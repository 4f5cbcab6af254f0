"""``python -m vrwkv_ops``: show the available backends, and how to get the others."""

import sys

import torch

import vrwkv_ops
from vrwkv_ops.backends import diagnose


def main() -> None:
    """Print the state of every backend."""
    lines = [
        f'vrwkv_ops {vrwkv_ops.__version__}, torch {torch.__version__}, '
        f'Python {sys.version.split()[0]}'
    ]
    lines += [str(backend) for backend in diagnose()]
    sys.stdout.write('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
