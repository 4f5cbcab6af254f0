_base_ = ['./mask-rcnn_vrwkv-adapter-tiny_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        embed_dims=384,
        init_values=1e-5,
        post_norm=True,
        drop_path_rate=0.2,
        init_cfg=dict(
            checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_s_in1k_224.pth'
        ),
    ),
    neck=dict(in_channels=[384, 384, 384, 384]),
)

optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
