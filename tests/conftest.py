"""What all tests share: GPU tests are skipped without a GPU, threads are few, and small data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope
from PIL import Image


def pytest_configure(config):
    torch.set_num_threads(min(torch.get_num_threads(), 2))


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason='needs an NVIDIA GPU')
    for item in items:
        if 'cuda' in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def default_scope():
    """Undo what a test does to mmengine's default scope, which every Runner sets for good."""
    before = DefaultScope._instance_dict.copy()
    yield
    DefaultScope._instance_dict = before


@pytest.fixture(scope='session')
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope='session')
def image_folder(tmp_path_factory) -> Path:
    """Folder with {train,val}/{dark,light}/<class><0-7>.png: 8 images of 32 x 32 pixels in each."""
    root = tmp_path_factory.mktemp('images')
    rng = np.random.default_rng(0)
    for split in ('train', 'val'):
        for name, level in (('dark', 64), ('light', 192)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(8):
                pixels = rng.integers(level - 60, level + 60, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{name}{index}.png')
    return root
