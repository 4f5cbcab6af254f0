_base_ = ['mmseg::_base_/schedules/schedule_160k.py']

# Of Tiny. Mixed precision: in bfloat16 where there is no GPU.
optim_wrapper = dict(
    type='AmpOptimWrapper',
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=12e-5, weight_decay=0.01),
    paramwise_cfg=dict(layer_decay_rate=0.95),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, begin=0, end=1500, by_epoch=False),
    dict(type='PolyLR', power=1.0, eta_min=0.0, begin=1500, end=160000, by_epoch=False),
]
auto_scale_lr = dict(base_batch_size=16)

# mmseg's interval is a tenth of the training.
default_hooks = dict(checkpoint=dict(interval=2000, max_keep_ckpts=2, save_best='mIoU'))
