"""Write photographs with handwritten digits as GeoTIFFs of four bands, to try rasters with.

Bands are red, green, blue and a made near infrared, as 16-bit numbers; the CRS is UTM, with pixels
of half a metre. Beside small rasters with label maps for training and validation there is a large
one to make a map of, whose left edge has no data.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import rasterio
from demo_tools import ROOT
from digit_scenes import FOLDERS, Scene, scenes
from rasterio.transform import from_origin

from vrwkv._files import new_folder

PIXEL = 0.5  # metres
NODATA = 0
SCALE = 40  # 16-bit numbers of one grey level
SIZE = 96  # height and width of a scene in pixels


def bands(scene: Scene) -> np.ndarray:
    """Return the four bands of a scene, of shape (4, size, size) and uint16."""
    red, green, blue = scene.image.transpose(2, 0, 1).astype(np.uint16)
    infrared = np.where(scene.masks.any(0), 255, (2 * green + 255 - blue) // 6)
    return 1 + SCALE * np.stack([red, green, blue, infrared])


def write(path: Path, values: np.ndarray, nodata: int) -> None:
    """Write values of shape (bands, height, width) as a GeoTIFF."""
    count, height, width = values.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    options = dict(
        driver='GTiff',
        tiled=True,
        compress='deflate',
        crs='EPSG:32631',
        transform=from_origin(500_000, 5_400_000, PIXEL, PIXEL),
        nodata=nodata,
    )
    with rasterio.open(
        path, 'w', count=count, height=height, width=width, dtype=values.dtype, **options
    ) as file:
        file.write(values)


def write_rasters(root: Path, train: int, val: int, side: int) -> Path:
    """Write the rasters.

    Args:
        root: The folder to write; it is created completely or not at all.
        train: Number of training images.
        val: Number of validation images.
        side: Scenes along a side of the large raster.

    Returns:
        The folder.

    Raises:
        FileExistsError: If ``root`` exists.
    """
    options = dict(size=SIZE, digits=(4, 8), sides=(4, 3), white=True)
    with new_folder(root) as part:
        for split, count in dict(train=train, val=val).items():
            folder = FOLDERS[split]
            for index, scene in enumerate(scenes(split, count, **options)):
                name = f'{index:05d}.tif'
                write(part / 'images' / folder / name, bands(scene), NODATA)
                write(part / 'annotations' / folder / name, scene.label_map()[None], 255)
        drawn = scenes('val', side * side, seed=1, **options)
        large = np.zeros((4, side * SIZE, side * SIZE), np.uint16)
        truth = np.full((1, side * SIZE, side * SIZE), 255, np.uint8)
        for index, scene in enumerate(drawn):
            top, left = (SIZE * x for x in divmod(index, side))
            place = (slice(None), slice(top, top + SIZE), slice(left, left + SIZE))
            large[place], truth[place] = bands(scene), scene.label_map()
        large[:, :, : SIZE // 2], truth[:, :, : SIZE // 2] = NODATA, 255
        write(part / 'large.tif', large, NODATA)
        write(part / 'large_truth.tif', truth, 255)
    return root


def main() -> None:
    """Write the rasters from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    root = ROOT / 'data/digit_rasters'  # as in the config
    parser.add_argument('out', nargs='?', type=Path, default=root, help='default: %(default)s')
    parser.add_argument('--train', type=int, default=2000, help='images (default: %(default)s)')
    parser.add_argument('--val', type=int, default=100, help='images (default: %(default)s)')
    parser.add_argument(
        '--side', type=int, default=10,
        help=f'scenes of {SIZE} pixels along a side of the large raster (default: %(default)s)',
    )  # fmt: skip
    args = parser.parse_args()
    print(write_rasters(args.out, args.train, args.val, args.side))


if __name__ == '__main__':
    main()
