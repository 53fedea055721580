"""
The public names of `runqueue`, loaded together by the first use of one of them.
"""

# Rule of this file: a name is public if it stands here and in `runqueue.__all__`.

from __future__ import annotations as _annotations

from runqueue import errors as errors
from runqueue._entities import Dataset as Dataset
from runqueue._entities import Entry as Entry
from runqueue._entities import EntryKind as EntryKind
from runqueue._entities import FlushReport as FlushReport
from runqueue._entities import OperationFailure as OperationFailure
from runqueue._entities import Statistics as Statistics
from runqueue._run_id import PendingRunId as PendingRunId
from runqueue._run_id import RunId as RunId
from runqueue.api._async_client import AsyncClient as AsyncClient
from runqueue.api._client import Client as Client
from runqueue.api._run import Run as Run
from runqueue.api._run_operations import RunOperations as RunOperations
from runqueue.errors import AuthError as AuthError
from runqueue.errors import CallTypeError as CallTypeError
from runqueue.errors import ClosedError as ClosedError
from runqueue.errors import ConfigError as ConfigError
from runqueue.errors import FlushError as FlushError
from runqueue.errors import NotFoundError as NotFoundError
from runqueue.errors import QueueFullError as QueueFullError
from runqueue.errors import RejectedError as RejectedError
from runqueue.errors import RunqueueError as RunqueueError
from runqueue.errors import Scope as Scope
from runqueue.errors import StoreError as StoreError
from runqueue.errors import UnavailableError as UnavailableError
from runqueue.errors import UnexpectedAnswerError as UnexpectedAnswerError
from runqueue.queueing import Limits as Limits
from runqueue.settings._config import OnFailure as OnFailure
from runqueue.settings._config import OnFull as OnFull
from runqueue.settings._config import Token as Token
from runqueue.settings._config import Transport as Transport

# Users and tracebacks read `runqueue.Client`, not the name of the private module that defines it.
for _value in [each for each in globals().values() if isinstance(each, type)]:
    if _value.__module__.startswith("runqueue."):
        _value.__module__ = "runqueue"
