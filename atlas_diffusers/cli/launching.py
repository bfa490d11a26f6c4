"""The training script as a child of this process, by Accelerate's settings; its exit status is kept."""

import logging
import signal
import subprocess
import types
from typing import Any

SCRIPT = "atlas_diffusers.training.script"
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


def launch(arguments: list[str]) -> int:
    """
    Run the training script with ``arguments`` as `accelerate config` set it up, on one process or several.

    SIGINT, SIGTERM and the end of the terminal reach the script, which ends calmly, unless they are ignored, as by nohup.
    Nothing of Accelerate's or torchrun's is printed after it.

    Returns:
        The exit status of the script, or 128 and the signal that ended it.
    """
    from accelerate.commands import launch as accelerate

    # what it takes where `accelerate config` never ran
    logging.getLogger(accelerate.__name__).setLevel(logging.ERROR)
    options = accelerate.launch_command_parser().parse_args(["-m", SCRIPT, *arguments])
    options, *_ = accelerate._validate_launch_command(options)
    if options.multi_gpu or options.use_deepspeed or options.use_fsdp or options.use_megatron_lm:
        return _several(accelerate.multi_gpu_launcher, options)
    return _one(*accelerate.prepare_simple_launcher_cmd_env(options))


def _one(command: list[str], environment: dict[str, str]) -> int:
    """In a session of its own: a terminal's Ctrl-C comes here only, and is passed on once."""
    process = None

    def forward(number: int, frame: types.FrameType | None) -> None:
        if process is None:
            raise KeyboardInterrupt
        process.send_signal(signal.SIGINT if number == signal.SIGINT else signal.SIGTERM)

    heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, forward) for number in heard}
    try:
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def _several(launcher: Any, options: Any) -> int:
    """torchrun starts the processes, passes signals on, and reports the first one that failed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launcher(options)
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as failure:
        status = failure.get_first_failure()[1].exitcode
        return status if status >= 0 else 128 - status
    return 0
