# The paper has no rates for fine-tuning straight after MAE: these are MAE's own, for ViT-B.
_base_ = ['../vrwkv-base_16xb64_in1k.py']

model = dict(
    backbone=dict(
        key_norm=True,  # as in the pre-training
        drop_path_rate=0.1,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='work_dirs/mae_vrwkv-base_8xb512-800e_in1k/epoch_800.pth',
            prefix='backbone.',
        ),
    ),
    head=dict(init_cfg=dict(std=2e-5)),
)

train_dataloader = dict(batch_size=128)

optim_wrapper = dict(
    optimizer=dict(lr=5e-4 * 1024 / 256),
    clip_grad=None,
    constructor='LearningRateDecayOptimWrapperConstructor',
    # With layer decay, vectors have no weight decay.
    paramwise_cfg=dict(layer_decay_rate=0.65, flat_decay_mult=0.0),
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
train_cfg = dict(max_epochs=100)
