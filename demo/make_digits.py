"""Write scikit-learn's handwritten digits as a folder of images."""

import argparse
from pathlib import Path

from vrwkv_cls.datasets import write_digits

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Parse the command line and write the images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'out', nargs='?', default=ROOT / 'data/digits', type=Path, help='default: %(default)s'
    )
    print(write_digits(parser.parse_args().out))


if __name__ == '__main__':
    main()
