"""Export a config's model to ONNX, and with --int8 a quantised copy beside it."""

from __future__ import annotations

import sys

from deployment import ERRORS, images_of, parser, run
from mmengine.config import Config

from vrwkv.analysis.models import read_config
from vrwkv.export import OPSETS, Export, quantize_onnx, to_onnx
from vrwkv.exported import load_exported


def quantise(export: Export, cfg: Config, calibration: int, evaluation: int) -> None:
    """Write the quantised file, and print both files' accuracy or their difference."""
    shape = export.metadata['shape']
    images = (batch for batch, _ in images_of(cfg, export.model, shape, calibration))
    out = export.path.with_name(f'{export.path.stem}-int8.onnx')
    quantize_onnx(export.path, out, images)
    print(f'{out}, {out.stat().st_size / 1e6:.1f} MB')
    runners = [load_exported(path)[0] for path in (export.path, out)]
    right, same, number = [0, 0], 0.0, 0
    for batch, sample in images_of(cfg, export.model, shape, evaluation):
        answers = [runner(batch.numpy())[0].argmax(1) for runner in runners]
        number += 1
        same += (answers[0] == answers[1]).mean()
        if export.metadata['task'] == 'classification':
            right = [n + int(a[0] in sample.gt_label) for n, a in zip(right, answers, strict=True)]
    print(f'{number} images of the validation set: the same answer for {same / number:.2%}')
    if export.metadata['task'] == 'classification':
        before, after = (f'{n / number:.2%}' for n in right)
        print(f'Top-1 accuracy: float32 {before}, int8 {after}')


def main(argv: list[str] | None = None) -> None:
    """Export from the command line."""
    command = parser(__doc__, '.onnx')
    command.add_argument('--opset', type=int, default=OPSETS[1], help='default: %(default)s')
    command.add_argument('--int8', action='store_true', help='also write a quantised copy')
    command.add_argument(
        '--calibration', type=int, default=64, help='images for the ranges (default: %(default)s)'
    )
    command.add_argument(
        '--evaluation', type=int, default=1000, help='images to compare (default: %(default)s)'
    )
    args = command.parse_args(argv)
    try:
        cfg = read_config(args.config)
        if args.int8 and not cfg.get('val_dataloader'):
            raise ValueError(
                f'--int8 reads images of the validation set, and {args.config} has no '
                'val_dataloader: add one to a copy of it'
            )
        export = run(to_onnx, args, opset=args.opset)
        if args.int8:
            quantise(export, cfg, args.calibration, args.evaluation)
    except ERRORS as error:
        sys.exit(f'Error: {error}')


if __name__ == '__main__':
    main()
