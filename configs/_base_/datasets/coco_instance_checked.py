_base_ = ['mmdet::_base_/datasets/coco_instance.py']

# mmdet's data set with checks of images and annotations.
train_dataloader = dict(dataset=dict(type='CheckedCocoDataset'))
val_dataloader = dict(dataset=dict(type='CheckedCocoDataset'))
test_dataloader = dict(dataset=dict(type='CheckedCocoDataset'))
