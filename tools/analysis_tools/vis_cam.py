"""Draw class-activation maps with mmpretrain's own tool.

Use ``vis_cam.py IMAGE CONFIG CHECKPOINT --vit-like --save-path OUT.png`` for a VRWKV: its features
are tokens, and the default target layer is its final norm. All other options are mmpretrain's: see
``--help``.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import runpy
import sys
import types
import unittest.mock
from pathlib import Path

import mmpretrain
import numpy as np

import vrwkv_cls  # noqa: F401 (lets mmengine read configs without pkg_resources)

# Newer versions have dropped an argument that mmpretrain's tool passes.
REQUIREMENT = 'grad-cam==1.4.8'


def find_tool() -> Path:
    """Return the path of mmpretrain's tool.

    Raises:
        FileNotFoundError: If this mmpretrain does not contain it.
    """
    tool = Path(mmpretrain.__file__).parent / '.mim/tools/visualization/vis_cam.py'
    if not tool.is_file():
        raise FileNotFoundError(f'mmpretrain {mmpretrain.__version__} does not contain {tool}')
    return tool


def run_tool(run_name: str | None = None) -> dict:
    """Run mmpretrain's tool and return its names.

    It asks pkg_resources, which newer releases of setuptools lack, for the version of grad-cam.
    """
    stand_in = types.ModuleType('pkg_resources')
    stand_in.get_distribution = importlib.metadata.distribution
    with unittest.mock.patch.dict(sys.modules, pkg_resources=stand_in):
        return runpy.run_path(str(find_tool()), run_name=run_name)


def show_in_colour() -> None:
    """Let grad-cam draw on images of other than three channels.

    It adds a map of three colours to the image. Of more than three channels, the first three are
    the colours; of two, the first is the grey level.
    """
    image_module = importlib.import_module('pytorch_grad_cam.utils.image')
    show = image_module.show_cam_on_image

    def show_cam_on_image(image: np.ndarray, *args, **kwargs) -> np.ndarray:
        image = image[..., :3] if image.shape[-1] > 2 else image[..., :1].repeat(3, -1)
        return show(image, *args, **kwargs)

    image_module.show_cam_on_image = show_cam_on_image


def main() -> None:
    """Run mmpretrain's tool with this process's arguments."""
    try:
        version = importlib.metadata.version('grad-cam')
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is None or tuple(map(int, version.split('.')[:2])) >= (1, 5):
        found = 'is not installed' if version is None else f'is {version}'
        sys.exit(
            f'Error: mmpretrain draws class-activation maps with grad-cam below 1.5, which {found}'
            f": pip install --no-deps '{REQUIREMENT}' ttach (its other dependencies are there)"
        )
    try:
        sys.argv[0] = str(find_tool())
    except FileNotFoundError as error:
        sys.exit(f'Error: {error}')
    show_in_colour()
    run_tool('__main__')


if __name__ == '__main__':
    main()
