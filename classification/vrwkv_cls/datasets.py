"""The handwritten digits of scikit-learn as a folder of images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from vrwkv._files import new_folder

NUM_IMAGES = 1797
HELD_OUT = 1 / 5


def write_digits(root: str | os.PathLike, size: int = 32) -> Path:
    """Write the digits to ``root/{train,val}/<digit>/<index>.png`` unless the folder holds them.

    The 1,797 images of 8x8 pixels (the UCI test set of `Optical Recognition of Handwritten Digits
    <https://doi.org/10.24432/C50P49>`_) are enlarged bicubically. A stratified fifth is held out as
    ``val``; the split is always the same. The folder appears when it is complete, so an interrupted
    call can be repeated.

    Args:
        root: The folder to write.
        size: Height and width of the written images in pixels.

    Returns:
        The folder.

    Raises:
        ImportError: If scikit-learn is not installed.
        FileExistsError: If ``root`` exists and does not hold all digits.
    """
    root = Path(root)
    if root.exists():
        found = len(list(root.glob('*/*/*.png')))
        if found != NUM_IMAGES:
            raise FileExistsError(
                f'{root} exists and holds {found} digits, not {NUM_IMAGES}: remove it, or name '
                'another folder'
            )
        return root
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        raise ImportError(
            'the digits come with scikit-learn, which is not installed: pip install scikit-learn',
            name=error.name,
        ) from error

    images, labels = load_digits().images, load_digits().target
    train, val = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0
    )
    with new_folder(root) as part:
        for split, indices in (('train', train), ('val', val)):
            for index in indices:
                folder = part / split / str(labels[index])
                folder.mkdir(parents=True, exist_ok=True)
                # Grey levels are 0 to 16.
                image = Image.fromarray(np.round(images[index] * (255 / 16)).astype(np.uint8))
                image = image.resize((size, size), Image.Resampling.BICUBIC)
                image.save(folder / f'{index:04d}.png')
    return root
