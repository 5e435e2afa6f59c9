_base_ = 'mask-rcnn_pvtv2-b1_fpn_1x_coco.py'
pretrained = 'https://github.com/whai362/PVT/releases/download/v2/pvt_v2_b4.pth'
model = dict(backbone=dict(arch='b4', init_cfg=dict(checkpoint=pretrained)))
optim_wrapper = dict(optimizer=dict(lr=2e-4 / 1.4))
train_dataloader = dict(batch_size=1)
auto_scale_lr = dict(base_batch_size=8 * 1)
