_base_ = ['mmdet::_base_/datasets/coco_instance.py']

# mmdet's data set, which also refuses labels that do not belong to its classes.
train_dataloader = dict(dataset=dict(type='CheckedCocoDataset'))
val_dataloader = dict(dataset=dict(type='CheckedCocoDataset'))
test_dataloader = dict(dataset=dict(type='CheckedCocoDataset'))
