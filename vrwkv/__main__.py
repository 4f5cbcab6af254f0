"""``python -m vrwkv``: the versions of what is installed, and what serves mmcv's operators."""

import sys
from importlib.metadata import PackageNotFoundError, version

from . import mmcv_ops

PACKAGES = (
    ('torch',),
    ('torchvision',),
    ('mmengine', 'onedl-mmengine'),
    mmcv_ops.DISTRIBUTIONS,
    ('mmpretrain', 'onedl-mmpretrain'),
    ('mmdet', 'onedl-mmdetection'),
    ('mmsegmentation', 'onedl-mmsegmentation'),
    ('vision-rwkv',),
    ('vrwkv_ops',),
)


def _versions(names: tuple[str, ...]) -> str:
    found = []
    for name in names:
        try:
            found.append(f'{name} {version(name)}')
        except PackageNotFoundError:
            continue
    return ' and '.join(found) or f'{names[0]} is not installed'


def main() -> None:
    """Write the report to the standard output."""
    lines = [f'Python {sys.version.split()[0]}', *map(_versions, PACKAGES), mmcv_ops.describe()]
    sys.stdout.write('\n'.join([*lines, 'For the kernels of Bi-WKV: python -m vrwkv_ops']) + '\n')


if __name__ == '__main__':
    main()
