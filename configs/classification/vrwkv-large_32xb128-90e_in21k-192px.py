# ImageNet-22K. Epochs, batch and resolution are the paper's. Neither the paper nor upstream's code
# has the learning rates. These are ours: Swin's pre-training has the same length and batch.
_base_ = [
    '../_base_/models/vrwkv/large.py',
    'mmpretrain::_base_/datasets/imagenet21k_bs128.py',
    '../_base_/schedules/imagenet_bs1024_adamw_vrwkv.py',
    '../_base_/default_runtime_cls.py',
]

# Upstream's number for the fall 2011 release (not 21,842).
num_classes = 21841

model = dict(
    backbone=dict(drop_path_rate=0.2),
    head=dict(num_classes=num_classes),
)
data_preprocessor = dict(num_classes=num_classes)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='RandomResizedCrop',
        scale=192,
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
# ImageNet-22K has no official validation set. Hold out a test set, in the same class folders.
val_cfg = None
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='ResizeEdge',
        scale=219,  # 256 / 224 * 192
        edge='short',
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='CenterCrop', crop_size=192),
    dict(type='PackInputs'),
]
test_dataloader = dict(
    batch_size=128,
    num_workers=5,
    dataset=dict(
        type='ImageNet21k',
        data_root='data/imagenet21k',
        data_prefix='val',
        ann_file='meta/val.txt',
        pipeline=test_pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_evaluator = dict(type='Accuracy', topk=(1, 5))

optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=5),
]
train_cfg = dict(by_epoch=True, max_epochs=90)
auto_scale_lr = dict(base_batch_size=4096)
