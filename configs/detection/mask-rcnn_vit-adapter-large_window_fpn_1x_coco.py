_base_ = [
    './mask-rcnn_vit-adapter-base_window_fpn_1x_coco.py',
    '../_base_/models/vit_adapter/large.py',
]

model = dict(
    backbone=dict(
        **_base_.pop('backbone'),
        # Layers 5, 11, 17 and 23 have global attention.
        window_block_indexes=[i for i in range(24) if i % 6 != 5],
    ),
    neck=dict(in_channels=[1024, 1024, 1024, 1024]),
)
