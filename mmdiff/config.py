"""From a YAML tree to an object: `build` makes of a `class_path` / `init_args` tree what LightningCLI makes of it.

LightningCLI needs a parser and a process-wide import policy; `build` needs neither, so that a program can load a
model from a stranger's folder: no module outside the trusted packages is imported, and only classes are called.
"""

import collections.abc
import dataclasses
import enum
import functools
import importlib
import inspect
import os
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

# not all of torch: torch.hub runs foreign code
TRUSTED = ("mmdiff", "video", "audio", "audiovideo", "torch.nn", "torch.optim")
CONFIG = "config.yaml"
MAX_NODES = 100_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number, as YAML 1.2 and jsonargparse do (YAML 1.1 reads a string)."""


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True  # a part used twice is written twice, not as an &id001 anchor


_EXPONENT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def read_config(path: str | Path) -> dict[str, Any]:
    """The tree in a YAML file, or in the config.yaml of a model folder. Raises ValueError naming the file."""
    path = Path(path)
    path = path / CONFIG if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"no such file: {path}; looked for a YAML file or a model folder with {CONFIG}")
    try:
        config = yaml.load(path.read_text("utf-8"), Loader=_Loader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}; expected a tree with class_path and init_args")
    nodes, stack = 0, [config]
    while stack:  # anchors make a short file a tree without end
        node, nodes = stack.pop(), nodes + 1
        stack += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
        if nodes > MAX_NODES:
            raise ValueError(f"{path} unfolds to more than {MAX_NODES} values; a config has no cycle and no data in it")
    return config


def plain(error: Exception) -> str:
    """One line of an error of jsonargparse: the reason, without the types that it tried and the page of a value."""
    text = " ".join(str(error).partition("Given value type")[0].split())
    text = re.sub(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: - ", "", text)
    return text.replace(" - Expected a <class 'NoneType'>", "")


def build(config: Mapping[str, Any] | str | Path, trusted: Sequence[str] = ()) -> Any:
    """The object that a `{"class_path": ..., "init_args": {...}}` tree describes, as LightningCLI would build it.

    config:  the tree, a YAML file or a model folder. Arguments are read by the constructor's annotations: a list where
             a tuple is due becomes one, a nested class_path becomes an object, or, where a `Callable[..., C]` is due
             and the class is a C (an optimizer), a constructor bound to its init_args.
    trusted: packages to trust besides mmdiff, video, audio, audiovideo, torch.nn and torch.optim.
    Raises ValueError on a class_path outside the trusted packages, before anything is imported, and on an unknown,
    missing or ill-typed argument, naming its place in the tree.
    """
    tree = read_config(config) if isinstance(config, (str, Path)) else config
    prefixes = (*TRUSTED, *trusted)
    for where, class_path in _class_paths(tree, ""):
        _check_trusted(class_path, prefixes, where)
    if not _is_spec(tree):
        raise ValueError("the config has no class_path; expected a tree with class_path and init_args")
    return _Builder(prefixes)(tree, "")


def dump_config(config: Mapping[str, Any]) -> str:
    """The tree as YAML that `read_config` reads back equal, tuples as lists. Raises ValueError on other objects."""
    try:
        return yaml.dump(dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        raise ValueError(f"the config holds what YAML cannot: {' '.join(map(str, error.args))}") from error


def trust_policy(extra: Sequence[str] = ()) -> None:
    """Restrict what a command line and its YAML may import to `TRUSTED`, lightning.pytorch and `extra`.

    Sets jsonargparse's process-wide import policy, so it belongs first in a command, before a parser is made.
    """
    from jsonargparse import set_parsing_settings

    for name in extra:
        _check_name(name, "trusted package")
    set_parsing_settings(
        import_path_denylist=["*"],
        import_path_allowlist=[*TRUSTED, "lightning.pytorch", *extra],
        instantiate_subclass_spec_in_any=False,  # only an annotated argument is built
    )


def _is_spec(value: object) -> bool:
    return isinstance(value, Mapping) and "class_path" in value


def _class_paths(tree: object, where: str) -> Iterator[tuple[str, object]]:
    if isinstance(tree, Mapping):
        if "class_path" in tree:
            yield where, tree["class_path"]
        for key, value in tree.items():
            yield from _class_paths(value, f"{where}.{key}".lstrip("."))
    elif isinstance(tree, (list, tuple)):
        for i, value in enumerate(tree):
            yield from _class_paths(value, f"{where}[{i}]")


def _at(where: str) -> str:
    return f" (at {where})" if where else ""


def _under(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def _check_name(name: object, what: str) -> str:
    if not isinstance(name, str) or not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"{what} {name!r} is not a dotted Python name such as package.module.Class")
    return name


def _check_trusted(class_path: object, prefixes: Sequence[str], where: str) -> None:
    name = _check_name(class_path, "class_path")
    if not _under(name, prefixes):
        raise ValueError(
            f"class_path {name!r}{_at(where)} is outside the trusted packages ({', '.join(prefixes)}); "
            f"if you trust its code, pass trusted=[{name.rpartition('.')[0] or name!r}]"
        )


@dataclasses.dataclass(frozen=True)
class _Builder:
    prefixes: tuple[str, ...]

    def __call__(self, spec: Mapping[str, Any], where: str) -> Any:
        cls, given, inside = self.prepare(spec, where)
        return _construct(cls, self.arguments(cls, given, inside), where)

    def prepare(self, spec: Mapping[str, Any], where: str) -> tuple[type, Mapping[str, Any], str]:
        """The class of a spec, its raw arguments and their place in the tree."""
        if unknown := set(spec) - {"class_path", "init_args"}:
            raise ValueError(f"unknown key {sorted(map(str, unknown))[0]!r}{_at(where)} beside class_path, init_args")
        cls = self.resolve(spec["class_path"], where)
        given = spec.get("init_args")
        if not isinstance(given, Mapping | None):
            raise ValueError(f"init_args={given!r}{_at(where)} is not a mapping of argument names to values")
        return cls, given or {}, f"{where}.init_args".lstrip(".")

    def resolve(self, class_path: str, where: str) -> type:
        _check_trusted(class_path, self.prefixes, where)
        module_name, _, name = class_path.rpartition(".")
        try:
            cls = getattr(importlib.import_module(module_name), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"class_path {class_path!r}{_at(where)} cannot be imported: {error}") from error
        if not inspect.isclass(cls):
            raise ValueError(f"class_path {class_path!r}{_at(where)} is a {type(cls).__name__}, not a class")
        # A trusted module may import Popen: what counts is where a class is defined, not where it can be reached.
        _check_trusted(f"{cls.__module__}.{cls.__qualname__}".replace("<locals>.", ""), self.prefixes, where)
        if _under(cls.__module__, TRUSTED) and not _is_part(cls):
            raise ValueError(
                f"class_path {class_path!r}{_at(where)} is no nn.Module, optimizer, dataclass or contract of ours"
            )
        return cls

    def arguments(self, cls: type, given: Mapping[str, Any], where: str, complete: bool = True) -> dict[str, Any]:
        """The arguments, converted; with `complete`, raises ValueError where one without a default is not given."""
        parameters = dict(inspect.signature(cls).parameters)
        var = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        names = [name for name, p in parameters.items() if p.kind not in var]
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        for name in given:
            if name not in names and not open_ended:
                raise ValueError(
                    f"{cls.__name__} has no argument {name!r}{_at(where)}; its arguments: {', '.join(names) or 'none'}"
                )
        for name in names:
            if complete and name not in given and parameters[name].default is inspect.Parameter.empty:
                raise ValueError(f"{cls.__name__} needs the argument {name!r}{_at(where)}")
        hints = _hints(cls)
        unset = {name for name in given if given[name] is None and name in names and parameters[name].default is None}
        return {  # `part: Part = None` accepts null, whatever its annotation says
            name: None if name in unset else self.convert(value, hints.get(name, Any), f"{where}.{name}")
            for name, value in given.items()
        }

    def convert(self, value: Any, hint: Any, where: str) -> Any:
        """`value`, as YAML gives it, as the annotation `hint` wants it. Raises ValueError when it does not fit."""
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if hint in (Any, object) or isinstance(hint, (str, typing.TypeVar)):
            return value
        if origin is typing.Annotated:
            return self.convert(value, args[0], where)
        if origin in (typing.Union, types.UnionType):
            return self.convert_union(value, args, where)
        if origin is typing.Literal:
            if not any(value == arg and type(value) is type(arg) for arg in args):
                raise ValueError(f"{where}={value!r} is not one of {', '.join(map(repr, args))}")
            return value
        if hint is None or hint is type(None):
            return self.expect(value, value is None, "null", where)
        if origin is collections.abc.Callable or hint is collections.abc.Callable:
            return self.convert_callable(value, args, where)
        kind = origin or hint
        if not inspect.isclass(kind):
            return value
        if kind in (tuple, list, set, frozenset, Sequence, collections.abc.Iterable):
            return self.convert_items(value, kind, args, where)
        if issubclass(kind, Mapping):
            self.expect(value, isinstance(value, Mapping), "a mapping", where)
            inner = args[1] if len(args) == 2 else Any
            return {key: self.convert(item, inner, f"{where}.{key}") for key, item in value.items()}
        return self.convert_scalar(value, kind, where)

    def convert_scalar(self, value: Any, kind: type, where: str) -> Any:
        if kind is float:
            if isinstance(value, str) and _EXPONENT.match(value):
                return float(value)  # a tree read by another YAML 1.1 loader
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            return float(self.expect(value, number, "a number", where))
        if kind in (int, bool, str):
            return self.expect(value, type(value) is kind, f"of type {kind.__name__}", where)
        if issubclass(kind, enum.Enum) and isinstance(value, str):
            self.expect(value, value in kind.__members__, f"one of {', '.join(kind.__members__)}", where)
            return kind[value]
        if issubclass(kind, os.PathLike) and isinstance(value, str):
            return Path(value)
        if isinstance(value, kind):
            return value  # already an object: build() also takes trees made in Python
        if isinstance(value, str) and "." in value:
            value = {"class_path": value}  # LightningCLI's short form for a class without arguments
        if _is_spec(value):
            built = self(value, where)
            return self.expect(built, isinstance(built, kind), f"a {kind.__name__}", where)
        if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            return _construct(kind, self.arguments(kind, value, where), where)
        return self.expect(value, False, f"a {kind.__name__}, by class_path and init_args", where)

    def convert_items(self, value: Any, kind: type, args: tuple[Any, ...], where: str) -> Any:
        self.expect(value, isinstance(value, (list, tuple)), "a list", where)
        if kind is tuple and args and args[-1] is not Ellipsis:
            self.expect(value, len(value) == len(args), f"a list of {len(args)}", where)
            inner = list(args)
        else:
            inner = [args[0] if args else Any] * len(value)
        items = [
            self.convert(item, hint, f"{where}[{i}]") for i, (item, hint) in enumerate(zip(value, inner, strict=True))
        ]
        return kind(items) if kind in (tuple, set, frozenset) else items

    def convert_union(self, value: Any, hints: tuple[Any, ...], where: str) -> Any:
        errors = []
        for hint in hints:
            try:
                return self.convert(value, hint, where)
            except ValueError as error:
                errors.append(str(error))
        # For a nested object the useful message is the deepest one, not "is not null".
        raise ValueError(max(errors, key=len) if _is_spec(value) else "; ".join(dict.fromkeys(errors)))

    def convert_callable(self, value: Any, args: tuple[Any, ...], where: str) -> Callable[..., Any]:
        if callable(value):
            return value
        if isinstance(value, str):
            value = {"class_path": value}
        self.expect(value, _is_spec(value), "a class_path", where)
        cls, given, inside = self.prepare(value, where)
        returned = args[1] if len(args) == 2 else Any
        members = typing.get_args(returned) or (returned,)
        if any(inspect.isclass(member) and issubclass(cls, member) for member in members):
            # The caller gives what comes first: the parameters of an optimizer, the optimizer of a schedule.
            return functools.partial(cls, **self.arguments(cls, given, inside, complete=False))
        built = _construct(cls, self.arguments(cls, given, inside), where)
        return self.expect(built, callable(built), "callable", where)

    @staticmethod
    def expect(value: Any, ok: bool, what: str, where: str) -> Any:
        if not ok:
            raise ValueError(f"{where}={value!r} is not {what}")
        return value


def _is_part(cls: type) -> bool:
    """Whether a class of ours or of torch is one that a config composes, not one that merely lies in the package."""
    if issubclass(cls, (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)):
        return True
    contracts = (base for base in cls.__mro__ if inspect.isabstract(base) and not _under(base.__module__, ["torch"]))
    ours = dataclasses.is_dataclass(cls) or any(_under(base.__module__, TRUSTED) for base in contracts)
    return ours and not cls.__name__.startswith("_")


def _construct(cls: type, kwargs: dict[str, Any], where: str) -> Any:
    try:
        return cls(**kwargs)
    except ValueError as error:
        raise ValueError(f"{cls.__name__}{_at(where)}: {error}") from error
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(f"{cls.__name__}{_at(where)}: {type(error).__name__}: {error}") from error


def _hints(cls: type) -> dict[str, Any]:
    """Annotations of the constructor, each resolved alone: one that only a type checker can import is left out."""
    init = inspect.unwrap(getattr(cls, "__init__"))  # noqa: B009 (mypy objects to cls.__init__)
    hints: dict[str, Any] = {}
    for name, annotation in getattr(init, "__annotations__", {}).items():
        holder = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            hints |= typing.get_type_hints(holder, globalns=init.__globals__)
        except (NameError, TypeError, AttributeError):
            continue
    return hints
