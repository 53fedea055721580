"""
From records to the bytes of MLflow's REST API, and nothing else: no I/O, no clock.

A server that cannot parse an entry drops the rest of the batch and answers 200, so every field is checked and typed
here. What a record holds, by kind (see `runqueue.queueing`); what is not shown of its six items is None:

    (RUN, ("run",), keys of its tags, NewRun)
    (PARAM, {key: value})
    (TAG, {key: value}, rides)
    (METRIC, {key: value}, timestamp_ns, step, model_id, (dataset_name, dataset_digest) | None)
    (DATASET, (Dataset | Unfit, ...))
    (STATUS, (), status, end_time_ms)
    (ARTIFACT, {path in the run's artifacts: what is uploaded, see `_artifacts`})

A value that could not be converted at the call is an [Unfit][] in its place; its entry fails alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Final

import attrs
import orjson

from runqueue._entities import Entry, EntryKind
from runqueue._points import INT64, MILLISECOND, NOT_FINITE, PLAIN_TAIL, Points, is_numeric
from runqueue._run import RunId
from runqueue.queueing import Batch, Encoding, Fragments, Joined, Limits, Record, RejectedError
from runqueue.queueing._batch import ARTIFACT, DATASET, METRIC, PARAM, RUN, STATUS, TAG

MLFLOW_LIMITS: Final = Limits(metrics=1_000, params=100, tags=100, entities=1_000, datasets=1_000, bytes=1_000_000)
"""Source: MLflow's REST API, "Log Batch"; datasets from `mlflow.utils.validation.MAX_DATASETS_PER_BATCH`."""

MAX_KEY: Final = 250
"""Characters; source: `mlflow.utils.validation.MAX_ENTITY_KEY_LENGTH`. Longer keys and values are cut."""
MAX_PARAM_VALUE: Final = 6_000
"""Characters; source: `mlflow.utils.validation.MAX_PARAM_VAL_LENGTH`."""
MAX_TAG_VALUE: Final = 8_000
"""Characters; source: `mlflow.utils.validation.MAX_TAG_VAL_LENGTH`."""

SYSTEM_TAGS: Final = 2
"""Tags of ours in a create-run: what the run is recognised by, and its parent."""
RIDERS: Final = 1_000 - SYSTEM_TAGS
"""Tags that a create-run carries besides."""
RIDER_BYTES: Final = 250_000
"""The same in bytes of ASCII-escaped JSON: the answer echoes them, and answers are read up to 1 MB."""

ENVELOPE: Final = 320
"""Bytes a log-batch has at most besides its fragments: its brackets and names, and a run id of up to 256 characters."""

TOKEN_TAG: Final = "runqueue.create_id"
"""What a run is recognised by."""
PARENT_TAG: Final = "mlflow.parentRunId"

OPERATIONS: Final = {
    RUN: "create_run",
    PARAM: "log_params",
    TAG: "set_tags",
    METRIC: "log_metrics",
    DATASET: "log_inputs",
    STATUS: "set_terminated",
    ARTIFACT: "log_artifact",
}
_ENTRY_KINDS: Final[dict[int, EntryKind]] = {
    RUN: "run",
    PARAM: "param",
    TAG: "tag",
    METRIC: "metric",
    DATASET: "dataset",
    STATUS: "run",
    ARTIFACT: "artifact",
}

_SAFE_TAG: Final = re.compile(r"[A-Za-z0-9_.\-: ]+(/[A-Za-z0-9_.\-: ]+)*")

logger = logging.getLogger("runqueue")


@attrs.frozen
class NewRun:
    """What `create_run` was asked for."""

    experiment_id: str | None
    experiment_name: str | None
    start_time: int
    run_name: str | None
    parent: RunId | None
    tags: dict[str, str]
    """Those of its own that are safe to travel inside the request."""
    sought: bool = False
    """Another process creates it: it is not created, but looked for."""


@attrs.frozen
class Unfit:
    """A value that cannot be sent, in the place it was given at, and why."""

    value: object
    reason: str


def safe_in_create(key: str) -> bool:
    """
    Whether a tag may travel inside create-run.

    Servers check keys in log-batch but not in create-run, where a bad one would be stored and then be out of reach of
    every other call; `mlflow.runName` contradicts `run_name`. Those go by log-batch, where the server judges them.
    """
    return (
        _SAFE_TAG.fullmatch(key) is not None
        and len(key) <= MAX_KEY
        and key != "mlflow.runName"
        and not any(part in (".", "..") for part in key.split("/"))
    )


class Encoder:
    """
    Turns records into fragments.

    `cut` counts the keys and values that were shortened. The only other state is a cache, see `_points`.
    """

    def __init__(self) -> None:
        self.cut = 0
        self._points = Points(_safe_metric_head, _metric_tail)
        self.encode = Encoding(self._one, self._many)
        """See `runqueue.queueing.Encode`; `memory` keeps which keys were cut to what."""

    def _one(self, record: Record, memory: dict[Any, Any]) -> Fragments:
        kind = record[0]
        if kind == METRIC:
            return self._metrics(record, memory)
        if kind in (PARAM, TAG):
            return self._texts(record, memory, MAX_PARAM_VALUE if kind == PARAM else MAX_TAG_VALUE)
        if kind == DATASET:
            return self._datasets(record)
        if kind == RUN:
            return [b",".join(_pair(key, value) for key, value in record[3].tags.items())], None
        return [b""], None  # STATUS: `status_body` makes the whole of it

    # -- metrics -----------------------------------------------------------------------------------------------------

    def _metrics(self, record: Record, memory: dict[Any, Any]) -> Fragments:
        made = self._many((record,), memory)
        if made is not None:
            joined, (tail,) = made
            return Joined(joined, len(record[1]), tail), None
        _, entries, stamp, step, model_id, dataset = record
        try:
            tail = _metric_tail(stamp, step, model_id, dataset)
        except RejectedError as error:
            return [b""] * len(entries), dict.fromkeys(range(len(entries)), error)
        return self._metrics_one_by_one(entries, tail, memory)

    def _many(self, records: Sequence[Record], memory: dict[Any, Any]) -> tuple[bytes, list[bytes]] | None:
        if memory:  # a key that was cut may be meant
            return None
        try:
            return self._points.encode(records)
        except Exception:  # RejectedError, and whatever a foreign __float__ raises
            return None

    def _metrics_one_by_one(self, entries: dict[Any, Any], tail: bytes, memory: dict[Any, Any]) -> Fragments:
        """The same with a closer look at each entry."""
        pieces: list[bytes] = []
        faults: dict[int, Exception] = {}
        for at, (key, value) in enumerate(entries.items()):
            try:
                head = None if memory else self._points.known(key)
                if head is None:
                    head = _metric_head(self._key(METRIC, key, memory))
                pieces.append(head + _number(value) + tail)
            except RejectedError as error:
                pieces.append(b"")
                faults[at] = error
        return pieces, faults or None

    # -- params, tags ------------------------------------------------------------------------------------------------

    def _texts(self, record: Record, memory: dict[Any, Any], longest: int) -> Fragments:
        pieces: list[bytes] = []
        faults: dict[int, Exception] = {}
        for at, (key, value) in enumerate(record[1].items()):
            try:
                short = self._key(record[0], key, memory)
                if isinstance(value, Unfit):
                    raise RejectedError(value.reason)
                pieces.append(_pair(short, self._shortened(_text(value), longest, f"the value of {short!r}")))
            except RejectedError as error:
                pieces.append(b"")
                faults[at] = error
        return pieces, faults or None

    def _key(self, kind: int, key: Any, memory: dict[Any, Any]) -> str:
        """
        Raises:
            RejectedError: It is no text, or another key of this run was cut to the same text.
        """
        if not isinstance(key, str):
            raise RejectedError(f"a key is text, not {type(key).__name__}")
        doubtful = _cuttable(key)
        if not doubtful and not memory:
            return key
        short = self._shortened(key, MAX_KEY, f"the key {key[:40]!r}...")
        if (short is not key or doubtful or (kind, short) in memory) and memory.setdefault((kind, short), key) != key:
            raise RejectedError(f"the key has {len(key)} characters, and is the same as another when cut to {MAX_KEY}")
        return short

    def _shortened(self, text: str, longest: int, what: str) -> str:
        if len(text) <= longest:
            return text
        self.cut += 1
        if self.cut == 1:
            logger.warning(
                "%s has %d characters and is cut to the server's %d; further cuts are only counted (Statistics.cut)",
                what,
                len(text),
                longest,
            )
        return text[: longest - 3] + "..."

    # -- datasets ----------------------------------------------------------------------------------------------------

    def _datasets(self, record: Record) -> Fragments:
        pieces: list[bytes] = []
        faults: dict[int, Exception] = {}
        for at, dataset in enumerate(record[1]):
            try:
                pieces.append(_dataset(dataset))
            except RejectedError as error:
                pieces.append(b"")
                faults[at] = error
        return pieces, faults or None


def is_number(value: object) -> bool:
    """Whether `float()` would convert the value, and not read it as text: it also reads whatever has a buffer."""
    return is_numeric(type(value))


def _metric_head(key: str) -> bytes:
    return b'{"key":' + _json_text(key, "key") + b',"value":'


def _cuttable(key: str) -> bool:
    """Whether the key is cut, or may be what another key is cut to."""
    return len(key) > MAX_KEY or (len(key) == MAX_KEY and key.endswith("..."))


def _safe_metric_head(key: Any) -> bytes:
    """Of a key that can be sent as it is, whatever other keys there are."""
    if not isinstance(key, str) or _cuttable(key):
        raise RejectedError("the key wants a closer look")
    return _metric_head(key)


def _metric_tail(stamp: Any, step: Any, model_id: str | None, dataset: tuple[str, str] | None) -> bytes:
    timestamp: Any = _milliseconds(stamp)
    if not (timestamp.__class__ is step.__class__ is int and 0 <= timestamp < INT64 and -INT64 <= step < INT64):
        timestamp, step = _whole(timestamp, "timestamp", 0), _whole(step, "step")
    if model_id is None and dataset is None:
        return PLAIN_TAIL % (timestamp, step)
    more = b',"timestamp":%d,"step":%d' % (timestamp, step)
    if model_id is not None:
        more += b',"model_id":' + _json_text(model_id, "model_id")
    if dataset is not None:
        more += b',"dataset_name":' + _json_text(dataset[0], "dataset name")
        more += b',"dataset_digest":' + _json_text(dataset[1], "dataset digest")
    return more + b"}"


def _milliseconds(stamp: int | Unfit) -> int | Unfit:
    return stamp if isinstance(stamp, Unfit) else stamp // MILLISECOND


def _whole(value: Any, name: str, least: int = -(2**63)) -> int:
    if isinstance(value, Unfit):
        raise RejectedError(value.reason)
    if not -INT64 <= value < INT64:
        raise RejectedError(f"{name} {_shown(value)} does not fit into 64 bits")
    if value < least:
        raise RejectedError(f"{name} {value} is negative")
    return int(value)


def _number(value: Any) -> bytes:
    if isinstance(value, Unfit):
        raise RejectedError(value.reason)
    if not is_number(value):
        what = "the text " if isinstance(value, (str, bytes)) else ""
        raise RejectedError(f"a metric value is a number, not {what}{_shown(value)}")
    if isinstance(value, complex):  # numpy's would be cut to its real part
        raise RejectedError(f"a metric value is a real number, not {_shown(value)}")
    try:
        number = float(value)
    except Exception as error:  # whatever a foreign __float__ raises concerns this entry alone
        raise RejectedError(f"{_shown(value)} cannot be converted to a float: {error}") from None
    return NOT_FINITE.get(repr(number)) or orjson.dumps(number)


def _text(value: Any) -> str:
    try:
        return str(value)
    except ValueError as error:  # an int of more digits than Python writes
        raise RejectedError(f"{_shown(value)} cannot be converted to text: {error}") from None


def _shown(value: object) -> str:
    """A value in a message: short, and never failing."""
    try:
        text = repr(value)
    except Exception as error:  # such as an int beyond the limit of digits
        text = f"<{type(value).__name__}: {error}>"
    return text if len(text) <= 100 else text[:97] + "..."


def _json_text(text: Any, name: str) -> bytes:
    if not isinstance(text, str):
        raise RejectedError(f"{name} is text, not {type(text).__name__}")
    try:
        return orjson.dumps(text)
    except TypeError:
        raise RejectedError(f"{name} {_shown(text)} is no valid Unicode (a lone surrogate)") from None


def _pair(key: str, value: str) -> bytes:
    return b'{"key":' + _json_text(key, "key") + b',"value":' + _json_text(value, "value") + b"}"


def _dataset(dataset: Any) -> bytes:
    if isinstance(dataset, Unfit):
        raise RejectedError(dataset.reason)
    fields = [
        b'"%s":%s' % (name.encode(), _json_text(value, f"a dataset's {name}"))
        for name in ("name", "digest", "source_type", "source", "schema", "profile")
        if (value := getattr(dataset, name)) is not None or name not in ("schema", "profile")
    ]
    tags = [_pair(key, value) for key, value in dataset.tags.items()]
    return b'{"dataset":{' + b",".join(fields) + b'},"tags":[' + b",".join(tags) + b"]}"


# -- bodies ----------------------------------------------------------------------------------------------------------


def log_batch_body(run_id: str, batch: Batch) -> bytes:
    """`POST runs/log-batch`."""
    return _body(run_id, [(b"metrics", METRIC), (b"params", PARAM), (b"tags", TAG)], batch)


def log_inputs_body(run_id: str, batch: Batch) -> bytes:
    """`POST runs/log-inputs`."""
    return _body(run_id, [(b"datasets", DATASET)], batch)


def _body(run_id: str, names: Iterable[tuple[bytes, int]], batch: Batch) -> bytes:
    parts = [b'{"run_id":', orjson.dumps(run_id)]
    for name, kind in names:
        if kind in batch.groups:
            parts += (b',"', name, b'":[', batch.joined(kind), b"]")
    return b"".join([*parts, b"}"])  # one copy of what may be a megabyte


def status_body(run_id: str, record: Record) -> bytes:
    """`POST runs/update`: one request ends a run."""
    return orjson.dumps({"run_id": run_id, "status": record[2], "end_time": record[3]})


def create_run_body(new: NewRun, experiment_id: str, system_tags: dict[str, str], tags: Iterable[bytes]) -> bytes:
    """`POST runs/create`, with the tags' fragments that travel inside it."""
    head: dict[str, Any] = {"experiment_id": experiment_id, "start_time": new.start_time}
    if new.run_name is not None:
        head["run_name"] = new.run_name
    if "mlflow.user" in new.tags:  # deprecated by MLflow, but older pages of its UI still read it
        head["user_id"] = new.tags["mlflow.user"]
    pieces = [_pair(key, value) for key, value in system_tags.items()] + [piece for piece in tags if piece]
    return orjson.dumps(head)[:-1] + b',"tags":[' + b",".join(pieces) + b"]}"


# -- reports ---------------------------------------------------------------------------------------------------------


def describe(record: Record, start: int, stop: int) -> Iterator[Entry]:
    """The entries of a stretch of a record, for a report."""
    kind = record[0]
    name = _ENTRY_KINDS[kind]
    if kind == RUN:
        yield Entry(name, record[3].run_name)
    elif kind == STATUS:
        yield Entry(name, "status", record[2])
    elif kind == DATASET:
        for given in record[1][start:stop]:
            yield Entry(name, None, given.value) if isinstance(given, Unfit) else Entry(name, given.name, given)
    elif kind == ARTIFACT:  # without what is uploaded: it may be large, and a report is kept
        for path in islice(record[1], start, stop):
            yield Entry(name, path)
    else:
        stamp, step = (_given(_milliseconds(record[2])), _given(record[3])) if kind == METRIC else (None, None)
        for key, value in islice(record[1].items(), start, stop):
            yield Entry(name, key, _given(value), step, stamp)


def _given(value: Any) -> Any:
    return value.value if isinstance(value, Unfit) else value
