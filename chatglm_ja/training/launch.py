"""torchrun, whose last word is one line: which process ended the run, and how.

Takes torchrun's arguments. What a process had to say itself, it has said; for one that a signal
ended this speaks, where torchrun would print two tracebacks and a table.
"""

import logging
import signal
import sys

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from chatglm_ja.training import watchdog


def main() -> None:
    # Warnings and errors about what is said below; torch's loggers have levels of their own.
    logging.disable(logging.CRITICAL)
    arguments = run.parse_args(sys.argv[1:])
    try:
        run.run(arguments)
    except ChildFailedError as error:
        # The first to end: the others follow from it.
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        name = signal.Signals(-failure.exitcode).name
        cause = ", as when memory runs out" if name == "SIGKILL" else ""
        print(f"error: process {rank} of the run was ended by {name}{cause}", file=sys.stderr)
        sys.exit(128 - failure.exitcode)
    except DistError as error:
        place = f"{arguments.master_addr}:{arguments.master_port}"
        print(
            f"error: the processes cannot meet at {place} ({watchdog.first_sentence(error)}): "
            "another run may use it; set MASTER_PORT to a free port",
            file=sys.stderr,
        )
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    main()
