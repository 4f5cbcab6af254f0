"""``python -m vrwkv_ops``: which backends are available, and what to do about the others."""

import sys

import torch

import vrwkv_ops
from vrwkv_ops.backends import diagnose


def main() -> None:
    """Prints the state of every backend."""
    lines = [
        f'vrwkv_ops {vrwkv_ops.__version__}, torch {torch.__version__}, '
        f'Python {sys.version.split()[0]}'
    ]
    lines += [str(backend) for backend in diagnose()]
    sys.stdout.write('\n'.join(lines) + '\n')


if __name__ == '__main__':
    main()
