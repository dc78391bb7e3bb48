"""`python -m diptych.bench`."""

import argparse
import sys

from diptych.bench.command import add_flags, run
from diptych.errors import DiptychError

parser = argparse.ArgumentParser(prog="python -m diptych.bench", description="Send a load to a server and measure it.")
add_flags(parser)
try:
    sys.exit(run(parser.parse_args()))
except DiptychError as error:
    sys.exit(f"diptych: {error}")
