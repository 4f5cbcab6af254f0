"""Cut large images into overlapping crops, and join what a detector finds in them, with SAHI.

This is SAHI's command line, to which the models of vrwkv_det are known. All options are SAHI's.

  python tools/sliced_detection.py coco slice --image_dir DIR --dataset_json_path ANNOTATIONS.json
  python tools/sliced_detection.py predict --model_type mmdet --model_config_path CONFIG \
      --model_path CHECKPOINT --source IMAGE
"""

import importlib.util
import sys

import vrwkv_det  # noqa: F401

# SAHI also asks for opencv-python, which would overwrite the headless build.
INSTALL = 'pip install requests fire && pip install --no-deps sahi==0.12.8'


def main() -> None:
    """Run SAHI with this process's arguments."""
    if importlib.util.find_spec('sahi') is None:
        sys.exit(f'Error: SAHI is not installed: {INSTALL}')
    from sahi.cli import app

    app()


if __name__ == '__main__':
    main()
