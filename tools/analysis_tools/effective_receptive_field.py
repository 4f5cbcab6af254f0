"""Draw effective receptive fields of the token in the centre of an image side by side.

The default models are VRWKV, VRWKV without token shift, VRWKV with causal attention and ViT, all of
the size Tiny and with random weights. The paper's figure 3a shows trained ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from mmengine.config import Config
from PIL import Image
from torch import Tensor, nn

from vrwkv.analysis import area_of_share, effective_receptive_field, input_channels
from vrwkv.analysis.drawing import picture
from vrwkv.analysis.models import load_model, read_config
from vrwkv.analysis.report import write_results
from vrwkv.checkpoint import CheckpointError
from vrwkv_ops.benchmarking import markdown_table

CONFIGS = Path(__file__).resolve().parents[2] / 'configs/classification'
DEFAULTS = {
    'VRWKV': f'{CONFIGS}/vrwkv-tiny_8xb128_in1k.py',
    'No shift': f'{CONFIGS}/ablation/vrwkv-tiny_no-shift_8xb128_in1k.py',
    'Causal': f'{CONFIGS}/ablation/vrwkv-tiny_causal_8xb128_in1k.py',
    'ViT': 'mmpretrain::deit/deit-tiny_4xb256_in1k.py',
}
SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.webp', '.tif', '.tiff')


def read_images(
    folder: Path | None, count: int, size: int, seed: int, channels: int
) -> list[np.ndarray]:
    """Read square images, or cut them out of scikit-learn's two photographs.

    Args:
        folder: A folder of images; None for the photographs.
        count: Number of images.
        size: Height and width in pixels.
        seed: Seed of the random crops.
        channels: Channels of the model. One takes the grey level; three take the colours; others
            take files with that many channels, and of a photograph its colours and then its grey
            level.

    Returns:
        Images of shape ``(size, size, channels)``; colours in the order blue, green, red.

    Raises:
        ValueError: If the folder has no image, or a file cannot be read with that many channels.
    """
    if folder is None:
        from sklearn.datasets import load_sample_images

        rng = np.random.default_rng(seed)
        photographs = load_sample_images().images
        crops = [_crop(photographs[i % len(photographs)], size, rng) for i in range(count)]
        return [_with_channels(crop, channels) for crop in crops]
    paths = sorted(path for path in folder.rglob('*') if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise ValueError(f"no image ({', '.join(SUFFIXES)}) in '{folder}'")
    # Spread over the folder: the first images may all be of one class.
    chosen = paths[:: max(1, len(paths) // count)][:count]
    return [_read(path, size, channels) for path in chosen]


def _read(path: Path, size: int, channels: int) -> np.ndarray:
    """Read an image and scale it to a square."""
    kinds = {1: cv2.IMREAD_GRAYSCALE, 3: cv2.IMREAD_COLOR}
    pixels = cv2.imread(str(path), kinds.get(channels, cv2.IMREAD_UNCHANGED))
    if pixels is None:
        raise ValueError(f"'{path}' cannot be read as an image")
    pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
    pixels = pixels.reshape(size, size, -1)
    if pixels.shape[2] != channels:
        raise ValueError(f"'{path}' has {pixels.shape[2]} channels, the model takes {channels}")
    return pixels


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    """Turn an RGB image into one of any number of channels."""
    grey = np.array(Image.fromarray(image).convert('L'))[..., None]
    if channels < 3:
        return np.repeat(grey, channels, 2)
    return np.concatenate([image[..., ::-1], *[grey] * (channels - 3)], 2)


def _crop(photograph: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a random square out of a photograph and scale it."""
    side = int(rng.integers(min(photograph.shape[:2]) // 2, min(photograph.shape[:2]) + 1))
    top, left = (int(rng.integers(0, n - side + 1)) for n in photograph.shape[:2])
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    return np.array(crop.resize((size, size), Image.Resampling.BICUBIC))


def build(cfg: Config, checkpoint: str | None) -> nn.Module:
    """Build the model with its weights and a backbone that returns a feature map."""
    if 'out_type' in cfg.model.backbone or cfg.model.backbone.type == 'VisionTransformer':
        cfg.model.backbone.out_type = 'featmap'  # not the class token, mmpretrain's default
    return load_model(cfg, checkpoint)


def normalised(model: nn.Module, images: list[np.ndarray]) -> Iterator[Tensor]:
    """Yield images, preprocessed by the model, one at a time."""
    for image in images:
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)
        yield model.data_preprocessor(dict(inputs=[pixels]))['inputs']


class Field(NamedTuple):
    """A receptive field and the printed facts about it, as fractions."""

    influence: Tensor  #: Of each pixel, of shape (H, W).
    half: float  #: The smallest area that holds half of it.
    most: float  #: The smallest area that holds 90 % of it.
    above: float  #: Its share above the row of patches of the centre token.
    below: float  #: Its share below that row.


def measure(model: nn.Module, images: list[np.ndarray]) -> Field:
    """Measure the receptive field of the model's backbone."""
    rows = 0

    def backbone(x: Tensor) -> tuple[Tensor, ...]:
        nonlocal rows
        output = model.backbone(x)
        rows = output[-1].shape[2]
        return output

    influence = effective_receptive_field(backbone, normalised(model, images)).cpu()
    patch = len(influence) // rows
    top = rows // 2 * patch
    shares = influence[:top].sum(), influence[top + patch :].sum()
    areas = (area_of_share(influence, share) for share in (0.5, 0.9))
    return Field(influence, *areas, *(share.item() for share in shares))


def draw(fields: dict[str, Field], subtitle: str, out: Path) -> None:
    """Draw the fields side by side on one logarithmic scale, relative to the strongest pixel."""
    decades = 5
    width = max(3.1 * len(fields) + 0.7, 5)
    with picture(out, 1, len(fields), figsize=(width, 4.3), squeeze=False) as (fig, axes):
        for ax, (name, field) in zip(axes.flat, fields.items(), strict=True):
            # Means over some pixels: fine speckle would hide the shape.
            side = max(1, len(field.influence) // 128)
            pooled = nn.functional.avg_pool2d(field.influence[None, None], side)[0, 0]
            level = (pooled / pooled.max()).clamp(min=10.0**-decades).log10()
            shown = ax.imshow(level, cmap='viridis', vmin=-decades, vmax=0)
            ax.set_title(name, fontsize=13, fontweight='bold')
            ax.set_xlabel(
                f'half of it in {100 * field.half:.2g} % of the area,\n'
                f'90 % in {100 * field.most:.2g} %;\n'
                f'above {100 * field.above:.2g} %, below {100 * field.below:.2g} %',
                fontsize=10,
            )
            ax.set(xticks=[], yticks=[])
            ax.grid(visible=False)
        bar = fig.colorbar(shown, ax=axes, shrink=0.75, ticks=range(-decades, 1))
        bar.ax.set_yticklabels([f'$10^{{{tick}}}$' for tick in range(-decades, 1)])
        bar.set_label('influence / strongest')
        fig.suptitle(f'Effective receptive field of the centre token, {subtitle}', fontsize=13)


def parse_model(text: str) -> tuple[str, str, str | None]:
    """Split ``[NAME=]CONFIG[,CHECKPOINT]``."""
    name, equals, rest = text.partition('=')
    if not equals:
        name, rest = '', text
    config, _, checkpoint = rest.partition(',')
    return name or Path(config).stem, config, checkpoint or None


def main(argv: list[str] | None = None) -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'models',
        nargs='*',
        metavar='[NAME=]CONFIG[,CHECKPOINT]',
        help='models to compare; without a checkpoint, with random weights (default: the four)',
    )
    parser.add_argument('--size', type=int, default=512, help='pixels (default: %(default)s)')
    parser.add_argument(
        '--images', type=Path, help="folder (default: crops of scikit-learn's two photographs)"
    )
    parser.add_argument('--count', type=int, default=8, help='images (default: %(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='default: %(default)s')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/receptive_field'))
    args = parser.parse_args(argv)
    if min(args.count, args.size) < 1:
        parser.error('--size and --count must be above 0')
    models = [parse_model(text) for text in args.models]
    models = models or [(name, config, None) for name, config in DEFAULTS.items()]
    names = [name for name, *_ in models]
    if len(set(names)) < len(names):
        parser.error(f'each model needs a name of its own (NAME=CONFIG), got {names}')

    fields = {}
    try:
        for name, config, checkpoint in models:
            torch.manual_seed(args.seed)
            model = build(read_config(config), checkpoint).to(args.device)
            channels = input_channels(model)
            images = read_images(args.images, args.count, args.size, args.seed, channels)
            fields[name] = measure(model, images)
    except (CheckpointError, OSError, ValueError) as error:
        sys.exit(f'Error: {error}')
    header = ('model', 'area of 50 %', 'area of 90 %', 'above the centre', 'below the centre')
    rows = [
        (name, *(f'{100 * value:.2f} %' for value in field[1:])) for name, field in fields.items()
    ]
    print(markdown_table(header, rows))
    subtitle = f'{len(images)} images of {args.size} x {args.size} pixels'
    picture_file = args.out / 'receptive_field.png'
    draw(fields, subtitle, picture_file)
    facts = {
        name: dict(config=config, checkpoint=checkpoint)
        | {key: value for key, value in fields[name]._asdict().items() if key != 'influence'}
        for name, config, checkpoint in models
    }
    content = dict(models=facts, images=len(images), size=args.size, seed=args.seed)
    write_results(args.out / 'receptive_field.json', content)
    print(f'\nPicture: {picture_file}')


if __name__ == '__main__':
    main()
