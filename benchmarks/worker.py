"""
One measurement, in a process of its own: `python -m benchmarks.worker CASE PEER SIZE TRACKING_URI` prints
`{"value": …}` as its last line.
"""

import argparse
import json
import os
import sys

from benchmarks.case import CASES
from benchmarks.peer import PEERS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("size", type=int, help="calls or metrics, as the case says")
    parser.add_argument("tracking_uri")
    options = parser.parse_args()

    value = CASES[options.case].measure(PEERS[options.peer], options.size, options.tracking_uri)
    print(json.dumps({"value": value}))
    sys.stdout.flush()
    # The enqueue cases leave a full queue behind, to a server that does not exist. A client may try to send it at the
    # end of the interpreter; that is no part of any case, so the process ends here.
    os._exit(0)


if __name__ == "__main__":
    main()
