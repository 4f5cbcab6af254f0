# Fine-tune the released VRWKV-T on your own images in train/<class>/ and val/<class>/.
# Two lines to change:
data_root = 'data/my_images'
num_classes = 2

_base_ = [
    '../_base_/recipes/imagenet_300e_224.py',
    '../_base_/models/vrwkv/tiny.py',
]

model = dict(
    backbone=dict(
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://huggingface.co/OpenGVLab/Vision-RWKV/resolve/main/vrwkv_t_in1k_224.pth',
            prefix='backbone.',
        ),
    ),
    head=dict(num_classes=num_classes),
)
data_preprocessor = dict(num_classes=num_classes)

images = dict(_delete_=True, type='CustomDataset', data_root=data_root)
train_dataloader = dict(
    dataset=dict(**images, data_prefix='train', pipeline=_base_.train_pipeline),
)
val_dataloader = dict(
    dataset=dict(**images, data_prefix='val', pipeline=_base_.test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(topk=1)  # top-5 is always right for five classes
test_evaluator = val_evaluator

# The rates are ours.
optim_wrapper = dict(optimizer=dict(lr=2e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min_ratio=1e-2, by_epoch=True, begin=5),
]
train_cfg = dict(max_epochs=50, val_interval=1)
auto_scale_lr = dict(base_batch_size=64)

default_hooks = dict(
    logger=dict(interval=10),
    checkpoint=dict(save_best='auto'),
)
