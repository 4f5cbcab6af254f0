_base_ = [
    '../_base_/models/vrwkv/classifier.py',
    '../_base_/datasets/digits_bs64.py',
    '../_base_/schedules/imagenet_bs1024_adamw_vrwkv.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(
    backbone=dict(img_size=32, patch_size=8, embed_dims=96, depth=6),
    head=dict(num_classes=10, in_channels=96),
)

optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, end=3, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=3),
]
train_cfg = dict(max_epochs=40)
auto_scale_lr = dict(base_batch_size=64)

default_hooks = dict(logger=dict(interval=23))  # once per epoch
randomness = dict(seed=0)
