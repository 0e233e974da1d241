"""`dept`, and `python -m dept_fl`: quiet when Ctrl-C comes while Python is still loading."""

from __future__ import annotations

import signal
import sys


def main() -> None:
    try:
        from dept_fl.cli import app

        app(prog_name="dept")
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would disturb the end


if __name__ == "__main__":
    main()
