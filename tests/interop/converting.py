"""convert.py from a test: its command."""

import convert
from common.cli import run


def command(*args):
    return run(convert.main, convert.build_parser(), [str(arg) for arg in args])


def change(module, path, **attributes):
    (module.at(path) if path else module).attributes.update(attributes)
