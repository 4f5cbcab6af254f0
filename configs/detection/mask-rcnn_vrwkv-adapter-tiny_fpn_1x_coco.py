_base_ = [
    '../_base_/models/mask-rcnn_vrwkv-adapter_fpn.py',
    '../_base_/datasets/coco_instance_checked.py',
    '../_base_/schedules/coco_1x_adamw_layer-decay.py',
    '../_base_/default_runtime_det.py',
]

optim_wrapper = dict(optimizer=dict(lr=2e-4, weight_decay=0.01))
