# Bamboo-47K. Only the number of classes is published. The recipe is ours for ImageNet-22K.
_base_ = ['./vrwkv-large_32xb128-90e_in21k-192px.py']

num_classes = 47338

model = dict(head=dict(num_classes=num_classes))
data_preprocessor = dict(num_classes=num_classes)

# data/bamboo/meta/train.txt has one line for each image in data/bamboo/train: '<path> <label>'.
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
