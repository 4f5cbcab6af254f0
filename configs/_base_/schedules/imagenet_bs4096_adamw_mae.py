# A config adds lr and weight_decay to the optimizer.
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', betas=(0.9, 0.95)),
    # As in mmpretrain's MAE: vectors, positions and the mask token have no weight decay.
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys=dict(pos_embed=dict(decay_mult=0.0), mask_token=dict(decay_mult=0.0)),
    ),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-9, by_epoch=True, end=10, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=10, convert_to_iter_based=True),
]
train_cfg = dict(by_epoch=True, max_epochs=800)
auto_scale_lr = dict(base_batch_size=4096)
