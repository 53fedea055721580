"""
Side-by-side benchmarks of `runqueue` and its peers: `python -m benchmarks` from the repository root.

Imports point down only:

    __main__ (command line) -> plot, report -> harness (rounds, processes) -> measurement
    worker (one measurement, in a fresh process) -> cases (the table) -> enqueue, delivery, ... (the measurements)
      -> case (what a case is) -> work -> peer -> clients;   backend -> server;   target, quantity

README.md, beside this file, says what each case counts and how to add one.
"""
