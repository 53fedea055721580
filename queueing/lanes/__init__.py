"""
Lanes: everything that is queued for one run, from the log call that puts it there until it is settled.

No I/O. The inbox is filled by any thread; everything else in this room belongs to the engine's thread.
"""
