# Linear probing on ImageNet-1K as MAE does it for ViT-B: one layer learns, behind a batch norm
# without parameters. A config adds the size.
_base_ = [
    '../models/vrwkv/classifier.py',
    'mmpretrain::_base_/datasets/imagenet_bs32_pil_bicubic.py',
    '../default_runtime_cls.py',
]

model = dict(
    backbone=dict(
        type='FrozenVRWKV',
        # As in the pre-training.
        init_values=1e-5,
        post_norm=True,
        key_norm=True,
        init_cfg=dict(type='Pretrained', prefix='backbone.'),
    ),
    head=dict(
        init_cfg=dict(std=0.01),
        loss=dict(_delete_=True, type='CrossEntropyLoss'),
    ),
)

train_dataloader = dict(drop_last=True)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='LARS', lr=0.1 * 16384 / 256, momentum=0.9, weight_decay=0.0),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=10, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=90, val_interval=1)
val_cfg = dict()
test_cfg = dict()
auto_scale_lr = dict(base_batch_size=16384)
