"""The library behind the numbered steps; each subpackage's docstring says what it is for.

The steps import this package. It imports neither a step nor constants.py: every path and setting is
passed in, so each module can be used and tested on its own, in any folder.
"""

from chatglm_ja import interrupts  # noqa: F401  first: it handles Ctrl-C from here on

# isort: split
import importlib.util
import sys

if importlib.util.find_spec("pydantic") is None:
    sys.exit(
        f"error: the project's packages are not installed for {sys.executable}: run "
        "`source .venv/bin/activate` first, or `pip install -r requirements.txt`"
    )
