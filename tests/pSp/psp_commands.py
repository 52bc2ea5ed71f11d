"""Command lines of pSp from a test."""

from common.cli import run

SMALL = "--encoder_width 2 --workers 0 --test_workers 0 --board_interval 1 --device cpu".split()
PLAIN = [*SMALL, *"--lpips_lambda 0 --id_lambda 0 --start_from_latent_avg --batch_size 3".split()]


def start(script, *flags) -> int:
    return run(script.main, script.build_parser(), [str(flag) for flag in flags])
