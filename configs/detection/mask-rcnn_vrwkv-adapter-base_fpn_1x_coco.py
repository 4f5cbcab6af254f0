_base_ = ['./mask-rcnn_vrwkv-adapter-small_fpn_1x_coco.py']

model = dict(
    backbone=dict(
        embed_dims=768,
        drop_path_rate=0.3,
        deform_num_heads=12,
        deform_ratio=0.5,
        init_cfg=dict(
            checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_b_in1k_224.pth'
        ),
    ),
    neck=dict(in_channels=[768, 768, 768, 768]),
)
