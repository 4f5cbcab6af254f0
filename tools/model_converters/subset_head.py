#!/usr/bin/env python
"""Reduce a classifier's head to some of its classes, to fine-tune or to use it for those.

VRWKV-Large of ImageNet-22K is fine-tuned for ImageNet-1K from the rows of the 1,000 classes in its
head of 21,841. Classes are given as a folder that has one folder for each, or as a text file with
an id at the start of each line. Both lists are sorted, as data sets number their classes.
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
    print(f'{args.dst}: a head of {len(subset)} classes of {len(classes)}')


if __name__ == '__main__':
    main()
