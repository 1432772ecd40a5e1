"""How a hook is checked, armed and applied, on modules made for the purpose; without vLLM."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from layerskip_vllm.hooks import install as hooks
from layerskip_vllm.hooks import vllm_source
from layerskip_vllm.hooks.install import Hook, HookError, Use, check_version, hook_state

SOURCE = """
def greet(name):
    return f"hello {name}"


def part():
    return "goodbye"


class Greeter:
    def greet(self):
        return "hello"

    @staticmethod
    def shout():
        return "HELLO"

    @classmethod
    def name(cls):
        return cls.__name__
"""

Write = Callable[..., str]
_numbers = itertools.count()


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Write a module that can be imported, under a name of its own; returns the name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(hooks, "_states", {})
    names = []

    def write(source: str = SOURCE, name: str | None = None) -> str:
        name = name or f"hooked_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        vllm_source.definitions.cache_clear()
        names.append(name)
        return name

    yield write
    for name in names:
        sys.modules.pop(name, None)
    vllm_source.definitions.cache_clear()


DIGESTS: dict[str, dict[str, str] | None] = {}
TEXTS = {"why": "for a test", "process": "this one", "how": "as it says", "remove_when": "never"}


def make_hook(
    target: str, replace: Callable[[Any], Any] | None = None, is_new: bool = False
) -> Hook:
    """A hook on the source as it is now; the replacement says `hooked` and then the original."""
    says_hooked = replace or (lambda original: lambda *args: f"hooked {original(*args)}")
    hook = Hook(target=target, replace=says_hooked, is_new=is_new, **TEXTS)
    DIGESTS[target] = {name: vllm_source.source_digest(name) or "0" for name in hook.names}
    return hook


def check(entry: hooks.Entry) -> list[str]:
    return hooks.check(entry, DIGESTS)


def install(entries: list[Hook | Use]) -> None:
    hooks.install(entries, DIGESTS)


def load(name: str) -> ModuleType:
    return importlib.import_module(name)


def test_hook_changes_nothing_when_its_module_is_not_imported_yet(write: Write) -> None:
    name = write()
    hook = make_hook(f"{name}:greet")
    assert hook_state(hook) == "not installed"
    install([hook])
    assert hook_state(hook) == "armed"
    assert name not in sys.modules
    assert load(name).greet("you") == "hooked hello you"
    assert hook_state(hook) == "applied"


def test_hook_is_applied_at_once_when_its_module_is_imported_already(write: Write) -> None:
    name = write()
    module = load(name)
    install([make_hook(f"{name}:greet")])
    assert module.greet("you") == "hooked hello you"


@pytest.mark.parametrize(
    ("target", "replace"),
    [
        ("Greeter.greet", lambda original: lambda self: f"hooked {original(self)}"),
        (
            "Greeter.shout",
            lambda original: staticmethod(lambda: f"hooked {original.__func__()}"),
        ),
        (
            "Greeter.name",
            lambda original: classmethod(lambda cls: f"hooked {original.__func__(cls)}"),
        ),
    ],
)
def test_hook_wraps_a_method_when_it_is_one_of_a_class(
    write: Write, target: str, replace: Callable[[Any], Any]
) -> None:
    name = write()
    install([make_hook(f"{name}:{target}", replace)])
    method = getattr(load(name).Greeter(), target.partition(".")[2])
    assert method() in ("hooked hello", "hooked HELLO", "hooked Greeter")


def test_hook_adds_an_attribute_when_it_is_new(write: Write) -> None:
    name = write()
    hook = make_hook(f"{name}:Greeter.wave", lambda original: lambda self: original, is_new=True)
    install([hook])
    assert load(name).Greeter().wave() is None


def test_hooks_are_installed_once_when_asked_twice(write: Write) -> None:
    name = write()
    hook = make_hook(f"{name}:greet")
    install([hook])
    install([hook])
    module = load(name)
    install([hook])
    assert module.greet("you") == "hooked hello you"


@pytest.mark.parametrize(
    ("old", "new"),
    [('f"hello {name}"', 'f"Hello {name}"'), ("greet(name)", "greet(name, *rest)")],
    ids=["body", "signature"],
)
def test_check_names_the_target_when_its_source_has_changed(
    write: Write, old: str, new: str
) -> None:
    name = write()
    hook = make_hook(f"{name}:greet")
    assert check(hook) == []
    write(SOURCE.replace(old, new), name)
    (problem,) = check(hook)
    assert problem.startswith(f"{name}:greet has changed: source digest ")
    assert problem.endswith(f"expected {DIGESTS[hook.target][hook.target]}")


def test_check_finds_nothing_when_only_other_code_has_changed(write: Write) -> None:
    name = write()
    hook = make_hook(f"{name}:greet")
    write(f"import sys\n{SOURCE.replace('goodbye', 'farewell')}", name)
    assert check(hook) == []


def test_check_names_the_target_when_it_or_its_module_is_missing(write: Write) -> None:
    name = write()
    hook = make_hook(f"{name}:greet")
    write(SOURCE.replace("def greet(name)", "def welcome(name)"), name)
    assert check(hook) == [f"{name}:greet is missing (needed by the hook on {name}:greet)"]
    assert check(make_hook("no.such.module:f")) == [
        "no.such.module:f is missing (needed by the hook on no.such.module:f)"
    ]


def test_check_names_the_target_when_a_new_attribute_exists_already(write: Write) -> None:
    name = write()
    hook = make_hook(f"{name}:Greeter.greet", is_new=True)
    assert check(hook) == [
        f"{name}:Greeter.greet exists, but this version of the plugin expects it not to"
    ]


def test_nothing_is_armed_when_one_of_several_hooks_does_not_fit(write: Write) -> None:
    good, bad = write(), write()
    fits, fits_not = make_hook(f"{good}:greet"), make_hook(f"{bad}:greet")
    write(SOURCE.replace("hello", "good day"), bad)
    with pytest.raises(HookError, match=rf"{bad}:greet has changed") as error:
        install([fits, fits_not])
    assert "cannot hook into this vLLM" in str(error.value)
    assert "Install vllm==" in str(error.value)
    assert "VLLM_PLUGINS" in str(error.value)
    assert {hook_state(fits), hook_state(fits_not)}.isdisjoint({"armed", "applied"})
    assert load(good).greet("you") == "hello you"


def test_hook_is_refused_each_time_when_its_target_was_patched_before(write: Write) -> None:
    name = write()
    hook = make_hook(f"{name}:greet")
    load(name).greet = lambda name: "patched"
    for _ in range(2):
        with pytest.raises(HookError, match=rf"{name}:greet is already patched, by .*lambda"):
            install([hook])
        assert hook_state(hook) == "refused"
    assert load(name).greet("you") == "patched"


def test_import_is_refused_each_time_when_the_target_is_patched_by_then(write: Write) -> None:
    elsewhere = write("def welcome(name):\n    return 'patched'\n")
    name = write(f"{SOURCE}\n\nfrom {elsewhere} import welcome as greet\n")
    hook = make_hook(f"{name}:greet")
    install([hook])
    for _ in range(2):
        with pytest.raises(HookError, match=rf"{name}:greet is already patched, by {elsewhere}"):
            load(name)
        assert hook_state(hook) == "refused"


def test_no_hook_is_applied_when_another_target_was_patched_already(write: Write) -> None:
    name = write()
    module = load(name)
    module.part = lambda: "patched"
    with pytest.raises(HookError, match=rf"{name}:part is already patched"):
        install([make_hook(f"{name}:greet"), make_hook(f"{name}:part")])
    assert module.greet("you") == "hello you"


def test_nothing_is_armed_when_a_name_that_is_used_without_a_hook_has_changed(
    write: Write,
) -> None:
    hooked, used = write(), write()
    hook, use = make_hook(f"{hooked}:greet"), Use(module="ours", **TEXTS)
    DIGESTS["ours"] = {f"{used}:Greeter.greet": "0"}
    with pytest.raises(HookError, match=rf"{used}:Greeter\.greet has changed"):
        install([hook, use])
    assert hook_state(hook) == "refused"
    assert load(hooked).greet("you") == "hello you"


def test_check_asks_only_for_the_name_when_any_definition_will_do(write: Write) -> None:
    name = write()
    use = Use(module="ours", **TEXTS)
    DIGESTS["ours"] = {f"{name}:Greeter": vllm_source.ANY, f"{name}:Farewell": vllm_source.ANY}
    assert check(use) == [f"{name}:Farewell is missing (needed by ours)"]


def test_entry_is_refused_when_the_version_has_no_digests_for_it(write: Write) -> None:
    hook = make_hook(f"{write()}:greet")
    del DIGESTS[hook.target]
    with pytest.raises(HookError, match=f"no digests of what {hook.target} relies on"):
        install([hook])


def test_hook_is_left_out_when_the_version_does_not_need_it(write: Write) -> None:
    name = write()
    hook = make_hook(f"{name}:greet")
    DIGESTS[hook.target] = None
    install([hook])
    assert load(name).greet("you") == "hello you"
    assert hook_state(hook) == "not installed"


ASSIGNED = """
LIMIT: int = 3
if LIMIT:
    first, second = 1, 2

class Counter:
    step = 1

    def __init__(self):
        local = self.count = 0

    def add(self):
        self.count, self.last = self.count + self.step, True
"""


@pytest.mark.parametrize(
    ("qualname", "source"),
    [
        ("LIMIT", "LIMIT: int = 3"),
        ("second", "    first, second = 1, 2"),
        ("Counter.step", "    step = 1"),
        (
            "Counter.count",
            "        local = self.count = 0\n"
            "        self.count, self.last = self.count + self.step, True",
        ),
        ("local", None),
        ("Counter.local", None),
        ("Counter.add.last", None),
    ],
)
def test_definition_is_found_when_it_is_a_variable_or_an_attribute(
    write: Write, qualname: str, source: str | None
) -> None:
    assert vllm_source.definitions(write(ASSIGNED)).get(qualname) == source


@pytest.mark.parametrize("version", ["0.32.0", "0.32.0+cpu", "0.32.0+cu130", "0.33.0"])
def test_version_is_accepted_when_it_is_a_supported_release(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.0", "0.32.1", "0.34.0", "1.0", "dev"])
def test_version_is_refused_when_it_is_not_a_supported_release(version: str) -> None:
    with pytest.raises(HookError) as error:
        check_version(version)
    assert f"vLLM {version} is not supported" in str(error.value)
    assert "Install vllm==0.32.0 or vllm==0.33.0, or" in str(error.value)
    assert "VLLM_LAYERSKIP_SKIP_VERSION_CHECK=1" in str(error.value)
    check_version(version, is_check_skipped=True)
