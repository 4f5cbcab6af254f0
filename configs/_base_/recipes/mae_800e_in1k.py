# MAE on ImageNet-1K: 800 epochs, batches of 4096 images. A config adds the size of the encoder.
_base_ = [
    '../models/vrwkv/mae.py',
    'mmpretrain::_base_/datasets/imagenet_bs512_mae.py',
    '../schedules/imagenet_bs4096_adamw_mae.py',
    '../default_runtime_cls.py',
]
