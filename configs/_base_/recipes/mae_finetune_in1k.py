# Fine-tuning on ImageNet-1K after MAE. A config adds the size and the rates. The paper has none for
# this step: they are those of MAE for the ViT of the same size.
_base_ = ['../models/vrwkv/classifier.py', './imagenet_300e_224.py']

model = dict(
    backbone=dict(
        # As in the pre-training.
        init_values=1e-5,
        post_norm=True,
        key_norm=True,
        init_cfg=dict(type='Pretrained', prefix='backbone.'),
    ),
    head=dict(init_cfg=dict(std=2e-5)),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)

optim_wrapper = dict(
    clip_grad=None,
    constructor='LearningRateDecayOptimWrapperConstructor',
    # As in MAE's code: vectors and positions have no weight decay.
    paramwise_cfg=dict(flat_decay_mult=0.0, custom_keys=dict(pos_embed=dict(decay_mult=0.0))),
)

param_scheduler = [
    dict(type='LinearLR', start_factor=1e-4, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR',
        eta_min=1e-6,
        by_epoch=True,
        begin=5,
        convert_to_iter_based=True,
    ),
]
