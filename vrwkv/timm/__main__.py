"""``python -m vrwkv.timm SCRIPT ...``: run a script of timm with Vision-RWKV's models."""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the command line names, with its arguments."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(
            'usage: python -m vrwkv.timm SCRIPT [ARGUMENT ...], such as train.py or validate.py'
        )
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(sys.argv[0]).parent)  # where Python looks for a script's neighbours
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
