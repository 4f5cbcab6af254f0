_base_ = ['../../_base_/recipes/mae_finetune_in1k.py']

model = dict(
    backbone=dict(
        embed_dims=768,
        depth=12,
        drop_path_rate=0.1,
        init_cfg=dict(checkpoint='work_dirs/mae_vrwkv-base_8xb512-800e_in1k/epoch_800.pth'),
    ),
    head=dict(in_channels=768),
)

train_dataloader = dict(batch_size=128)

optim_wrapper = dict(
    optimizer=dict(lr=5e-4 * 1024 / 256, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.65),
)
train_cfg = dict(max_epochs=100)
