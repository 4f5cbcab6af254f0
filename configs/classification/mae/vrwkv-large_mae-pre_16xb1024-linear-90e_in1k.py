_base_ = ['../../_base_/recipes/mae_linear_90e_in1k.py']

model = dict(
    backbone=dict(
        embed_dims=1024,
        depth=24,
        init_cfg=dict(checkpoint='work_dirs/mae_vrwkv-large_16xb256-800e_in1k/epoch_800.pth'),
    ),
    neck=[
        dict(type='GlobalAveragePooling'),
        dict(type='ClsBatchNormNeck', input_features=1024),
    ],
    head=dict(in_channels=1024),
)

train_dataloader = dict(batch_size=1024)
