"""Trains a detector or a segmentor."""

from mmslide import engine
from mmslide.data import check_data


def main() -> None:
    parser = engine.argument_parser('Train a detector or a segmentor')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='FILE',
        help='continue from a checkpoint; without FILE from the last whole one in the work dir',
    )
    args = parser.parse_args()

    config = engine.read_config(args)
    check_data(config, 'train_dataloader', 'val_dataloader')
    if args.amp:
        config.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
    if args.auto_scale_lr:
        engine.set_auto_scale_lr(config)
    if args.resume:
        engine.set_resume(config, args.resume)
    engine.build_runner(config).train()


if __name__ == '__main__':
    main()
