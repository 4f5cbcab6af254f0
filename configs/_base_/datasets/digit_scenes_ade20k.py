# Handwritten digits on photographs, in ADE20K's folders; demo/digit_scenes.py writes them.
dataset_type = 'CheckedSegDataset'
data_root = 'data/digit_scenes_ade20k'
# White and large digits, so that minutes of training are enough.
digit_scenes = dict(train=2000, val=100, size=96, seed=0, digits=(4, 8), sides=(4, 3), white=True)
metainfo = dict(
    classes=('background', *'0123456789'),
    palette=[
        [40, 40, 40], [230, 25, 75], [60, 180, 75], [255, 225, 25], [0, 130, 200], [245, 130, 48],
        [145, 30, 180], [70, 240, 240], [240, 50, 230], [210, 245, 60], [250, 190, 212],
    ],
)  # fmt: skip

# No flips, since a mirrored digit is another sign, and no other augmentation: places and sizes are
# random already.
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeToMultiple', size_divisor=32),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=r, keep_ratio=True) for r in (0.75, 1.0, 1.25)],
            [dict(type='ResizeToMultiple', size_divisor=32)],
            [dict(type='LoadAnnotations')],
            [dict(type='PackSegInputs')],
        ],
    ),
]

images = dict(type=dataset_type, data_root=data_root, metainfo=metainfo, img_suffix='.png')
loader = dict(num_workers=1, persistent_workers=True)
train_dataloader = dict(
    batch_size=8,
    **loader,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        **images,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    **loader,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **images,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
    ),
)
del images, loader
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
