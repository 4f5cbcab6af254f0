_base_ = ['./upernet_vrwkv-adapter-tiny_8xb2-160k_ade20k-512x512.py']

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
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)

optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.85))
