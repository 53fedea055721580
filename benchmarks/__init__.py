"""
Side-by-side benchmarks of `runqueue` and its peers: `python -m benchmarks` from the repository root.

Imports point down only:

    __main__ (command line) -> report (table, JSON) -> harness (rounds, processes) -> server (its own process)
    worker (one measurement, in a fresh process) -> case (what is measured) -> enqueue, delivery -> peer (who is measured)

README.md, beside this file, says what each case counts and how to add one.
"""
