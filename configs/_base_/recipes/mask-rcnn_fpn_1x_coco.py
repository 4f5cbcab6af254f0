# Mask R-CNN on COCO: 12 epochs, batches of 16 images. A config adds the backbone, the learning
# rate, the weight decay and the layer decay.
_base_ = [
    '../models/mask-rcnn_adapter_fpn.py',
    '../datasets/coco_instance_checked.py',
    '../schedules/coco_1x_adamw_layer-decay.py',
    '../default_runtime_det.py',
]
