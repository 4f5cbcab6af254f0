_base_ = ['./mask-rcnn_vrwkv-adapter_fpn.py']

# The baseline of Tiny's size: layers 2, 5, 8 and 11 have global attention, the others windows.
model = dict(
    backbone=dict(
        type='ViTAdapter',
        num_heads=3,
        window_size=14,
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/deit/deit-tiny_pt-4xb256_in1k_20220218-13b382a0.pth'
        ),
    ),
)
