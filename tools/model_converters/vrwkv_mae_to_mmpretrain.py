"""Rename the weights of an upstream VRWKV MAE checkpoint, so that the configs here load it."""

from __future__ import annotations

import argparse

import torch

from vrwkv.engine import read_checkpoint
from vrwkv_cls.mae import from_upstream


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help="upstream's checkpoint")
    parser.add_argument('dst', help='where to write the converted one')
    args = parser.parse_args()
    # MAE's code saves its command line beside the weights: a Namespace, plain attributes only.
    torch.serialization.add_safe_globals([argparse.Namespace])
    checkpoint = read_checkpoint(args.src, 'cpu')
    torch.save({'state_dict': from_upstream(checkpoint['state_dict'])}, args.dst)


if __name__ == '__main__':
    main()
