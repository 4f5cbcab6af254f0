_base_ = [
    '../../_base_/models/vrwkv/mae_base.py',
    'mmpretrain::_base_/datasets/imagenet_bs512_mae.py',
    '../../_base_/schedules/imagenet_bs4096_adamw_mae.py',
    '../../_base_/default_runtime_cls.py',
]
