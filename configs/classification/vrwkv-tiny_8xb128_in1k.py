_base_ = [
    '../_base_/models/vrwkv/tiny.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    '../_base_/schedules/imagenet_bs1024_adamw_vrwkv.py',
    '../_base_/default_runtime_cls.py',
]

train_dataloader = dict(batch_size=128)
