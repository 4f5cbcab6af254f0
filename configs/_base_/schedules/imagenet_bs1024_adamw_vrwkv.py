_base_ = ['mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py']

optim_wrapper = dict(
    # Only norms and biases have no weight decay. Decays, bonuses and layer scales have it.
    paramwise_cfg=dict(flat_decay_mult=None),
    clip_grad=dict(max_norm=5.0),
)

# The final rate is a ratio, so that --auto-scale-lr scales it, too.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=20, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=20),
]
