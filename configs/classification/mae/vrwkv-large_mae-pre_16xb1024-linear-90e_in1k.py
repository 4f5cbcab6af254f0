# MAE's own recipe, as for Base.
_base_ = ['./vrwkv-base_mae-pre_8xb2048-linear-90e_in1k.py']

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
