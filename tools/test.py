"""Tests a detector, segmentor or classifier."""

from mmslide import engine
from mmslide.data import check_data
from mmslide.messages import INPUT_ERRORS, exit_on


def main() -> None:
    parser = engine.argument_parser('Test a detector, segmentor or classifier')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='write predictions: a .pkl file; for segmentation, a folder of label maps')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for images with predictions next to the ground truth')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds to show each image with --show')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    with exit_on(*INPUT_ERRORS):
        args = parser.parse_args()
        config = engine.read_config(args, 'test_dataloader', 'test_cfg', 'test_evaluator')
        engine.fall_back_to_cpu(config)
        check_data(config, 'test_dataloader')
        engine.check_model(config, args.config, args.checkpoint)
        config.load_from = args.checkpoint
        if args.show or args.show_dir:
            engine.set_show(config, args.show, args.show_dir, args.wait_time)
        if args.tta:
            engine.set_tta(config)
        if args.out:
            engine.set_out(config, args.out)
        runner = engine.build_runner(config)
    engine.launch(runner, runner.test)


if __name__ == '__main__':
    main()
