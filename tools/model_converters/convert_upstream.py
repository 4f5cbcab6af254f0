#!/usr/bin/env python
"""Convert a checkpoint of upstream's Vision-RWKV to a small file with the weights alone.

Classification, detection, segmentation and masked pre-training (MAE) are recognised by the names
of the weights. The configs of this project load upstream's files without conversion, except for
MAE, whose names differ. A converted file is smaller, and a .safetensors file needs no unpickling.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from mmengine.runner import CheckpointLoader
from torch import Tensor

import vrwkv.engine  # noqa: F401 (reads checkpoints safely)
from vrwkv.weights import (
    CheckpointError,
    check_suffix,
    dataset_meta,
    from_upstream_mae,
    rename_mlp_head,
    save_weights,
)


def take_weights(checkpoint: Mapping, ema: bool) -> dict[str, Tensor]:
    """Return a checkpoint's weights under this project's names."""
    if ema and 'model_ema' not in checkpoint:
        raise CheckpointError(
            "--ema: the checkpoint has no moving average ('model_ema') beside its weights: leave "
            'out --ema'
        )
    weights = checkpoint['model_ema' if ema else 'state_dict']
    weights = {name.removeprefix('module.'): value for name, value in weights.items()}
    if 'blocks.0.att.spatial_decay' in weights:
        return from_upstream_mae(weights)
    markers = ('layers.0.att.spatial_decay', 'layers.0.att.time_decay')
    if not any(name.endswith(markers) for name in weights):
        raise CheckpointError(
            f'these are not the weights of a VRWKV or VRWKV6: no name ends in {markers[0]!r} or '
            f'{markers[1]!r} ({", ".join(list(weights)[:3])}, ...)'
        )
    rename_mlp_head(weights)
    return weights


def main() -> None:
    """Convert one file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', help="upstream's checkpoint: a path or an address")
    parser.add_argument('dst', help='the file to write: .safetensors or .pth')
    parser.add_argument(
        '--ema',
        action='store_true',
        help="use the moving average ('model_ema') if the file has both; default: 'model'",
    )
    args = parser.parse_args()
    try:
        check_suffix(args.dst)
        checkpoint = CheckpointLoader.load_checkpoint(args.src, map_location='cpu')
        weights = take_weights(checkpoint, args.ema)
        save_weights(weights, args.dst, dataset_meta=dataset_meta(checkpoint))
    except (CheckpointError, OSError, ValueError) as error:
        raise SystemExit(f'error: {error}') from error
    size = Path(args.dst).stat().st_size
    print(f'{args.dst}: {len(weights)} tensors, {size / 1e6:.1f} MB')


if __name__ == '__main__':
    main()
