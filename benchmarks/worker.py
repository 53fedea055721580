"""
One measurement, in a process of its own: `python -m benchmarks.worker CASE PEER SIZE TRACKING_URI` prints
`{"values": {…}}` as its last line.
"""

import argparse
import json
import os
import sys

from benchmarks.cases import CASES
from benchmarks.peer import PEERS
from benchmarks.work import Work


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.worker", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("size", type=int, help="calls, metrics or runs, as the case says")
    parser.add_argument("tracking_uri")
    given = parser.parse_args()

    case = CASES[given.case]
    work = Work(peer=PEERS[given.peer], size=given.size, tracking_uri=given.tracking_uri, options=case.options)
    values = dict(case.measure(work))
    work.finish()
    print()  # a peer may have left a line unfinished
    print(json.dumps({"values": values}))
    sys.stdout.flush()
    # The enqueue cases leave a full queue behind. A client may try to send it at the end of the interpreter; that is no
    # part of any case, so the process ends here.
    os._exit(0)


if __name__ == "__main__":
    main()
