_base_ = ['../../_base_/recipes/mae_linear_90e_in1k.py']

model = dict(
    backbone=dict(
        embed_dims=768,
        depth=12,
        init_cfg=dict(checkpoint='work_dirs/mae_vrwkv-base_8xb512-800e_in1k/epoch_800.pth'),
    ),
    neck=[
        dict(type='GlobalAveragePooling'),
        dict(type='ClsBatchNormNeck', input_features=768),
    ],
    head=dict(in_channels=768),
)

train_dataloader = dict(batch_size=2048)
