# Handwritten digits on photographs; demo/digit_scenes.py writes the folder with these arguments.
digit_scenes = dict(train=600, val=100, size=128)
dataset_type = 'CheckedCocoDataset'
data_root = 'data/digit_scenes_coco/'
metainfo = dict(classes=tuple('0123456789'))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    # No flips: a mirrored digit is another sign.
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]

images = dict(type=dataset_type, data_root=data_root, metainfo=metainfo)
loader = dict(batch_size=8, num_workers=1, persistent_workers=True)
train_dataloader = dict(
    **loader,
    dataset=dict(
        **images,
        ann_file='annotations/train.json',
        data_prefix=dict(img='train/'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    **loader,
    dataset=dict(
        **images,
        ann_file='annotations/val.json',
        data_prefix=dict(img='val/'),
        test_mode=True,
        pipeline=test_pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
del images, loader
val_evaluator = dict(
    type='CocoMetric', ann_file=data_root + 'annotations/val.json', metric=['bbox', 'segm']
)
test_dataloader = val_dataloader
test_evaluator = val_evaluator
