"""``quantpatch new-plugin NAME``: a distribution that installs and passes its tests as it is.

The files lie beside this one as ``*.template``, with ``$name`` and so on where the name goes.
"""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from quantpatch.errors import ArgumentError, FileError
from quantpatch.plugins.hookspecs import API_VERSION
from quantpatch.plugins.registry import registry
from quantpatch.torch_tools.atomic_files import folder_written_whole, own_version

__all__ = ["new_plugin"]

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_PREFIX = "quantpatch-"
_SUFFIX = ".template"
_TEMPLATE = Path(__file__).parent / "template"


def new_plugin(name: str, folder: Path = Path()) -> Path:
    """Writes a complete distribution for a plugin: a layer, its tests, a README and what installs it.

    Args:
        name: The plugin's name, such as ``"mylib"``; the distribution is called ``quantpatch-mylib``.
        folder: Where to put the distribution's folder.

    Returns:
        The distribution's folder. It is written whole or not at all.

    Raises:
        ArgumentError: A plugin cannot have the name, or one has it already.
        FileError: The folder exists, or cannot be written.
    """
    _check(name)
    distribution = f"{_PREFIX}{name}"
    package = distribution.replace("-", "_")
    version = own_version()
    values = {
        "name": name,
        "distribution": distribution,
        "package": package,
        "api": str(API_VERSION),
        "bound": "" if version == "unknown" else f">={version}",
    }
    path = folder / distribution
    try:
        with folder_written_whole(path) as draft:
            _write(_TEMPLATE, draft, values)
    except FileExistsError:
        raise FileError(
            f"{path} exists already, and nothing in it was touched. Choose another name, or another folder "
            f"with --folder",
            path=str(path),
        ) from None
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error}", path=str(path)) from error
    return path


def _check(name: str) -> None:
    if not _NAME.fullmatch(name) or name.startswith(_PREFIX):
        plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).removeprefix(_PREFIX).strip("-0123456789")
        raise ArgumentError(
            f"{name!r} is not a name for a plugin: expected small letters, digits and single hyphens, "
            f"starting with a letter, without '{_PREFIX}'. Write: quantpatch new-plugin {plain or 'mylib'}",
            name=name,
        )
    for info in registry.plugins():
        if info.name == name:
            whose = f" (from {info.distribution} {info.version})" if info.distribution else ""
            raise ArgumentError(
                f"a plugin named {name!r} is installed already{whose}, and two cannot have one name. Write, "
                f"for instance: quantpatch new-plugin my-{name}",
                name=name,
            )


def _write(source: Path, target: Path, values: dict[str, str]) -> None:
    for item in source.iterdir():
        name = values["package"] if item.name == "package" else item.name.removesuffix(_SUFFIX)
        if item.is_dir():
            (target / name).mkdir()
            _write(item, target / name, values)
        elif item.name.endswith(_SUFFIX):
            (target / name).write_text(Template(item.read_text()).substitute(values))
