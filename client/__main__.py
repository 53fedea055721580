"""`python -m runqueue` is `runqueue`."""

from __future__ import annotations

from runqueue.cli._main import main

if __name__ == "__main__":
    main()
