_base_ = ['mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py']

optim_wrapper = dict(
    # Norms and biases only go without weight decay: decays, bonuses and layer scales have it.
    paramwise_cfg=dict(flat_decay_mult=None),
    clip_grad=dict(max_norm=5.0),
)
