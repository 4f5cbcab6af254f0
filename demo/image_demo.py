"""Classify, detect or segment the content of an image with any model of the three tasks."""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config

from vrwkv.engine import CheckpointError
from vrwkv.engine.model_index import find_model, list_models

ROOT = Path(__file__).resolve().parents[1]


def resolve(model: str, pretrained: str | bool) -> tuple[Path, str | None]:
    """Find the config and the weights of the command line.

    Args:
        model: Path of a config or name of a model.
        pretrained: A checkpoint, True for the released one, or False for none.

    Returns:
        The config's path; the checkpoint's path or address, or None.

    Raises:
        ValueError: If there is no such model, or if it has no released checkpoint.
        FileNotFoundError: If there is no such config.
    """
    if model.endswith('.py'):
        config = Path(model)
        if not config.is_file():
            raise FileNotFoundError(f'config {model} does not exist')
        known = {info.config.resolve(): info for info in list_models().values()}
        info = known.get(config.resolve())
    else:
        info = find_model(model)
        config = info.config
    if pretrained is not True:
        return config, pretrained or None
    if info is None or info.weights is None:
        raise ValueError(
            f'there are no released weights of {config}: name a checkpoint, --pretrained FILE'
        )
    return config, info.weights


def class_name(names: Sequence[str] | None, label: int) -> str:
    """Name a class; by its number if there are no names."""
    return names[label] if names else f'class {label}'


def classify(config: Path, weights: str | None, device: str, image: str, out: Path) -> str:
    """Classify with mmpretrain."""
    from mmpretrain import ImageClassificationInferencer

    inferencer = ImageClassificationInferencer(str(config), weights or False, device)
    (result,) = inferencer(image, show_dir=str(out))
    scores = result['pred_scores']
    return '\n'.join(
        f'{scores[label]:8.2%}  {class_name(inferencer.classes, label)}'
        for label in np.argsort(-scores, kind='stable')[:5]
    )


def detect(config: Path, weights: str | None, device: str, image: str, out: Path) -> str:
    """Detect instances with mmdet."""
    import vrwkv_det  # noqa: F401, I001 (before mmdet: it serves mmcv's operators)
    from mmdet.apis import DetInferencer

    threshold = 0.3  # the inferencer's
    inferencer = DetInferencer(str(config), weights, device, show_progress=False)
    results = inferencer(image, out_dir=str(out), pred_score_thr=threshold, no_save_pred=True)
    (result,) = results['predictions']
    # Without weights the library takes the names of another data set.
    names = inferencer.visualizer.dataset_meta['classes'] if weights else None
    lines = [
        f'{score:8.2%}  {class_name(names, label)}  at {", ".join(f"{side:.0f}" for side in box)}'
        for score, label, box in zip(
            result['scores'], result['labels'], result['bboxes'], strict=True
        )
        if score >= threshold
    ]
    return '\n'.join(lines) or f'nothing with a score of at least {threshold}'


def segment(config: Path, weights: str | None, device: str, image: str, out: Path) -> str:
    """Label every pixel with mmseg."""
    import vrwkv_seg  # noqa: F401, I001 (before mmseg: it serves mmcv's operators)
    from mmseg.apis import MMSegInferencer

    inferencer = MMSegInferencer(str(config), weights, device=device)
    inferencer.show_progress = False
    labels = np.asarray(inferencer(image, out_dir=str(out))['predictions'])
    # Without weights the library takes the names of another data set.
    names = inferencer.visualizer.dataset_meta['classes'] if weights else None
    found, counts = np.unique(labels, return_counts=True)
    return '\n'.join(
        f'{counts[i] / labels.size:8.2%}  {class_name(names, found[i])}'
        for i in np.argsort(-counts)
    )


#: The function for a config's default scope.
TASKS: dict[str, Callable[[Path, str | None, str, str, Path], str]] = {
    'mmpretrain': classify,
    'mmdet': detect,
    'mmseg': segment,
}


def picture_path(image: Path, out: Path, suffix: str) -> Path:
    """Choose the path of a picture: like the image's, so that no two images share a picture.

    Args:
        image: Path of the image.
        out: Folder for pictures.
        suffix: Suffix of the picture; it is added unless the image has it.

    Returns:
        The path below ``out``: the image's path from the working directory or, for an image outside
        it, from the root.
    """
    image = Path(os.path.abspath(image))  # without '..'
    here = Path.cwd()
    inside = image.relative_to(here if image.is_relative_to(here) else image.anchor)
    name = image.name if image.suffix == suffix else image.name + suffix
    return out / inside.with_name(name)


def run(image: str, model: str, pretrained: str | bool, device: str, out: Path) -> tuple[str, Path]:
    """Run a model on an image.

    Args:
        image: Path of the image.
        model: Path of a config or name of a model.
        pretrained: A checkpoint, True for the released one, or False for none.
        device: The device.
        out: Folder for pictures; each config gets a folder of its name.

    Returns:
        The result in words and the picture's path.

    Raises:
        FileNotFoundError: If the image, config or checkpoint does not exist.
        ValueError: If the file is not an image, there is no such model, no task for it, or no such
            device.
        CheckpointError: If the checkpoint cannot be downloaded, read or loaded.
    """
    if not Path(image).is_file():
        raise FileNotFoundError(f'image {image} does not exist')
    if not Path(image).stat().st_size or mmcv.imread(image) is None:
        raise ValueError(f'{image} is no image that OpenCV {cv2.__version__} can read')
    config, weights = resolve(model, pretrained)
    cfg = Config.fromfile(config)
    scope = cfg.get('default_scope')
    if scope not in TASKS:
        raise ValueError(f'{config} has the default_scope {scope!r}, not one of {list(TASKS)}')
    if cfg.get('test_dataloader') is None:
        raise ValueError(f'{config} is for pre-training: its model predicts nothing')
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # a build without CUDA asserts
        raise ValueError(f'--device {device} cannot be used: {error}') from error
    # The libraries name a picture after the image's file name without its folders.
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as links:
        source = image
        if not cv2.haveImageWriter(image):  # they write in the image's own format
            source = os.path.join(links, 'image.png')
            os.symlink(os.path.abspath(image), source)
        text = TASKS[scope](config, weights, device, source, Path(folder))
        drawn = next(path for path in Path(folder).rglob('*.*') if path.is_file())
        picture = picture_path(Path(image), out / config.stem, drawn.suffix)
        picture.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(drawn, picture)
    return text, picture


def main() -> None:
    """Run the demo from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', help='path of an image')
    parser.add_argument('model', help='path of a config, or name of a model in model-index.yml')
    parser.add_argument(
        '--pretrained',
        nargs='?',
        const=True,
        default=False,
        metavar='FILE',
        help='checkpoint to load; without a value, the released one (a download)',
    )
    parser.add_argument('--device', default='cpu', help='cpu, cuda, cuda:1 ... (default: cpu)')
    parser.add_argument(
        '--out-dir',
        type=Path,
        default=ROOT / 'work_dirs/image_demo',
        help='folder for pictures (default: %(default)s)',
    )
    args = parser.parse_args()
    try:
        text, picture = run(args.image, args.model, args.pretrained, args.device, args.out_dir)
    except (CheckpointError, OSError, ValueError) as error:
        raise SystemExit(f'error: {error}') from error
    if not args.pretrained:
        print('Without --pretrained the weights are random, and so is this result:')
    print(text)
    print(f'picture: {picture}')


if __name__ == '__main__':
    main()
