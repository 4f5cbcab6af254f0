# Shared by all sizes: a size file beside this one adds the width and the depth.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='VRWKV', img_size=224, patch_size=16),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)
