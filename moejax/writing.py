"""Write files that are complete or absent, and keep a second writer away.

Every file that moejax writes for a user appears under its name by a rename, so neither a kill nor a full disk leaves
half of it there or destroys what was there before. Whoever writes into a folder holds its lock meanwhile
(:func:`locked`). The system frees a lock when its process ends, however it ends.
"""

import contextlib
import errno
import os
import secrets
import socket
import stat
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moejax.errors import BusyError, MoejaxError

TEMPORARY = ".moejax-"
"""The beginning of the names of files that are being written."""

LOCK = ".lock"
"""The end of the name of a lock file."""

_MARK = "moejax lock: "
"""The beginning of what a lock file holds."""

_MOST_SUFFIX = 16
"""Most characters of a suffix that a temporary file keeps."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What the system says where a file system has no locks."""


def write_file(path: Path, data: bytes | str) -> None:
    """Write a file, text as UTF-8; see :func:`replacing`.

    Raises:
        OSError: it cannot be written; what was there before is there still.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file with the suffix of ``path``; it takes the place of ``path`` if the block succeeds.

    Otherwise it is removed, and ``path`` stays as it is. Where ``path`` is a link, the file that it leads to is
    replaced. What is no regular file, such as ``/dev/stdout``, is written to itself.

    Raises:
        OSError: it cannot be written; the error names ``path``.
    """
    with naming(path):
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            yield target
            return
        suffix = path.suffix if len(path.suffix) <= _MOST_SUFFIX else ""
        temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(4)}{suffix}")
        try:
            yield temporary
            _to_disk(temporary)
            with contextlib.suppress(OSError):  # as before: a file that others may not read stays so
                os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _to_disk(path: Path) -> None:
    """Wait until a file's content is on disk, so that the rename cannot come there before it."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give an ``OSError`` of the block the name ``path`` in place of a temporary file's, or of none."""
    try:
        yield
    except OSError as error:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        if error.errno is None or (names and not any(TEMPORARY in name for name in names)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers left in a folder. The caller holds the folder's lock, so nobody writes there."""
    for left in folder.glob(f"{TEMPORARY}*"):
        if left.is_file() and not left.is_symlink():
            left.unlink()


def lock_beside(folder: Path) -> Path:
    """Return the lock file for a folder that is not there yet, or that is replaced as a whole."""
    return folder.with_name(f".{folder.name}{LOCK}")


@contextlib.contextmanager
def locked(file: Path, what: Path) -> Iterator[None]:
    """Hold a lock while the block runs. A second process, or a second thread of this one, is refused at once.

    The lock is the system's (``flock``), so it ends with its process. Over NFS it holds among all machines if the
    server keeps locks. Where there are no locks, a warning says so.

    Args:
        file: the lock file; it is made, and removed in the end.
        what: the folder that it stands for, as messages name it.

    Raises:
        BusyError: another run holds the lock.
        MoejaxError: there is a file of that name which is no lock file of ours.
        OSError: the lock file cannot be made.
    """
    descriptor = _acquire(file, what)
    try:
        yield
    finally:
        # removed while it is held: whoever opened it before finds that the name is gone, and tries again
        with contextlib.suppress(OSError):
            os.unlink(file)
        os.close(descriptor)


def _acquire(file: Path, what: Path) -> int:
    """Return the descriptor of a lock file that is held and that has its name."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        try:
            descriptor = os.open(file, flags, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise MoejaxError(f"{file}: not a lock file of moejax; remove it.") from None
            raise
        try:
            holder = _holder(descriptor, file)
            if not _lock(descriptor, what):
                raise BusyError(f"{what}: another run{holder} is writing it; wait for it, or choose another folder.")
            if _is_at(descriptor, file):
                with contextlib.suppress(OSError):  # a full disk: the text is for people alone
                    os.ftruncate(descriptor, 0)
                    os.lseek(descriptor, 0, os.SEEK_SET)
                    os.write(descriptor, f"{_MARK}process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(descriptor: int, file: Path) -> str:
    """Return who holds a lock file, as a message says it; empty if it does not say.

    Raises:
        MoejaxError: the file is not ours.
    """
    regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    text = os.read(descriptor, 200).decode("utf-8", "replace") if regular else ""
    if not regular or not (text.startswith(_MARK) or _MARK.startswith(text)):
        raise MoejaxError(f"{file}: not a lock file of moejax; remove it.")
    who = text.removeprefix(_MARK).strip() if text.startswith(_MARK) else ""
    return f" ({who})" if who and who.isprintable() else ""


def _lock(descriptor: int, what: Path) -> bool:
    """Take the lock of an open file; return whether it was free."""
    flock = _flock()
    if flock is None:
        _warn(what, "this system has none that moejax knows")
        return True
    try:
        flock(descriptor)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _warn(what, f"its file system has none: {error.strerror}")
    return True


def _flock() -> Callable[[int], None] | None:
    """Return the function that takes a lock without waiting; ``None`` where the system has none."""
    try:
        import fcntl
    except ImportError:
        return None
    module: Any = fcntl
    return lambda descriptor: module.flock(descriptor, module.LOCK_EX | module.LOCK_NB)


def _warn(what: Path, why: str) -> None:
    warnings.warn(
        f"{what} is written without a lock ({why}); have no other run write it meanwhile.", RuntimeWarning, stacklevel=6
    )


def _is_at(descriptor: int, file: Path) -> bool:
    """Return whether an open file is the one that has the name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file, follow_symlinks=False))
    except FileNotFoundError:
        return False
