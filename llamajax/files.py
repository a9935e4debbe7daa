"""File access: a file is read only if it is regular and of limited size; a written file is complete or absent.

    data = read_bytes(path, limit=1 << 20)        # a FIFO, a device or a larger file is an error, not a hang
    with new_file(path) as partial:               # appears, complete, when the block ends without an error
        partial.write_bytes(data)
    with new_folder(path) as partial:             # the same for a folder
        (partial / "part").write_bytes(data)

Unfinished files are in a folder `.NAME.partial-…` beside the final name. The writing process holds a lock (`flock`) on
that folder for as long as it lives, so a later run recognises an abandoned one and removes it.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import stat
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from llamajax.errors import LlamaJaxError

try:
    import fcntl
except ImportError:  # Windows: abandoned folders are left where they are
    fcntl = None  # type: ignore[assignment]

# Limit for JSON and TOML files of models. The largest in use, the tokenizer.json with 256,000 pieces, has 33 MB.
LARGEST_TEXT = 64 << 20


def shortened(value: object, length: int = 100) -> str:
    """Returns the `repr` of a value for an error message, with escaped control characters and a limited length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python converts; deep nesting
        return f"a {type(value).__name__} too large to show"
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= length else f"{text[: length - 2]} …"


@contextlib.contextmanager
def open_regular(path: str | Path, limit: int | None = None) -> Iterator[BinaryIO]:
    """Opens a file for reading after checking that it is a regular file of at most `limit` bytes.

    Links are followed. The call never waits: opening a FIFO returns at once.

    Raises:
        LlamaJaxError: for anything but a regular file, or a larger one.
        OSError: if there is none, or it may not be read.
    """
    # O_NONBLOCK changes nothing for regular files. The opened file is checked, because its name may change meanwhile.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    status = os.fstat(descriptor)
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = f"{_kind(status.st_mode)}: expected a regular file"
    elif limit is not None and status.st_size > limit:
        problem = f"{status.st_size} bytes: expected at most {limit}"
    if problem:
        os.close(descriptor)
        raise LlamaJaxError(f"{path}: {problem}")
    with open(descriptor, "rb") as file:
        yield file


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}
    kinds[stat.S_ISSOCK] = "a socket"
    return next((name for matches, name in kinds.items() if matches(mode)), "no regular file")


def read_bytes(path: str | Path, limit: int = LARGEST_TEXT) -> bytes:
    """Reads all bytes of a regular file of at most `limit` bytes.

    Raises:
        LlamaJaxError, OSError: as `open_regular`; LlamaJaxError also for a file that grows while it is read.
    """
    with open_regular(path, limit) as file:
        size = os.fstat(file.fileno()).st_size  # so that `read` allocates no more than this
        data = file.read(size + 1)
    if len(data) > size:
        raise LlamaJaxError(f"{path} has grown beyond {size} bytes while it was read: try again when it is complete")
    return data


def read_text(path: str | Path, limit: int = LARGEST_TEXT) -> str:
    """Reads the text of a UTF-8 file.

    Raises:
        LlamaJaxError, OSError: as `read_bytes`; LlamaJaxError also for bytes that are not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LlamaJaxError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_json(path: str | Path, limit: int = LARGEST_TEXT) -> Any:
    """Reads the value of a JSON file.

    Raises:
        LlamaJaxError, OSError: as `read_bytes`; LlamaJaxError also for text that is not JSON or is nested too deeply.
    """
    return parse_json(read_bytes(path, limit), str(path))


def parse_json(data: bytes | str, source: str) -> Any:
    """Parses a JSON text.

    Raises:
        LlamaJaxError: for text that is not JSON or is nested too deeply; the message begins with `source`.
    """
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise LlamaJaxError(f"{source}: not JSON ({shortened(str(error))}): expected a JSON value") from None


def read_toml(path: str | Path, limit: int = 1 << 20) -> dict[str, Any]:
    """Reads the table of a TOML file.

    Raises:
        LlamaJaxError, OSError: as `read_text`; LlamaJaxError also for text that is not TOML or is nested too deeply.
    """
    text = read_text(path, limit)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise LlamaJaxError(f"{path}: not TOML ({shortened(str(error))})") from None


# ---- Writing --------------------------------------------------------------------------------------------------------


def check_absent(path: Path) -> None:
    """Refuses a target that exists, before any work is done for it. Leftovers of killed processes are removed."""
    clear_leftovers(path)
    if os.path.lexists(path):
        raise LlamaJaxError(f"{path}: exists already: remove it or choose another path")


# Errors of a disk that is full or fails, of a quota, and of a limit on file sizes. Libraries raise errors of their own
# types for them, which contain the system's message.
_DISK_ERRORS = tuple(
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EIO") if hasattr(errno, name)
)

_unfinished: set[Path] = set()


def disk_problem(error: BaseException) -> str | None:
    """Returns the system's message about a disk, if an error or one of its causes contains one; else None."""
    for seen in causes(error):
        if isinstance(seen, OSError) and seen.errno in _DISK_ERRORS:
            return os.strerror(seen.errno or 0)
        for text in map(os.strerror, _DISK_ERRORS):
            if text in str(seen):
                return text
    return None


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yields an error and its causes, at most 20, because an error can be its own cause."""
    seen: BaseException | None = error
    for _ in range(20):
        if seen is None:
            return
        yield seen
        seen = seen.__cause__ or seen.__context__


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names `path` in the error if a disk is full or fails inside the block, whichever library finds it.

    For a file inside an unfinished folder, the error names the path of that folder, which the user knows.

    Raises:
        LlamaJaxError: instead of the library's error.
    """
    try:
        yield
    except LlamaJaxError:
        raise
    except Exception as error:
        if _unfinished.intersection(path.absolute().parents):
            raise
        if problem := disk_problem(error):
            raise LlamaJaxError(f"{path}: cannot be written ({problem}): make room or choose another place") from error
        raise


def remove_unfinished() -> None:
    """Removes the unfinished files of `new_file` and `new_folder`, for a process that is about to end."""
    for path in list(_unfinished):
        _remove(path)


def _remove(folder: Path) -> None:
    """Removes a folder, with repeated attempts, because threads of an interrupted writer may still add files."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.01)


@contextlib.contextmanager
def new_folder(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Makes a new folder that becomes `path` if the block ends without an error, and is removed otherwise.

    Args:
        path: path of the final folder, which must not exist.
        beside: the path beside which the unfinished folder is made; `path` by default. Use it for a folder inside
            another folder whose content is checked.

    Raises:
        LlamaJaxError: if `path` exists or cannot be created, or the disk is full.
    """
    check_absent(path)
    with _partial(beside or path) as partial:
        inner = partial / "folder"
        inner.mkdir()
        yield inner
        os.rename(inner, path.absolute())


@contextlib.contextmanager
def new_file(path: Path, beside: Path | None = None) -> Iterator[Path]:
    """Yields the path of a temporary file, which replaces `path` if the block ends without an error, else is removed.

    Args:
        path: path of the final file, which may exist; the temporary file has the same suffix.
        beside: as in `new_folder`.

    Raises:
        LlamaJaxError: if nothing can be created beside `path`, or the disk is full.
    """
    with _partial(beside or path) as partial:
        inner = partial / f"file{path.suffix}"
        yield inner
        os.replace(inner, path.absolute())


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    """Makes a locked folder beside `path`, which is removed at the end with everything in it."""
    clear_leftovers(path)
    while True:
        partial = path.absolute().with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
        try:
            partial.mkdir(parents=True)
        except OSError as error:
            raise LlamaJaxError(f"{path}: cannot be created ({error.strerror})") from None
        descriptor = _lock(partial)
        if partial.is_dir():
            break
        if descriptor is not None:  # another process removed it as abandoned before it was locked
            os.close(descriptor)
    _unfinished.add(partial)
    try:
        with writing(path):
            yield partial
    finally:
        _remove(partial)
        _unfinished.discard(partial)
        if descriptor is not None:
            os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder against other processes that use this function, until the block or this process ends.

    Nothing is locked if there is no such folder or the system has no locks.

    Raises:
        LlamaJaxError: if another process holds the lock.
    """
    descriptor = None
    try:
        if fcntl is not None:
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)  # type: ignore[arg-type]
        raise LlamaJaxError(f"{folder}: another process is writing to it: wait until it has ended") from None
    except OSError:
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def clear_leftovers(path: Path) -> None:
    """Removes leftovers of killed processes: partial folders beside `path` that no living process has locked."""
    parent, prefix = path.absolute().parent, f".{path.name}.partial-"
    try:
        names = [name for name in os.listdir(parent) if name.startswith(prefix)]
    except OSError:  # the parent does not exist yet, or cannot be read
        return
    for leftover in (parent / name for name in names):
        descriptor = _lock(leftover)
        if descriptor is None:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                leftover.unlink()
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Returns a descriptor that holds the lock of a file or folder until it is closed; None if it cannot be locked."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
        return None
    return descriptor
