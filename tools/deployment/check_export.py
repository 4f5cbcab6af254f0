"""Compare an exported model with PyTorch and DeiT: differences, and times side by side.

The times of one image are taken in turns; the table has medians.
DeiT-T runs with PyTorch's flash attention, and in the same route as the file if that is ONNX.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch
from deployment import ERRORS

from vrwkv.backbones import ViT
from vrwkv.export import prepare, to_onnx
from vrwkv.exported import load_exported, on_arrays
from vrwkv_ops.benchmarking import describe_environment, markdown_table, time_calls


def deit_tiny() -> ViT:
    """Return a backbone as large as DeiT-T."""
    return ViT(embed_dims=192, depth=12, num_heads=3).eval()


def main(argv: list[str] | None = None) -> None:
    """Compare from the command line."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument('config')
    command.add_argument('checkpoint')
    command.add_argument('file', type=Path, help='.onnx, .xml or .pt2')
    command.add_argument('--shape', type=int, nargs=2, metavar=('H', 'W'))
    command.add_argument('--repeats', type=int, default=20)
    args = command.parse_args(argv)
    try:
        run, metadata = load_exported(args.file)
        shape = metadata['shape']
        if shape is not None and args.shape is not None and args.shape != shape[2:]:
            raise ValueError(f'{args.file} takes images of {shape[2:]}, got --shape {args.shape}')
        size = args.shape or (shape[2:] if shape else None)
        model = prepare(args.config, args.checkpoint, metadata['normalize'])
        shape = model.image_shape(size, shape[0] if shape else 1)
        images = torch.randn(shape, generator=torch.Generator().manual_seed(1)).numpy()
        in_eager, deit = on_arrays(model), deit_tiny()
        expected, found = in_eager(images), run(images)
        difference = max(
            abs(a - b).max() / abs(b).max() for a, b in zip(found, expected, strict=True)
        )
        functions = {args.file.name: run, 'PyTorch, eager': in_eager}
        if shape[1] == 3:
            functions['DeiT-T, eager'] = on_arrays(deit)
            if args.file.suffix == '.onnx':
                with tempfile.TemporaryDirectory() as folder:
                    file = to_onnx(deit, Path(folder, 'deit.onnx'), size=shape[2:]).path
                    functions['DeiT-T, ONNX Runtime'] = load_exported(file)[0]
        calls = {name: partial(function, images) for name, function in functions.items()}
        times = time_calls(calls, torch.device('cpu'), args.repeats, patience=10.0)
    except ERRORS as error:
        sys.exit(f'Error: {error}')
    print(f'Largest difference from PyTorch: {difference:.1e} of the largest output\n')
    first = times[args.file.name]
    rows = [(name, f'{1e3 * s:.1f}', f'{first / s:.2f}') for name, s in times.items()]
    print(markdown_table(('model', 'ms per image', 'file / model'), rows))
    facts = describe_environment(torch.device('cpu'))
    print('\n' + '\n'.join(f'- {name}: {fact}' for name, fact in facts.items()))


if __name__ == '__main__':
    main()
