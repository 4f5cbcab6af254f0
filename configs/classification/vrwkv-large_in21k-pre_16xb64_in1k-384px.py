# Fine-tune a Large of ImageNet-22K: vrwkv-large_32xb128-90e_in21k-192px or the released one.
_base_ = [
    '../_base_/models/vrwkv/large.py',
    'mmpretrain::_base_/datasets/imagenet_bs64_deit3_384.py',
    '../_base_/schedules/imagenet_bs1024_adamw_vrwkv.py',
    '../_base_/default_runtime_cls.py',
]

# A new head would hardly learn at this rate, so it starts from the rows of the 22K head for the
# classes of ImageNet-1K. tools/model_converters/subset_head.py writes this file.
load_from = 'work_dirs/vrwkv-large_32xb128-90e_in21k-192px/in1k.pth'

model = dict(
    backbone=dict(drop_path_rate=0.1),
    # On half of the batches. probs is no list, since mmpretrain would append to it.
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8)], probs=0.5),
)

optim_wrapper = dict(
    optimizer=dict(lr=5e-6 * 1024 / 512),
    clip_grad=dict(max_norm=1.0),
)

# 5e-9 per 512 images, up to 5e-6 in 2 epochs, and down to 5e-8.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=2, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=2),
]
train_cfg = dict(max_epochs=20)

custom_hooks = [dict(type='EMAHook', momentum=1e-4)]
