"""Train a small model on CIFAR-10, CamVid or BCCD, test it, and draw its predictions.

docs/photographs.md says how to get the data. Finished steps are not repeated: a second run only
prints the result, and an interrupted training continues from its last checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import digits_detection_demo
import digits_segmentation_demo
from demo_tools import ROOT, backbone_name, run_demo
from digits_demo import draw, predict
from mmengine.config import Config

CONFIG = ROOT / 'configs/classification/vrwkv-nano_1xb64-15e_cifar10.py'


def check_data(cfg: Config, data_root: Path) -> None:
    """Require that the data are there.

    Raises:
        SystemExit: If they are not.
    """
    if not data_root.is_dir():
        raise SystemExit(f'{data_root} does not exist: docs/photographs.md says how to get it')


def draw_checkpoint(
    config: Path, checkpoint: Path, data_root: Path, metrics: dict[str, float], out: Path
) -> None:
    """Draw the predictions of a checkpoint of any task."""
    cfg = Config.fromfile(config)
    if cfg.default_scope == 'mmpretrain':
        predictions = predict(
            config, checkpoint, data_root / cfg.test_dataloader.dataset.data_prefix
        )
        draw(predictions, metrics['accuracy/top1'], out, f'{backbone_name(config)} on photographs')
        return
    demo = digits_detection_demo if cfg.default_scope == 'mmdet' else digits_segmentation_demo
    demo.draw_checkpoint(config, checkpoint, data_root, metrics, out)


def main() -> None:
    """Run the demo from the command line."""
    run_demo(
        __doc__,
        CONFIG,
        check_data,
        draw_checkpoint,
        'predictions.png',
        'docs/photographs.md compares it with a ViT of the same size.',
    )


if __name__ == '__main__':
    main()
