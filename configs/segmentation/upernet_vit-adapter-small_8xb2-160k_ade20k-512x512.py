_base_ = ['./upernet_vit-adapter-tiny_8xb2-160k_ade20k-512x512.py']

model = dict(
    backbone=dict(
        embed_dims=384,
        num_heads=6,
        drop_path_rate=0.2,
        init_cfg=dict(
            checkpoint='https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
        ),
    ),
    decode_head=dict(in_channels=[384, 384, 384, 384]),
    auxiliary_head=dict(in_channels=384),
)

optim_wrapper = dict(optimizer=dict(lr=6e-5), paramwise_cfg=dict(layer_decay_rate=0.85))
