_base_ = ['../../_base_/recipes/mae_finetune_in1k.py']

model = dict(
    backbone=dict(
        embed_dims=1024,
        depth=24,
        drop_path_rate=0.2,
        init_cfg=dict(checkpoint='work_dirs/mae_vrwkv-large_16xb256-800e_in1k/epoch_800.pth'),
    ),
    head=dict(in_channels=1024),
)

train_dataloader = dict(batch_size=64)

optim_wrapper = dict(
    optimizer=dict(lr=1e-3 * 1024 / 256, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.75),
)
train_cfg = dict(max_epochs=50)
