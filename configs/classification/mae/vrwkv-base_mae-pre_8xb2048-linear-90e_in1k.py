# Linear probing as MAE does it for ViT-B: behind a batch norm without parameters, one layer learns.
_base_ = [
    '../../_base_/models/vrwkv/base.py',
    'mmpretrain::_base_/datasets/imagenet_bs32_pil_resize.py',
    '../../_base_/default_runtime_cls.py',
]

model = dict(
    backbone=dict(
        type='FrozenVRWKV',
        key_norm=True,  # as in the pre-training
        drop_path_rate=0.0,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/mae_vrwkv-base_8xb512-800e_in1k/epoch_800.pth',
            prefix='backbone.',
        ),
    ),
    neck=[
        dict(type='GlobalAveragePooling'),
        dict(type='ClsBatchNormNeck', input_features=768),
    ],
    head=dict(
        init_cfg=dict(std=0.01),
        loss=dict(_delete_=True, type='CrossEntropyLoss'),
    ),
    train_cfg=None,
)

train_dataloader = dict(batch_size=2048, drop_last=True)

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
