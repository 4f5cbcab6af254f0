# Bamboo-47K. Everything but the number of classes is ours: it is what we have for ImageNet-22K.
_base_ = ['./vrwkv-large_32xb128-90e_in21k-192px.py']

num_classes = 47338

model = dict(head=dict(num_classes=num_classes))
data_preprocessor = dict(num_classes=num_classes)

# data/bamboo/meta/train.txt has a line '<path of an image in data/bamboo/train> <label>' for each.
bamboo = dict(_delete_=True, type='CustomDataset', data_root='data/bamboo')
train_dataloader = dict(
    dataset=dict(
        **bamboo,
        data_prefix='train',
        ann_file='meta/train.txt',
        pipeline=_base_.train_pipeline,
    ),
)
test_dataloader = dict(
    dataset=dict(
        **bamboo,
        data_prefix='val',
        ann_file='meta/val.txt',
        pipeline=_base_.test_pipeline,
    ),
)
