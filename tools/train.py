"""Trains a detector, segmentor or classifier."""

from mmslide import engine
from mmslide.data import check_data
from mmslide.messages import INPUT_ERRORS, exit_on


def main() -> None:
    parser = engine.argument_parser('Train a detector, segmentor or classifier')
    parser.add_argument('--amp', action='store_true', help='mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate to the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='FILE',
        help='resume from a checkpoint; without FILE, from the last undamaged one in the work dir',
    )
    with exit_on(*INPUT_ERRORS):
        args = parser.parse_args()
        config = engine.read_config(args, 'train_dataloader', 'train_cfg', 'optim_wrapper')
        if args.amp:
            config.optim_wrapper.update(type='AmpOptimWrapper', loss_scale='dynamic')
        if args.auto_scale_lr:
            engine.set_auto_scale_lr(config)
        engine.fall_back_to_cpu(config)
        check_data(config, 'train_dataloader', 'val_dataloader')
        engine.set_resume(config, args.resume)
        engine.check_model(config, args.config, config.load_from if config.get('resume') else None)
        engine.check_pretrained(config)
        runner = engine.build_runner(config)
    engine.launch(runner, runner.train)


if __name__ == '__main__':
    main()
