"""Run an exported model on an image, and draw the answer.

It does not build the model. It needs this project with torch and mmengine, Pillow, matplotlib and
the file's runtime.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from vrwkv.analysis.drawing import picture
from vrwkv.exported import load_exported


def read(path: Path, metadata: dict, shape: list[int] | None) -> tuple[Image.Image, np.ndarray]:
    """Read an image in the size that the model takes, and the batch of it."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith('I'):  # 16 bits, which Pillow would cut at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    channels = len(metadata.get('mean') or 'RGB')
    if channels not in (1, 3):
        raise ValueError(f'the model takes {channels} channels, and images here have 1 or 3')
    image = image.convert('L' if channels == 1 else 'RGB')
    step = max(32, metadata.get('step', 1))
    size = [max(1, round(side / step)) * step for side in image.size]
    image = image.resize(size if shape is None else (shape[3], shape[2]), Image.BILINEAR)
    array = np.asarray(image, np.float32).reshape(*image.size[::-1], channels)
    if not metadata.get('normalize') and metadata.get('mean'):
        array = (array - np.float32(metadata['mean'])) / np.float32(metadata['std'])
    return image, np.ascontiguousarray(array.transpose(2, 0, 1)[None], np.float32)


def draw(image: Image.Image, output: np.ndarray, metadata: dict, out: Path) -> str:
    """Draw the answer and return it in words."""
    classes = metadata.get('classes') or []

    def name(index: int) -> str:
        return classes[index] if index < len(classes) else f'class {index}'

    with picture(out, 1, 2, figsize=(9, 4)) as (_, (left, right)):
        left.imshow(image)
        left.axis('off')
        if metadata['task'] == 'classification':
            scores = np.exp(output[0] - output[0].max())
            scores /= scores.sum()
            best = scores.argsort()[::-1][:5]
            right.barh([name(i) for i in best], scores[best])
            right.invert_yaxis()
            right.set(xlabel='probability', xlim=(0, 1))
            return f'{name(best[0])}, probability {scores[best[0]]:.3f}'
        right.axis('off')
        if metadata['task'] == 'segmentation':
            if metadata.get('threshold') is not None:
                labels = (1 / (1 + np.exp(-output[0, 0])) > metadata['threshold']).astype(int)
            else:
                labels = output[0].argmax(0)
            palette = np.array(metadata.get('palette') or [], np.uint8)
            right.imshow(palette[labels] if len(palette) > labels.max() else labels)
            share = np.bincount(labels.ravel()) / labels.size
            best = [i for i in share.argsort()[::-1][:5] if share[i]]
            return ', '.join(f'{name(i)} {share[i]:.1%}' for i in best)
        right.imshow(np.linalg.norm(output[0], axis=0))
        return f'feature maps; the first has shape {output.shape[1:]}, its norm is drawn'


def main(argv: list[str] | None = None) -> None:
    """Run from the command line."""
    command = argparse.ArgumentParser(description=__doc__)
    command.add_argument('file', type=Path, help='.onnx, .xml or .pt2')
    command.add_argument('image', type=Path)
    command.add_argument('--out', type=Path, default=Path('work_dirs/exported.png'))
    args = command.parse_args(argv)
    try:
        run, metadata = load_exported(args.file)
        image, batch = read(args.image, metadata, metadata.get('shape'))
        answer = draw(image, run(batch)[0], metadata, args.out)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    print(f'{answer}\n{args.out}')


if __name__ == '__main__':
    main()
