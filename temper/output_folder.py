"""Folders that are written whole: exports, edited models, fetched models, data files, checkpoints.

One rule for all of them: the target is new or empty, or every file in it was written by Temper and
is unchanged, or the target is refused. A folder's marker (`MARKER`) lists its files. Nothing else
is ever deleted, and no symbolic link at or below the target is followed; links in the path above
it, such as a ``runs`` folder on another disk, are resolved.
"""

import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from temper.errors import TemperError

MARKER = ".temper.json"  # sizes and SHA-256 of the folder's other files
HARMLESS = frozenset({MARKER, ".snakemake_timestamp"})  # files that are not in a marker
MAX_PREFIX = 40  # characters of the target's name in a temporary one

# -- where a folder may be written


def check_target(folder: Path, flag: str, writer: str) -> Path:
    """Check that a folder may be written, without changing anything.

    Args:
        folder: New, empty, or a folder with a marker and no other files than those that it lists.
        flag: Option that gave the folder, for the error.
        writer: What will write it, such as ``temper edit``; it replaces nothing of another writer.

    Returns:
        The folder's absolute path, with the links above it resolved.

    Raises:
        TemperError: it is a link, a file, a folder with a file that Temper did not write, or a
            place where no folder can be put.
    """
    target = resolve_target(folder, flag)
    try:
        problem = find_foreign(target, writer)
    except OSError as error:
        problem = f"cannot be read ({error})"
    if problem:
        raise _refusal(folder, flag, problem)
    return target


def resolve_target(folder: Path, flag: str) -> Path:
    """Absolute path of a folder to write, with the links above it resolved and its own name kept.

    Raises:
        TemperError: it is a link or a file, or a place where no folder can be put.
    """
    try:
        problem, target = _resolve(folder)
    except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, a NUL
        raise TemperError(f"{flag}={_shown(folder)}: no path for a folder ({error})") from None
    if problem:
        raise TemperError(f"{flag}={_shown(folder)}: {problem}")
    return target


def _resolve(folder: Path) -> tuple[str, Path]:
    """What keeps a path from being written to, or an empty text; and the resolved path."""
    if folder.name in ("", ".."):
        return "names no folder of its own; give the name of a new one, such as export", folder
    target = folder.parent.resolve() / folder.name
    with suppress(FileNotFoundError, NotADirectoryError):
        target.lstat()  # raises what the questions below would answer with no
    if target.is_symlink():
        return "a symbolic link, which is not followed; give the folder itself", target
    if target.exists() and not target.is_dir():
        return "a file; give the name of a folder", target
    if target == Path.cwd() or os.path.ismount(target):
        return "in use as it is (the current folder, or a disk); give a folder inside it", target
    parent = next(place for place in target.parents if place.exists())
    if not parent.is_dir():
        return f"{parent} is a file; give another place", target
    if not os.access(parent, os.W_OK | os.X_OK):
        return f"no permission to write in {parent}; give another place", target
    return "", target


def _refusal(folder: Path, flag: str, problem: str) -> TemperError:
    return TemperError(
        f"{flag}={_shown(folder)}: {problem}, so it is not replaced; give another folder, or move"
        " or delete this one"
    )


def _shown(name: str | Path) -> str:
    """A name for a message of one line."""
    text = str(name)
    return text if text.isprintable() else repr(text)


# -- whose files are in a folder


def find_foreign(folder: Path, writer: str) -> str:
    """In what a folder is more than a writer's own output; empty if in nothing.

    Args:
        folder: A path without links above it; it need not exist.
        writer: See `check_target`.
    """
    every = list_files(folder) if folder.is_dir() else ()
    names = [name for name in every if not (name in HARMLESS and is_regular(folder / name))]
    if not names:
        return ""
    written_by, recorded = _read_marker(folder)
    if recorded is None:
        lacks = f"no {MARKER} lists it as Temper's (earlier versions wrote none)"
        return f"holds {_shown(names[0])}, and {lacks}"
    if written_by != writer:
        return f"was written by {_shown(str(written_by))}, not by {writer}"
    for name in names:
        if name not in recorded:
            return f"holds {_shown(name)}, which Temper did not write"
        if not is_regular(folder / name) or _describe(folder / name, recorded[name]) is None:
            return f"holds {_shown(name)}, which was changed after Temper wrote it"
    return ""


def list_files(folder: Path, above: str = "") -> Iterator[str]:
    """Names relative to a folder of all files below it, and of links and empty folders."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = above + entry.name
        if entry.is_dir(follow_symlinks=False):
            inside = list(list_files(folder / entry.name, f"{name}/"))
            yield from inside or [f"{name}/"]
        else:
            yield name


def is_regular(path: Path) -> bool:
    """Whether a path is a file itself, and no link to one."""
    return stat.S_ISREG(path.lstat().st_mode)


def _describe(path: Path, expected: Any = None) -> dict[str, Any] | None:
    """Size and SHA-256 of a file; None if they are not those expected."""
    size = path.stat().st_size
    if expected is not None and expected.get("size") != size:
        return None  # without reading gigabytes
    with path.open("rb") as file:
        found = {"size": size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    return found if expected in (None, found) else None


def _read_marker(folder: Path) -> tuple[Any, dict[str, dict[str, Any]] | None]:
    """Writer of a folder, and the files that its marker lists; None without a readable marker."""
    path = folder / MARKER
    try:
        if not is_regular(path):
            return None, None
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content["files"]
        writer = content["written_by"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None, None
    if isinstance(files, dict) and all(isinstance(entry, dict) for entry in files.values()):
        return writer, files
    return None, None


def _finish(folder: Path, writer: str) -> None:
    """Make a folder readable for everyone, and write its marker."""
    folder.chmod(0o755)
    files = {}
    for name in list_files(folder):
        if is_regular(folder / name):
            (folder / name).chmod(0o644)  # safetensors makes files that only their owner can read
            files[name] = _describe(folder / name)
    text = json.dumps({"written_by": writer, "files": files}, indent=2)
    (folder / MARKER).write_text(f"{text}\n", encoding="utf-8")


# -- writing


@contextmanager
def staging_folder(folder: Path, flag: str, writer: str) -> Iterator[Path]:
    """Give an empty folder to write to, which becomes ``folder`` when the ``with`` block ends.

    If the block raises, the new folder is deleted and ``folder`` does not change. The new folder
    gets a marker, by which the next writer knows it.

    Args:
        folder: See `check_target`, which is called before the block and after it.
        flag: Option that gave the folder, for errors.
        writer: What writes it; stands in the marker.

    Raises:
        TemperError: the folder may not be replaced. If it became so during the block, the new
            folder is kept beside it, and the error says where.
    """
    target = check_target(folder, flag, writer)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name[:MAX_PREFIX]}-", dir=target.parent))
    try:
        yield staging
        _finish(staging, writer)
        try:
            replace_folder(target, staging, flag, partial(find_foreign, writer=writer))
        except (TemperError, OSError) as error:
            kept = _keep_beside(target, staging)
            raise TemperError(f"{error}; what was to be written is in {kept}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _keep_beside(target: Path, staging: Path) -> Path:
    """Give a complete folder the first free name after that of its target."""
    number = 1
    while os.path.lexists(kept := target.with_name(f"{target.name}-{number}")):
        number += 1
    os.rename(staging, kept)
    return kept


def replace_folder(folder: Path, staging: Path, flag: str, foreign: Callable[[Path], str]) -> None:
    """Give a complete folder its name; a folder of that name is moved away and then deleted.

    Args:
        folder: From `resolve_target`. With two renames, it is never there in half.
        staging: The complete folder, on the same file system.
        flag: Option that gave the folder, for errors.
        foreign: In what a folder is more than our own output; empty if in nothing.

    Raises:
        TemperError: ``folder`` holds more than our own output; nothing was changed.
        OSError: a rename failed; ``folder`` is as it was.
    """
    resolve_target(folder, flag)
    if problem := foreign(folder):
        raise _refusal(folder, flag, problem)
    names = list(list_files(folder)) if folder.is_dir() else []
    if not names:
        os.rename(staging, folder)  # in place of an empty folder, if there is one
        return
    old = folder.with_name(f".{folder.name[:MAX_PREFIX]}-{secrets.token_hex(4)}-old")
    os.rename(folder, old)
    try:
        os.rename(staging, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    delete_files(old, names)


def delete_files(folder: Path, names: list[str]) -> None:
    """Delete files below a folder, and the folders that this leaves empty.

    A file that was put there since the names were listed stays, and a warning says where.
    """
    folders = {folder}
    for name in names:
        path = folder / name
        folders |= {folder / above for above in Path(name).parents}
        if not name.endswith("/"):
            path.unlink(missing_ok=True)
    for place in sorted(folders, key=lambda place: len(place.parts), reverse=True):
        with suppress(OSError):  # not empty
            place.rmdir()
    if folder.exists():
        warnings.warn(
            f"{folder} is kept: files were put there while it was being replaced", stacklevel=2
        )
