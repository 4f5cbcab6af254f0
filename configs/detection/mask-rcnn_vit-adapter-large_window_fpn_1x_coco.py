_base_ = [
    '../_base_/recipes/mask-rcnn_fpn_1x_coco.py',
    '../_base_/models/vit_adapter/large.py',
]

model = dict(
    # The normalisation of the pre-training.
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(
        **_base_.pop('backbone'),
        # Layers 5, 11, 17 and 23 have global attention.
        window_size=14,
        window_block_indexes=[i for i in range(24) if i % 6 != 5],
    ),
    neck=dict(in_channels=[1024, 1024, 1024, 1024]),
)

optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
