_base_ = ['./upernet_vrwkv-adapter-small_8xb2-160k_ade20k-512x512.py']

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
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768),
)

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.8))
