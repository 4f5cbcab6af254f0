_base_ = ['./mask-rcnn_vit-adapter-tiny_window_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        embed_dims=384,
        num_heads=6,
        drop_path_rate=0.2,
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
        ),
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)

optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
