#!/usr/bin/env python
"""Reduce a classifier's head to some of its classes, for fine-tuning or for use.

For example, upstream fine-tunes VRWKV-Large of ImageNet-22K on ImageNet-1K with 1,000 of its 21,841
rows. A list of classes is a folder with a folder for each class, or a UTF-8 text file with an id at
the start of each line. Both lists are sorted, since data sets number their classes in this order.
"""

from __future__ import annotations

import argparse

from mmengine.runner import CheckpointLoader

import vrwkv.engine  # noqa: F401 (reads checkpoints safely)
from vrwkv.weights import (
    CheckpointError,
    check_suffix,
    read_classes,
    rename_mlp_head,
    save_weights,
    subset_head,
)


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help='checkpoint of a classifier: a path or an address')
    parser.add_argument('dst', help='the file to write: .safetensors or .pth')
    parser.add_argument('--classes', required=True, help='all classes of the checkpoint')
    parser.add_argument('--subset', required=True, help='the classes to keep')
    args = parser.parse_args()
    try:
        check_suffix(args.dst)
        classes, subset = read_classes(args.classes), read_classes(args.subset)
        checkpoint = CheckpointLoader.load_checkpoint(args.src, map_location='cpu')
        weights = dict(checkpoint['state_dict'])
        rename_mlp_head(weights)
        save_weights(subset_head(weights, classes, subset), args.dst)
    except (CheckpointError, OSError, ValueError) as error:
        raise SystemExit(f'error: {error}') from error
    print(f'{args.dst}: a head with {len(subset)} of {len(classes)} classes')


if __name__ == '__main__':
    main()
