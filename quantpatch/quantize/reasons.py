"""Why a block leaves something float: a type for each reason, with what it is about. All are printed here."""

from __future__ import annotations

import attrs

from quantpatch.errors import EntryConflictError
from quantpatch.layers.subclass import Obstacle
from quantpatch.plugins.entry import Entry

#: What ``skip`` and ``include`` take: a class, its name, its dotted name, or a glob.
Pattern = str | type


@attrs.frozen
class Reason:
    """Why something was left as it is; its ``str`` is what reports print."""


@attrs.frozen
class KeptFloat(Reason):
    """The block is ``keep_float()``."""

    def __str__(self) -> str:
        return "keep_float()"


@attrs.frozen
class SkippedBy(Reason):
    """A ``skip``, here or in a block around, leaves it float.

    Attributes:
        pattern: What was written there.
        lazily: Whether it means the class that this one becomes once it sees its first input.
    """

    pattern: Pattern
    lazily: bool = False

    def __str__(self) -> str:
        return f"skip={self.pattern!r}{', which it becomes' if self.lazily else ''}"


@attrs.frozen
class NotByDefault(Reason):
    """Its entry waits to be asked for.

    Attributes:
        names: The target's name; those of several that are shown as one.
    """

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"not replaced by default; write include={list(self.names)!r}"


@attrs.frozen
class NameTaken(Reason):
    """It has taken the name of a target, which is another class.

    Attributes:
        entry: The entry for the target.
        target: Dotted name of the target, where its package has defined it.
    """

    entry: Entry
    target: str

    def __str__(self) -> str:
        return f"it has taken the name {self.entry.dotted}, but {self.entry.source} replaces {self.target}"


@attrs.frozen
class Conflict(Reason):
    """Several plugins replace it, so that no block opens before one is chosen.

    Attributes:
        entries: Theirs, by the name of the plugin.
    """

    entries: tuple[Entry, ...]

    @property
    def plugins(self) -> tuple[str, ...]:
        """Names of the plugins."""
        return tuple(str(entry.plugin) for entry in self.entries)

    @property
    def ways(self) -> tuple[str, ...]:
        """What to write to choose one."""
        return (
            f"skip=[{self.entries[0].dotted!r}] leaves it float",
            "custom=[(module, name, replacement)] decides for it",
            f"QUANTPATCH_BLOCK={self.plugins[-1]} switches one plugin off",
        )

    @property
    def rivals(self) -> str:
        """Who they are, as a sentence."""
        return f"{' and '.join(map(repr, self.plugins))} both replace it"

    def __str__(self) -> str:
        return f"{self.rivals}, and no block opens before one is chosen"

    def error(self) -> EntryConflictError:
        """What a block that is opened raises."""
        target = self.entries[0].dotted
        each = "; ".join(f"{entry.plugin!r} by {entry.replacement}" for entry in self.entries)
        return EntryConflictError(
            f"{len(self.entries)} plugins replace {target}: {each}. Choose one: {', '.join(self.ways)}",
            target=target,
            plugins=self.plugins,
            entries=self.entries,
        )


@attrs.frozen
class FloatBase(Reason):
    """It is a subclass of a target that stays float itself.

    Attributes:
        base: Dotted name of the target.
        why: Why that stays float.
    """

    base: str
    why: Reason

    def __str__(self) -> str:
        return f"a subclass of {self.base}, which stays float: {self.why}"


@attrs.frozen
class SubclassOf(Reason):
    """It is a subclass of a target, without an entry of its own.

    Attributes:
        base: Dotted name of the target.
        obstacle: Why it cannot be quantized as that is; None if ``subclasses=True`` is all that is missing.
    """

    base: str
    obstacle: Obstacle | None

    def __str__(self) -> str:
        if self.obstacle is None:
            return f"a subclass of {self.base}, for which there is no entry; write subclasses=True"
        return f"a subclass of {self.base} {self.obstacle}, for which there is no entry"


@attrs.frozen
class BuiltDirectly(Reason):
    """No hook has seen it being built, and its replacement cannot take it over.

    Attributes:
        obstacle: Why not.
    """

    obstacle: Obstacle

    def __str__(self) -> str:
        return f"built by an __init__ saved or wrapped by other code; it is a class {self.obstacle}"


@attrs.frozen
class NoEntry(Reason):
    """Nothing replaces it.

    Attributes:
        is_layer: Whether it is a class of layers at all.
    """

    is_layer: bool

    def __str__(self) -> str:
        return f"there is no entry for it{'' if self.is_layer else ', and it is not a class of layers'}"


@attrs.frozen
class IsQuantized(Reason):
    """It is what replaces a target, or made from that.

    Attributes:
        target: Dotted name of the target.
    """

    target: str

    def __str__(self) -> str:
        return f"it is quantized itself: it replaces {self.target}"


@attrs.frozen
class IsPart(Reason):
    """It is a part of a target, which multiplies with its weights itself and never calls it.

    Attributes:
        whole: Dotted name of the target.
    """

    whole: str

    def __str__(self) -> str:
        return f"it is a part of another layer, {self.whole}, which multiplies with its weights itself"


@attrs.frozen
class HiddenOperations(Reason):
    """Its forward may multiply where it cannot be followed.

    Attributes:
        places: Where, each with what is in the way.
    """

    places: tuple[str, ...]

    def __str__(self) -> str:
        return f"may multiply where it cannot be followed: {'; '.join(self.places)}"
