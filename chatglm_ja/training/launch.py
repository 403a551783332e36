"""torchrun with a one-line error: which process ended the run, and how.

Takes torchrun's arguments. A process that failed has already printed its own error. For one that a
signal ended, this prints a line where torchrun would print two tracebacks and a table.
"""

import logging
import signal
import sys

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from chatglm_ja.training.watchdog import first_sentence


def main() -> None:
    try:
        launch()
    except (SignalException, KeyboardInterrupt) as error:  # also the second, during the cleanup
        sys.exit(128 + getattr(error, "sigval", signal.SIGINT))
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def launch() -> None:
    """Run torchrun with this program's arguments."""
    logging.disable(logging.CRITICAL)  # torch's loggers have levels of their own
    arguments = run.parse_args(sys.argv[1:])
    try:
        run.run(arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()  # the other processes fail because of it
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        cause = ", as when memory runs out" if name == "SIGKILL" else ""
        print(f"error: process {rank} of the run was ended by {name}{cause}", file=sys.stderr)
        sys.exit(128 - failure.exitcode)
    except DistError as error:
        address = f"{arguments.master_addr}:{arguments.master_port}"
        sys.exit(
            f"error: the processes cannot connect at {address} ({first_sentence(error)}): another "
            "run may use the port; set MASTER_PORT to a free one"
        )


if __name__ == "__main__":
    main()
