_base_ = ['mmdet::_base_/schedules/schedule_1x.py']

# 12 epochs of batches of 16 images, 500 iterations of warm-up, no clipping: mmdet's own.
optim_wrapper = dict(
    constructor='LayerDecayOptimWrapperConstructor',
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(layer_decay_rate=0.85),
)
