# Few labels: demo/mae_digits.py writes the list of 100 digits, another one for each seed.
_base_ = ['../vrwkv-nano_1xb64_digits.py']

model = dict(
    backbone=dict(patch_size=4, embed_dims=64, depth=4),
    head=dict(in_channels=64),
)

train_dataloader = dict(batch_size=50, dataset=dict(ann_file='digits-100-seed0.txt'))

optim_wrapper = dict(optimizer=dict(lr=1e-3))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-2, by_epoch=True, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=10),
]
train_cfg = dict(max_epochs=100, val_interval=100)
auto_scale_lr = dict(base_batch_size=50)

default_hooks = dict(
    logger=dict(interval=2),  # once per epoch
    checkpoint=dict(interval=50),
)
