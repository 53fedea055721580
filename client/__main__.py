"""`python -m runqueue` is `runqueue`."""

from __future__ import annotations

from runqueue._cli import main

if __name__ == "__main__":
    main()
