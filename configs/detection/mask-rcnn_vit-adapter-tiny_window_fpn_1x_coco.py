_base_ = [
    '../_base_/recipes/mask-rcnn_fpn_1x_coco.py',
    '../_base_/models/vit_adapter/tiny.py',
]

model = dict(
    backbone=dict(
        **_base_.pop('backbone'),
        # Layers 2, 5, 8 and 11 have global attention.
        window_size=14,
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
    ),
    neck=dict(in_channels=[192, 192, 192, 192]),
)

optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.01),
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
