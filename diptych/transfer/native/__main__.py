"""`python -m diptych.transfer.native [--in-place]`: compile the copy routines ahead of the first start."""

import argparse
import sys

from diptych.transfer.native import build


def main() -> int:
    """Build, say where, and fail loudly: whoever runs this wants the compiled routines."""
    parser = argparse.ArgumentParser(prog="python -m diptych.transfer.native", description=main.__doc__)
    parser.add_argument("--in-place", action="store_true", help="next to the source, for packaging, not in the cache")
    try:
        library = build.build_in_place() if parser.parse_args().in_place else build.find_or_build()
    except (OSError, RuntimeError, build.BuildError) as error:
        print(f"could not build the copy routines: {error}", file=sys.stderr)
        return 1
    print(library)
    return 0


if __name__ == "__main__":
    sys.exit(main())
