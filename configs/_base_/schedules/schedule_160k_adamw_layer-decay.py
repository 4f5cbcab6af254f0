_base_ = ['mmseg::_base_/schedules/schedule_160k.py']

# Mixed precision, in bfloat16 on a machine without a GPU.
# A config adds lr and weight_decay to the optimizer, and layer_decay_rate to paramwise_cfg.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW'),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, by_epoch=False),
]
auto_scale_lr = dict(base_batch_size=16)

# mmseg saves once in 16,000 iterations.
default_hooks = dict(checkpoint=dict(interval=2000, max_keep_ckpts=2, save_best='mIoU'))
