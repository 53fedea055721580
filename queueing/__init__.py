"""
The engine of runqueue: queues records by lane, batches them, delivers them in order, reports what failed.

It knows neither MLflow nor HTTP. Its caller hands it two functions: `encode` turns a record into fragments, and
`deliver` stores a batch. It runs on asyncio and on trio.

    log call -> Lane.inbox -> a window -> Lane.take (a batch) -> deliver -> Lane.store | Lane.reject -> Report
"""

from runqueue.queueing._errors import ClosedError as ClosedError
from runqueue.queueing._errors import ConfigError as ConfigError
from runqueue.queueing._errors import QueueFullError as QueueFullError
from runqueue.queueing._errors import RejectedError as RejectedError
from runqueue.queueing._errors import RunqueueError as RunqueueError
from runqueue.queueing._errors import Scope as Scope
from runqueue.queueing._errors import StoreError as StoreError
from runqueue.queueing._report import Failure as Failure
from runqueue.queueing._report import Report as Report
from runqueue.queueing.batches._batch import Batch as Batch
from runqueue.queueing.batches._batch import Bounds as Bounds
from runqueue.queueing.batches._batch import Limits as Limits
from runqueue.queueing.batches._part import Joined as Joined
from runqueue.queueing.batches._part import Record as Record
from runqueue.queueing.batches._part import Slice as Slice
from runqueue.queueing.lanes._account import Ledger as Ledger
from runqueue.queueing.lanes._accumulator import Accumulator as Accumulator
from runqueue.queueing.lanes._lane import Lane as Lane
from runqueue.queueing.lanes._screening import Encode as Encode
from runqueue.queueing.lanes._screening import Encoding as Encoding
from runqueue.queueing.lanes._screening import Fragments as Fragments
