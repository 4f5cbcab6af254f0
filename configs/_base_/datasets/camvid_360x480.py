# CamVid in the form of the SegNet tutorial; tools/dataset_converters/camvid.py writes the folder.
dataset_type = 'CheckedSegDataset'
data_root = 'data/camvid'
metainfo = dict(
    classes=(
        'sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign', 'fence', 'car',
        'pedestrian', 'bicyclist',
    ),
    palette=[
        [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222],
        [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
    ],
)  # fmt: skip
crop_size = (256, 256)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.75, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(480, 360), keep_ratio=True),  # set another scale to enlarge
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]

images = dict(type=dataset_type, data_root=data_root, metainfo=metainfo, img_suffix='.png')
loader = dict(num_workers=1, persistent_workers=True)
train_dataloader = dict(
    batch_size=4,
    **loader,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **images,
        data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **images,
        data_prefix=dict(img_path='images/val', seg_map_path='labels/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=1,
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **images,
        data_prefix=dict(img_path='images/test', seg_map_path='labels/test'),
        pipeline=test_pipeline,
    ),
)
del images, loader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
