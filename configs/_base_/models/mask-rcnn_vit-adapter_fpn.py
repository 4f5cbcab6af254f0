_base_ = ['./mask-rcnn_vrwkv-adapter_fpn.py', './vit_adapter/tiny.py']

# Layers 2, 5, 8 and 11 have global attention, the others windows.
model = dict(
    backbone=dict(
        **_base_.pop('backbone'),
        window_size=14,
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
    ),
)
