"""Every hook against the vLLM that is installed here, and each refusing another vLLM."""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from layerskip_vllm.hooks import install as hooks
from layerskip_vllm.hooks.install import Hook, HookError, check, install
from layerskip_vllm.hooks.method_hooks import HOOKS
from layerskip_vllm.plugin import SKIP_VERSION_CHECK, register

LEDGER = Path(__file__).parents[3] / "patches" / "README.md"


def name_of(hook: Hook) -> str:
    return hook.target.split(".")[-1]


each_hook = pytest.mark.parametrize("hook", HOOKS, ids=name_of)


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the hooks read an edited copy of a module's source in the place of the installed one."""
    find_spec, definitions = importlib.util.find_spec, hooks._definitions
    copies: dict[str, Path | None] = {}

    def find_copy(name: str) -> importlib.machinery.ModuleSpec | None:
        if name not in copies:
            return find_spec(name)
        copy = copies[name]
        return copy and importlib.machinery.ModuleSpec(name, None, origin=str(copy))

    def edit(module: str, change: Callable[[str], str] | None) -> None:
        copies[module] = None
        if change is not None:
            copies[module] = tmp_path / f"{module}.py"
            copies[module].write_text(change(Path(find_spec(module).origin).read_text()))

    monkeypatch.setattr(hooks.importlib.util, "find_spec", find_copy)
    # What is not edited is parsed once in all tests.
    monkeypatch.setattr(
        hooks,
        "_definitions",
        lambda module: (definitions.__wrapped__ if module in copies else definitions)(module),
    )
    return edit


def sources_by_module(hook: Hook) -> dict[str, list[str]]:
    """The qualified names that a hook relies on."""
    sources: dict[str, list[str]] = {}
    for name in hook.relies_on:
        module, _, qualname = name.partition(":")
        sources.setdefault(module, []).append(qualname)
    return sources


def find_lines(source: str, qualname: str) -> tuple[int, int]:
    """The first line of a definition's `def` or `class` and its last, counted from 0."""
    nodes = [ast.parse(source)]
    for name in qualname.split("."):
        nodes = [child for node in nodes for child in node.body if is_named(child, name)]
    return nodes[-1].lineno - 1, nodes[-1].end_lineno - 1


def is_named(node: ast.AST, name: str) -> bool:
    return getattr(node, "name", None) == name and hasattr(node, "body")


@each_hook
def test_hook_fits_when_vllm_is_the_installed_one(hook: Hook) -> None:
    assert check(hook) == []


@each_hook
def test_hook_watches_its_own_target_when_the_target_exists(hook: Hook) -> None:
    qualname = hook.target.partition(":")[2]
    watched = [name for name in hook.relies_on if name.endswith(f":{qualname}")]
    assert watched == [] if hook.is_new else len(watched) == 1


@each_hook
def test_hook_is_refused_when_anything_it_relies_on_has_changed(
    edit: Callable[..., None], hook: Hook
) -> None:
    for module, qualnames in sources_by_module(hook).items():

        def change(source: str, qualnames: list[str] = qualnames) -> str:
            lines = source.splitlines()
            for qualname in qualnames:
                lines[find_lines(source, qualname)[1]] += "  # changed"
            return "\n".join(lines)

        edit(module, change)
    changed = [problem.partition(" has changed: ")[0] for problem in check(hook)]
    assert changed == list(hook.relies_on)


@each_hook
def test_hook_is_refused_when_anything_it_relies_on_is_missing(
    edit: Callable[..., None], hook: Hook
) -> None:
    for module, qualnames in sources_by_module(hook).items():

        def rename(source: str, qualnames: list[str] = qualnames) -> str:
            lines = source.splitlines()
            for qualname in qualnames:
                first, name = find_lines(source, qualname)[0], qualname.rpartition(".")[2]
                lines[first] = re.sub(rf"\b{name}\b", "renamed", lines[first])
            return "\n".join(lines)

        edit(module, rename)
    assert check(hook) == [
        f"{name} is missing (needed by the hook on {hook.target})" for name in hook.relies_on
    ]


@each_hook
def test_hook_is_refused_when_a_module_it_relies_on_is_missing(
    edit: Callable[..., None], hook: Hook
) -> None:
    for module in sources_by_module(hook):
        edit(module, None)
    assert check(hook) == [
        f"{name} is missing (needed by the hook on {hook.target})" for name in hook.relies_on
    ]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook.is_new], ids=name_of)
def test_hook_is_refused_when_its_new_attribute_exists(
    edit: Callable[..., None], hook: Hook
) -> None:
    module, _, qualname = hook.target.partition(":")
    class_name, _, attribute = qualname.rpartition(".")

    def change(source: str) -> str:
        lines = source.splitlines()
        _, last = find_lines(source, class_name)
        return "\n".join([*lines[: last + 1], f"    def {attribute}(cls): ...", *lines[last + 1 :]])

    edit(module, change)
    assert any(problem.startswith(f"{hook.target} exists") for problem in check(hook))


@each_hook
def test_registration_is_refused_when_a_target_is_not_the_expected_one(
    edit: Callable[..., None], monkeypatch: pytest.MonkeyPatch, hook: Hook
) -> None:
    monkeypatch.setattr(hooks, "_states", {})
    edit(hook.module, lambda source: "")
    with pytest.raises(HookError, match=re.escape(hook.module)):
        install([hook])
    assert hooks.hook_state(hook) == "refused"


def test_registration_is_refused_when_the_version_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    monkeypatch.setattr(hooks, "_states", {})
    with pytest.raises(HookError, match=r"vLLM 0\.31\.0 is not supported.*SKIP_VERSION_CHECK=1"):
        register()
    assert not hooks._states


def test_changed_source_is_refused_when_the_version_check_is_skipped(
    edit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    monkeypatch.setenv(SKIP_VERSION_CHECK, "1")
    monkeypatch.setattr(hooks, "_states", {})
    edit(HOOKS[0].module, lambda source: source.replace("def create_speculative_config", "def f"))
    with pytest.raises(HookError, match=r"EngineArgs\.create_speculative_config is missing"):
        register()
    assert set(hooks._states.values()) == {"refused"}


def test_ledger_names_exactly_the_hooks_when_read() -> None:
    text = LEDGER.read_text()
    named = re.findall(r"^### `([^`]+)`$", text, flags=re.MULTILINE)
    assert sorted(named) == sorted(hook.target for hook in HOOKS)
    for field in ("Why", "Process", "How", "Relies on", "Upstream", "Remove when"):
        assert len(re.findall(rf"^- \*\*{field}\*\*: ", text, flags=re.MULTILINE)) == len(HOOKS)


@each_hook
def test_ledger_gives_the_sources_of_a_hook_when_read(hook: Hook) -> None:
    entry = LEDGER.read_text().partition(f"### `{hook.target}`")[2].partition("\n### ")[0]
    for name in hook.relies_on:
        assert name.rpartition(":")[2] in entry, name
