"""
Looks for secrets in all that a process shows of itself: logs, warnings, reprs, errors with the locals of their frames,
pickles, output, files.

    with watched(SECRET) as evidence:
        ...
        evidence.error("the flush", error)
    assert evidence.leaks == []

What counts as shown is what an error tracker uploads: of each local its repr(), and, where it is a container, its
items; not the attributes of an object, as a client cannot do its work without its token. The frames of the tests
themselves hold the secret by right and are passed over.
"""

# Rules of this file: it knows of the library what is public, and the names of its modules, no more. Pieces of a secret
# count as it: eight of its characters in a row are found wherever they are cut off, as they stand, in base64 at any
# offset, or in hexadecimal. Every collector can be shown to find what is planted for it.

from __future__ import annotations

import base64
import gc
import io
import logging
import pickle
import sys
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import pytest

from runqueue import FlushReport, OperationFailure

TESTS: Final = str(Path(__file__).resolve().parents[1])
_WINDOW: Final = 6
_STRIDE: Final = 3
_DEEP: Final = 5
"""Containers within containers that are looked into."""
_AROUND: Final = 70
"""Characters of context in a finding."""
_SCALARS: Final = (str, bytes, bytearray, int, float, bool, type(None))


def pieces_of(*words: str) -> tuple[str, ...]:
    """
    Return the texts to look for, so that any eight characters in a row of these words are found.

    Args:
        words: Letters and digits only, which no quoting changes.
    """
    found: set[str] = set()
    for word in words:
        assert word.isascii() and word.isalnum() and len(word) >= _WINDOW + _STRIDE, word
        found.update(_windows(word))
        found.update(_windows(word.encode().hex(), 2 * _WINDOW))
        for offset in range(3):  # what stands before it shifts the bits
            encoded = base64.b64encode(b"\0" * offset + word.encode()).decode()
            found.update(_windows(encoded[offset + (offset > 0) : -4]))
            found.update(_windows(encoded[offset + (offset > 0) : -4].replace("+", "-").replace("/", "_")))
    return tuple(sorted(found))


def _windows(text: str, size: int = _WINDOW) -> Iterator[str]:
    for at in range(0, len(text) - size + 1, _STRIDE):
        yield text[at : at + size]


class Evidence:
    """
    The leaks that were found.

    Args:
        words: The secrets; see `pieces_of`.
    """

    def __init__(self, *words: str) -> None:
        self.leaks: list[str] = []
        """Where, and what stands there."""
        self.looked_at: dict[str, int] = {}
        """How many texts, by collector: a search that looked at nothing proves nothing."""
        self.loggers: set[str] = set()
        self._pieces = pieces_of(*words)
        self._errors: dict[int, BaseException] = {}  # held, so that no other gets its id
        self._clean: set[str] = set()  # most texts come many times
        self._lock = threading.Lock()

    def text(self, where: str, text: str) -> None:
        """Check a text that was shown."""
        with self._lock:
            kind = where.partition(":")[0]
            self.looked_at[kind] = self.looked_at.get(kind, 0) + 1
        if text in self._clean:
            return
        at = min((at for at in map(text.find, self._pieces) if at >= 0), default=-1)
        if at < 0:
            self._clean.add(text)
        else:
            leak = f"{where}: ...{text[max(0, at - _AROUND) : at + _AROUND]}..."
            if leak not in self.leaks:
                self.leaks.append(leak)

    def value(self, where: str, value: object, depth: int = _DEEP) -> None:
        """Check the repr() and str() of a value, of the items of containers, and of the errors in it."""
        for show in (repr, str):
            try:
                text = show(value)
            except Exception as error:  # noqa: BLE001  one that is half made has none
                text = f"no {show.__name__}: {error}"
            self.text(where, text)
        if isinstance(value, BaseException):
            self.error(where, value)
        if depth == 0 or isinstance(value, _SCALARS):
            return
        for item in _items(value):
            self.value(where, item, depth - 1)

    def error(self, where: str, error: BaseException) -> None:
        """Check an exception: texts, causes, notes, the locals of every frame, the printed traceback, the pickle."""
        if id(error) in self._errors:
            return
        self._errors[id(error)] = error
        name = f"{where}, {type(error).__name__}"
        self.text(f"error: {name}", "".join(traceback.format_exception(error)))
        for attribute in (str(error), repr(error), error.args, vars(error), getattr(error, "__notes__", ())):
            self.value(f"error: {name}", attribute)
        for frame, names in frames(error.__traceback__):
            for local, value in names.items():
                self.value(f"local: {name}, {frame}, {local}", value)
        self.pickled(name, error)
        inner: Iterable[BaseException] = getattr(error, "exceptions", ())
        for each in (error.__cause__, error.__context__, *inner):
            if each is not None:
                self.error(f"{where}, cause of {type(error).__name__}", each)

    def pickled(self, where: str, value: object) -> bool:
        """Check the pickle of a value; return whether it can be pickled."""
        try:
            dump = pickle.dumps(value, 0) + pickle.dumps(value)
        except Exception:  # noqa: BLE001  whatever is in its way, so it does not get out
            return False
        self.text(f"pickle: {where}", dump.decode("latin-1"))
        return True

    def objects(self, where: str, root: object) -> set[str]:
        """
        Check the repr() and str() of every object of the library's that is reachable from this one; return their
        classes.
        """
        seen: dict[int, object] = {}
        names: set[str] = set()
        queue: deque[object] = deque([root])
        while queue:
            each = queue.popleft()
            if id(each) in seen or isinstance(each, _SCALARS):
                continue
            seen[id(each)] = each
            ours = type(each).__module__.partition(".")[0] == "runqueue"
            if ours:
                names.add(type(each).__name__)
                self.value(f"repr: {where}, {type(each).__name__}", each)
            if ours or isinstance(each, (Mapping, list, tuple, set, frozenset, deque)):
                queue.extend(_items(each))
                queue.extend(_attributes(each))
            elif getattr(each, "__self__", None) is not None:  # a bound method
                queue.append(each.__self__)  # type: ignore[attr-defined]
        return names

    def record(self, record: logging.LogRecord) -> None:
        """
        Check a log record: text, arguments, exception. Of other libraries' records below level ERROR only the printed
        text is checked: no error tracker uploads their frames, and runqueue cannot change them.
        """
        self.loggers.add(record.name)
        if _is_record_of_answer_headers(record):
            return
        where = f"log: {record.name}"
        self.text(where, f"{record.getMessage()} {vars(record)!r}")
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            self.text(where, "".join(traceback.format_exception(error)))
        if record.levelno >= logging.ERROR or record.name.partition(".")[0] == "runqueue":
            self.value(where, record.args)
            if error is not None:
                self.error(where, error)

    def files(self, folder: Path) -> None:
        """Check names and contents of all files in a folder."""
        for path in folder.rglob("*"):
            self.text(f"file: {path.name}", path.name)
            if path.is_file():
                self.text(f"file: {path.name}", path.read_bytes().decode("latin-1"))


def _is_record_of_answer_headers(record: logging.LogRecord) -> bool:
    """
    Return whether a record is httpcore's DEBUG record of an answer's headers.

    Such records are not checked. They quote a server that echoes the request in its headers (Location, for instance).
    The logger belongs to another library, and a user who enables it wants to see the connection's bytes. The records
    hold none of the request's headers.
    """
    return record.name.startswith("httpcore.") and record.getMessage().startswith("receive_response_headers.")


def _items(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        for key, item in list(value.items()):
            yield key
            yield item
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from list(value)
    elif isinstance(value, FlushReport):
        yield from value.failures
    elif isinstance(value, OperationFailure):
        yield value.error
        yield value.entries[:3]
        yield value.run_id


def _attributes(value: object) -> Iterator[object]:
    yield from list(getattr(value, "__dict__", {}).values())
    for each in type(value).__mro__:
        slots = each.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            held = getattr(value, f"_{each.__name__}{name}" if name.startswith("__") else name, None)
            if held is not None and not name.endswith("__weakref__"):
                yield held


def frames(trace: TracebackType | None) -> Iterator[tuple[str, Mapping[str, object]]]:
    """Return place and locals of every frame, those of the tests left out."""
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith(TESTS):
            yield f"{Path(code.co_filename).name}:{code.co_name}", dict(trace.tb_frame.f_locals)
        trace = trace.tb_next


@contextmanager
def watched(*words: str) -> Iterator[Evidence]:
    """
    Check all that is logged (by any logger, at any level), warned of, printed, or raised uncaught, until the block
    ends.
    """
    evidence = Evidence(*words)
    handle, printed = logging.Logger.callHandlers, io.StringIO()

    def handled(logger: logging.Logger, record: logging.LogRecord) -> None:
        evidence.record(record)  # after all filters, and now: what its arguments refer to may change
        handle(logger, record)

    def lost(unraised: Any) -> None:
        if unraised.exc_value is not None:
            evidence.error("lost", unraised.exc_value)

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Every logger logs everything here, whatever level it has; libraries set levels at their import.
        patch.setattr(logging.Logger, "isEnabledFor", lambda logger, level: level > logger.manager.disable)
        patch.setattr(threading, "excepthook", lost)
        patch.setattr(sys, "unraisablehook", lost)
        patch.setattr(logging.Logger, "callHandlers", handled)
        with redirect_stdout(printed), redirect_stderr(printed):
            yield evidence
            gc.collect()  # destructors of unreachable objects may log or warn
    for warning in caught:
        evidence.value(f"warning: {warning.category.__name__}", (warning.message, warning.source))
    evidence.text("output: of the process", printed.getvalue())
