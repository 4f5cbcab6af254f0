"""Write photographs with handwritten digits as small data sets for detection or segmentation.

The photographs and digits are real and ship with scikit-learn. Places, sizes and colours of the
digits are drawn at random, so boxes and masks are known. Training and validation images share
neither a digit nor a part of a photograph.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.ndimage import binary_dilation
from sklearn.datasets import load_digits, load_sample_images
from sklearn.model_selection import train_test_split

from vrwkv._files import new_folder

ROOT = Path(__file__).resolve().parents[1]
DIGITS = tuple(map(str, range(10)))
SPLITS = ('train', 'val')
FOLDERS = dict(train='training', val='validation')  # those of ADE20K
HELD_OUT = 1 / 5  # of the digits
EDGE = 0.62  # fraction of a photograph's width for training; the rest is for validation


class Scene(NamedTuple):
    """A photograph with digits on it."""

    image: np.ndarray  #: RGB of shape (size, size, 3), uint8.
    labels: list[int]  #: The N digits, 0 to 9, in the order of pasting.
    masks: np.ndarray  #: Their visible pixels, of shape (N, size, size), bool.

    def label_map(self) -> np.ndarray:
        """Return 0 for the background and d + 1 for the digit d, of shape (size, size)."""
        labels = np.zeros(self.masks.shape[1:], np.uint8)
        for label, mask in zip(self.labels, self.masks, strict=True):
            labels[mask] = label + 1
        return labels


def scenes(
    split: str,
    count: int,
    size: int = 128,
    seed: int = 0,
    digits: tuple[int, int] = (2, 6),
    sides: tuple[int, int] = (6, 3),
    white: bool = False,
) -> Iterator[Scene]:
    """Draw scenes, reproducibly for the same arguments.

    Args:
        split: ``'train'`` or ``'val'``.
        count: Number of scenes.
        size: Height and width in pixels, at least 64.
        seed: Seed of all random numbers.
        digits: The smallest and the largest number of digits to place; digits that would cover
            others are left out.
        sides: Divisors of ``size`` for the smallest and the largest height of a digit: by default
            a sixth and a third of it.
        white: Whether to draw white digits that do not touch, on photographs of half their
            brightness, instead of digits whose colour contrasts with their background.

    Yields:
        Scenes with digits that hardly cover one another.

    Raises:
        ValueError: If ``split`` is unknown or ``size`` is below 64.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {SPLITS}, got {split!r}')
    if size < 64:
        raise ValueError(f'size must be at least 64 pixels, got {size}')
    rng = np.random.default_rng([seed, SPLITS.index(split)])
    shapes, labels = _digits(split)
    photographs = [_part(photograph, split) for photograph in load_sample_images().images]
    for _ in range(count):
        image = _background(photographs[rng.integers(len(photographs))], size, rng)
        if white:
            image //= 2
        found, masks = [], np.zeros((0, size, size), bool)
        for _ in range(rng.integers(digits[0], digits[1] + 1)):
            index = rng.integers(len(shapes))
            mask = _place(shapes[index], size, sides, rng)
            if white:  # touching white digits could not be distinguished
                if (masks & binary_dilation(mask, iterations=2)).any():
                    continue
            elif ((masks & mask).sum((1, 2)) > 0.1 * masks.sum((1, 2))).any():
                continue
            image[mask] = 255 if white else _contrasting_colour(image[mask], rng)
            masks = np.concatenate([masks & ~mask, mask[None]])
            found.append(int(labels[index]))
        yield Scene(image, found, masks)


def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the split's digits, of shape (N, 8, 8) with grey levels 0 to 16, and labels."""
    data = load_digits()
    indices = train_test_split(
        np.arange(len(data.target)), test_size=HELD_OUT, stratify=data.target, random_state=0
    )[SPLITS.index(split)]
    return data.images[indices], data.target[indices]


def _part(photograph: np.ndarray, split: str) -> np.ndarray:
    """Return the part of a photograph for a split."""
    edge = round(EDGE * photograph.shape[1])
    return photograph[:, :edge] if split == 'train' else photograph[:, edge:]


def _background(photograph: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Cut a square out of a photograph, flip it or not, and scale it to ``size``."""
    side = int(rng.integers(96, min(photograph.shape[:2]) + 1))
    top, left = (int(rng.integers(0, n - side + 1)) for n in photograph.shape[:2])
    crop = Image.fromarray(photograph[top : top + side, left : left + side])
    image = np.array(crop.resize((size, size), Image.Resampling.BILINEAR))
    return image[:, ::-1].copy() if rng.random() < 0.5 else image


def _place(
    digit: np.ndarray, size: int, sides: tuple[int, int], rng: np.random.Generator
) -> np.ndarray:
    """Return a digit's pixels, enlarged, somewhere in an empty image."""
    side = int(rng.integers(size // sides[0], size // sides[1] + 1))
    grey = Image.fromarray(np.round(digit * (255 / 16)).astype(np.uint8))
    ink = np.array(grey.resize((side, side), Image.Resampling.BICUBIC)) > 110
    top, left = rng.integers(0, size - side + 1, 2)
    mask = np.zeros((size, size), bool)
    mask[top : top + side, left : left + side] = ink
    return mask


def _contrasting_colour(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a colour that differs from the mean of the background."""
    mean = background.mean(0)
    while True:
        colour = rng.integers(0, 256, 3)
        if np.abs(colour - mean).sum() > 240:
            return colour


def write_coco(
    root: Path, train: int = 600, val: int = 100, size: int = 128, seed: int = 0
) -> Path:
    """Write scenes as ``root/{train,val}/*.png`` and COCO's ``root/annotations/{train,val}.json``.

    Categories have the ids 1 to 10 for the digits 0 to 9. Masks are run lengths.

    Args:
        root: The folder to write; it is created completely or not at all.
        train: Number of training images.
        val: Number of validation images.
        size: Height and width in pixels.
        seed: Seed of all random numbers.

    Returns:
        The folder.

    Raises:
        FileExistsError: If ``root`` exists and was not written with the same arguments.
    """
    from pycocotools import mask as run_length

    def annotations(index: int, scene: Scene) -> Iterator[dict]:
        for label, mask in zip(scene.labels, scene.masks, strict=True):
            code = run_length.encode(np.asfortranarray(mask))
            yield dict(
                image_id=index,
                category_id=label + 1,
                bbox=run_length.toBbox(code).tolist(),
                area=int(run_length.area(code)),
                segmentation=dict(size=code['size'], counts=code['counts'].decode()),
                iscrowd=0,
            )

    def write(part: Path, split: str, drawn: Iterator[Scene]) -> None:
        (part / split).mkdir(parents=True)
        (part / 'annotations').mkdir(exist_ok=True)
        images, objects = [], []
        for index, scene in enumerate(drawn):
            name = f'{index:05d}.png'
            Image.fromarray(scene.image).save(part / split / name)
            images.append(dict(id=index, file_name=name, height=size, width=size))
            objects.extend(annotations(index, scene))
        for number, item in enumerate(objects, 1):  # COCO's evaluation uses id 0 for no match
            item['id'] = number
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(DIGITS)]
        content = dict(images=images, annotations=objects, categories=categories)
        (part / 'annotations' / f'{split}.json').write_text(json.dumps(content))

    return _write(root, write, dict(train=train, val=val), dict(size=size, seed=seed))


def write_ade20k(
    root: Path,
    train: int = 600,
    val: int = 100,
    size: int = 128,
    seed: int = 0,
    digits: tuple[int, int] = (2, 6),
    sides: tuple[int, int] = (6, 3),
    white: bool = False,
) -> Path:
    """Write scenes and label maps in ADE20K's folders.

    The files are ``root/{images,annotations}/{training,validation}/*.png``. Labels are 0 for the
    background and d + 1 for the digit d.

    Args:
        root: The folder to write; it is created completely or not at all.
        train: Number of training images.
        val: Number of validation images.
        size: Height and width in pixels.
        seed: Seed of all random numbers.
        digits: As for :func:`scenes`.
        sides: As for :func:`scenes`.
        white: As for :func:`scenes`.

    Returns:
        The folder.

    Raises:
        FileExistsError: If ``root`` exists and was not written with the same arguments.
    """

    def write(part: Path, split: str, drawn: Iterator[Scene]) -> None:
        folder = FOLDERS[split]
        for kind in ('images', 'annotations'):
            (part / kind / folder).mkdir(parents=True)
        for index, scene in enumerate(drawn):
            name = f'{index:05d}.png'
            Image.fromarray(scene.image).save(part / 'images' / folder / name)
            Image.fromarray(scene.label_map()).save(part / 'annotations' / folder / name)

    settings = dict(size=size, seed=seed, digits=tuple(digits), sides=tuple(sides), white=white)
    return _write(root, write, dict(train=train, val=val), settings)


def _write(
    root: Path,
    write: Callable[[Path, str, Iterator[Scene]], None],
    counts: dict[str, int],
    settings: dict[str, object],
) -> Path:
    """Write both splits to a temporary folder and rename it, unless that is done."""
    root = Path(root)
    facts = json.dumps({**counts, **settings})
    stamp = root / 'digit_scenes.json'
    if root.exists():
        if not stamp.is_file() or stamp.read_text() != facts:
            raise FileExistsError(
                f'{root} exists and does not hold the digit scenes {facts}: remove it, or name '
                'another folder'
            )
        return root
    with new_folder(root) as part:
        for split, count in counts.items():
            write(part, split, scenes(split, count, **settings))
        (part / stamp.name).write_text(facts)
    return root
