# Mask R-CNN in a cascade of two, with a small Slide-PVT, trained from scratch on a CPU with drawn shapes
# (`tools/make_mini_dataset.py data/mini`). For another data set in COCO's layout change data_root and nothing else.
# From crude boxes a class is learned slowly, so a second stage looks at the boxes that the first has moved.
_base_ = [
    '../_base_/models/cascade-mask-rcnn.py',
    '../_base_/datasets/coco_instance.py',
    '../_base_/default_runtime_det.py',
]
data_root = 'data/mini/coco/'
image_scale = (128, 128)
embed_dims = [48, 96, 160, 256]
channels = 64

model = dict(
    backbone=dict(
        type='mmslide.SlidePVT',
        arch=dict(
            embed_dims=embed_dims,
            depths=[2, 2, 2, 2],
            num_heads=[2, 4, 5, 8],
            mlp_ratios=[4, 4, 4, 4],
            sr_ratios=[8, 4, 2, 1],
        ),
        slide_stages=(0, 1, 2),
        pretrain_img_size=image_scale,
        stage_norm='next',
        drop_path_rate=0.0,
        # At these widths the usual standard deviation of 0.02 starts slowly.
        init_cfg=dict(type='Xavier', layer='Linear', distribution='uniform'),
    ),
    neck=dict(in_channels=embed_dims, out_channels=channels, num_outs=4, norm_cfg=dict(type='GN', num_groups=8)),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        anchor_generator=dict(scales=[6], strides=[4, 8, 16, 32]),
    ),
    # Light heads for few, small objects, whose masks do not depend on their class; they look at the finest map alone.
    # mmcv's RoIAlign takes five times as long on a CPU. SimpleRoIAlign is the same with one sample a bin,
    # but for samples at the border, which it mixes with zeros.
    roi_head=dict(
        num_stages=2,
        stage_loss_weights=[1.0, 1.0],
        bbox_roi_extractor=dict(
            roi_layer=dict(_delete_=True, type='SimpleRoIAlign', output_size=7),
            out_channels=channels,
            featmap_strides=[4],
        ),
        bbox_head=[
            dict(
                type='Shared2FCBBoxHead',
                in_channels=channels,
                fc_out_channels=256,
                roi_feat_size=7,
                num_classes={{_base_.num_classes}},
                bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_means=[0.0, 0.0, 0.0, 0.0], target_stds=stds),
                reg_class_agnostic=True,
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type='L1Loss', loss_weight=1.0),
            )
            for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1])
        ],
        mask_roi_extractor=dict(
            roi_layer=dict(_delete_=True, type='SimpleRoIAlign', output_size=14),
            out_channels=channels,
            featmap_strides=[4],
        ),
        mask_head=dict(num_convs=2, in_channels=channels, conv_out_channels=32, class_agnostic=True),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=[
            dict(
                assigner=dict(
                    type='MaxIoUAssigner',
                    pos_iou_thr=threshold,
                    neg_iou_thr=threshold,
                    min_pos_iou=threshold,
                    match_low_quality=False,
                    ignore_iof_thr=-1,
                ),
                sampler=dict(type='RandomSampler', num=num, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=True),
                mask_size=28,
                pos_weight=-1,
                debug=False,
            )
            for threshold, num in ((0.5, 32), (0.6, 16))
        ],
    ),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='RandomFlip', prob=[0.5, 0.25], direction=['horizontal', 'vertical']),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=image_scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),  # after Resize: annotations keep their size
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(side, side), keep_ratio=True) for side in (128, 160)],
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [
                dict(
                    type='PackDetInputs',
                    meta_keys=(
                        *('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
                        *('flip', 'flip_direction'),
                    ),
                )
            ],
        ],
    ),
]

train_dataloader = dict(
    batch_size=4,
    num_workers=1,
    dataset=dict(data_root=data_root, pipeline=train_pipeline),
)
val_dataloader = dict(num_workers=1, dataset=dict(data_root=data_root, pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val2017.json')
test_evaluator = val_evaluator

max_epochs = 6
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0,
        bias_decay_mult=0.0,
        custom_keys=dict(position_embedding=dict(decay_mult=0.0)),
    ),
    clip_grad=dict(max_norm=5.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', eta_min=0.0, by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=4)
randomness = dict(seed=0)
