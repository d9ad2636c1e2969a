"""Which blocks of a model `moefy` replaces."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from fastmoe.convert.patterns import FeedForward, recognise
from fastmoe.layer import MoE

Target = str | type[nn.Module] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Match:
    """A block to replace. `inside` is None when only the block as a whole is known; `done`: it is a MoE already."""

    name: str
    block: nn.Module
    inside: FeedForward | None = None
    done: bool = False


@dataclass(frozen=True)
class LookAlike:
    """A block that looks like a known one and is none."""

    name: str
    block: nn.Module
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.block).__name__}): {self.reason}"


class Search:
    """One walk over `model`: `matches`, each block once, outermost first, in the model's order; and `look_alikes`.

    MoE layers that are there already are matches too, so that every n-th block stays the same one in a second call.
    """

    def __init__(self, model: nn.Module, target: Target) -> None:
        self.model, self.target = model, check_target(target)
        self.look_alikes: list[LookAlike] = []
        self._seen: set[int] = set()
        self._uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        self.matches = list(self._walk("", model))

    def _walk(self, name: str, module: nn.Module) -> Iterator[Match]:
        if id(module) in self._seen:
            return
        match = self._match(name, module)
        if match is not None or self.target == "auto":
            self._seen.add(id(module))
        if match is not None:
            yield match
        if match is not None or isinstance(module, MoE):
            return
        for key, child in module._modules.items():
            if child is not None:
                yield from self._walk(f"{name}.{key}" if name else key, child)

    def _match(self, name: str, module: nn.Module) -> Match | None:
        if isinstance(module, MoE):
            counts = not isinstance(self.target, str) or names(self.target, name, module)
            return Match(name, module, done=True) if counts else None
        holds_moe = any(isinstance(m, MoE) for m in module.modules())
        if not names(self.target, name, module) or (holds_moe and self.target == "auto"):
            return None
        if holds_moe:
            return Match(name, module, done=True)
        inside = self._judge(name, module)
        return Match(name, module, inside) if inside is not None or self.target != "auto" else None

    def _judge(self, name: str, module: nn.Module) -> FeedForward | None:
        inside = recognise(module)
        if isinstance(inside, FeedForward) and any(self._uses[id(p)] > 1 for p in module.parameters()):
            inside = "it shares a parameter with another module"
        if isinstance(inside, FeedForward) and self.target == "auto" and "experts" in name.split("."):
            inside = "it is an expert of another MoE"
        if isinstance(inside, str):
            self.look_alikes.append(LookAlike(name, module, inside))
            return None
        return inside


def names(target: Target, name: str, module: nn.Module) -> bool:
    """Whether `target` may mean this module, which has this name in its model."""
    if target == "auto":
        return True
    if isinstance(target, str):
        return bool(name) and fnmatchcase(name, target)
    if isinstance(target, type):
        return isinstance(module, target)
    return bool(target(name, module))


def check_target(target: Target) -> Target:
    """Raises:
    ValueError: it is none of the forms that a target may have.
    """
    if isinstance(target, type) and not issubclass(target, nn.Module):
        raise ValueError(f"target must be a class of nn.Module, got {target.__name__}")
    if not isinstance(target, str) and (isinstance(target, nn.Module) or not callable(target)):
        raise ValueError(
            "target must be 'auto', a glob over module names, a module class or a predicate (name, module) -> bool, "
            f"got {target!r}"
        )
    return target


def nothing_matched(search: Search) -> ValueError:
    """What the model has, and how to name a target in it."""
    seen = Counter(type(m).__name__ for m in search.model.modules())
    what = "no known feed-forward block" if search.target == "auto" else f"nothing that target={search.target!r} names"
    lines = [
        f"found {what} in {type(search.model).__name__}. Modules: " + ", ".join(f"{n} {c}" for c, n in seen.items())
    ]
    lines += [f"Looks like one, left out: {block}" for block in search.look_alikes]
    lines.append(
        "Name a target: a class (target=MyFeedForward), a glob over names as in model.named_modules() "
        "(target='layers.*.mlp') or a predicate (target=lambda name, module: ...)"
    )
    return ValueError("\n".join(lines))
