_base_ = [
    '../_base_/models/vrwkv/classifier.py',
    '../_base_/datasets/cifar10_bs64.py',
    '../_base_/schedules/imagenet_bs1024_adamw_vrwkv.py',
    '../_base_/default_runtime_cls.py',
]

model = dict(
    backbone=dict(img_size=32, patch_size=4, embed_dims=64, depth=4),
    head=dict(num_classes=10, in_channels=64),
)

optim_wrapper = dict(optimizer=dict(lr=2e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, end=1, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min_ratio=1e-2,
        by_epoch=True,
        begin=1,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(max_epochs=15, val_interval=15)
auto_scale_lr = dict(base_batch_size=64)

default_hooks = dict(logger=dict(interval=50), checkpoint=dict(interval=5))
randomness = dict(seed=0)
