"""Draw class-activation maps with mmpretrain's own tool, which this finds and runs.

``vis_cam.py IMAGE CONFIG CHECKPOINT --vit-like --save-path OUT.png`` is what a VRWKV needs: its
features are tokens, and the default target layer is its final norm. All other options are
mmpretrain's: see ``--help``.
"""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
from pathlib import Path

import mmpretrain

# Newer ones have dropped an argument that mmpretrain's tool passes.
REQUIREMENT = 'grad-cam==1.4.8'


def find_tool() -> Path:
    """Say where mmpretrain's tool lies.

    Raises:
        FileNotFoundError: If this mmpretrain brings none.
    """
    tool = Path(mmpretrain.__file__).parent / '.mim/tools/visualization/vis_cam.py'
    if not tool.is_file():
        raise FileNotFoundError(f'mmpretrain {mmpretrain.__version__} brings no {tool}')
    return tool


def main() -> None:
    """Run mmpretrain's tool with this process's arguments."""
    version = None
    try:
        version = importlib.metadata.version('grad-cam')
    except importlib.metadata.PackageNotFoundError:
        found = 'is not installed'
    else:
        found = f'is {version}'
    if version is None or tuple(map(int, version.split('.')[:2])) >= (1, 5):
        sys.exit(
            f'Error: mmpretrain draws class-activation maps with grad-cam below 1.5, which {found}'
            f": pip install --no-deps '{REQUIREMENT}' ttach (its other dependencies are there)"
        )
    try:
        tool = str(find_tool())
    except FileNotFoundError as error:
        sys.exit(f'Error: {error}')
    sys.argv[0] = tool
    runpy.run_path(tool, run_name='__main__')


if __name__ == '__main__':
    main()
