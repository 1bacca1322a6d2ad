"""Which modules of a model a pass takes: patterns of `targets` and `ignore`."""

from collections.abc import Iterable
from fnmatch import fnmatchcase

from pydantic import Field

from eval.core.config import Frozen
from eval.core.errors import UserError


class Targets(Frozen):
    """Options of a pass that can be told which modules to take; patterns are those of shells."""

    targets: list[str] = Field(
        ["*"], min_length=1, description="modules to take: patterns of their names, as in `*.mlp.*`"
    )
    ignore: list[str] = Field([], description="of these, the ones to leave as they are")

    def choose(self, names: Iterable[str]) -> set[str]:
        """The modules that the pass takes.

        Raises:
            UserError: a pattern matches none, or nothing is left.
        """
        known = sorted(names)
        for key in ("targets", "ignore"):
            for pattern in getattr(self, key):
                if not any(fnmatchcase(name, pattern) for name in known):
                    fix = f"give patterns of module names, such as {', '.join(known[:2])}"
                    raise UserError(f"{key}: {pattern!r}", "matches no module", fix)
        chosen = {name for name in known if self._matches("targets", name)}
        if left := {name for name in chosen if not self._matches("ignore", name)}:
            return left
        raise UserError("ignore", "leaves no module", "give fewer patterns, or leave the pass out")

    def _matches(self, key: str, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in getattr(self, key))
