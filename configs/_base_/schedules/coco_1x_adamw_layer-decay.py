_base_ = ['mmdet::_base_/schedules/schedule_1x.py']

# mmdet's schedule: 12 epochs, batches of 16 images, 500 iterations of warm-up, no clipping.
# A config adds lr and weight_decay to the optimizer, and layer_decay_rate to paramwise_cfg.
optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW'),
)
