# BCCD, boxes around blood cells; tools/dataset_converters/bccd.py writes the folder.
dataset_type = 'CheckedCocoDataset'
data_root = 'data/bccd/'
metainfo = dict(classes=('RBC', 'WBC', 'Platelets'))
scale = (320, 240)  # half the size: red cells of about 50 pixels, platelets of about 20

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(
        type='PackDetInputs',
        meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    ),
]

images = dict(type=dataset_type, data_root=data_root, metainfo=metainfo)
loader = dict(batch_size=2, num_workers=1, persistent_workers=True)
place = dict(img='images/')
train_dataloader = dict(
    **loader,
    dataset=dict(
        **images,
        ann_file='train.json',
        data_prefix=place,
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=train_pipeline,
    ),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    **loader,
    dataset=dict(
        **images, ann_file='val.json', data_prefix=place, test_mode=True, pipeline=test_pipeline
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
test_dataloader = dict(
    **loader,
    dataset=dict(
        **images, ann_file='test.json', data_prefix=place, test_mode=True, pipeline=test_pipeline
    ),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
del images, loader, place
val_evaluator = dict(type='CocoMetric', ann_file=data_root + 'val.json', metric='bbox')
test_evaluator = dict(type='CocoMetric', ann_file=data_root + 'test.json', metric='bbox')
