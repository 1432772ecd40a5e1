"""Every entry of the ledger against the vLLM that is installed, and each refusing another vLLM."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import vllm

from layerskip_vllm.hooks import install as hooks
from layerskip_vllm.hooks import vllm_source
from layerskip_vllm.hooks.install import Entry, Hook, HookError, check, find_needed, install
from layerskip_vllm.hooks.method_hooks import METHOD_HOOKS, REGISTRY
from layerskip_vllm.plugin import LEDGER, SKIP_VERSION_CHECK, entries_here, register

DIGESTS = vllm_source.read_digests(vllm.__version__)
NEEDED = find_needed(LEDGER, DIGESTS)
HOOKS = [entry for entry in NEEDED if isinstance(entry, Hook)]


def name_of(entry: Entry) -> str:
    return entry.name.split(".")[-1]


each_entry = pytest.mark.parametrize("entry", NEEDED, ids=name_of)
each_hook = pytest.mark.parametrize("hook", HOOKS, ids=name_of)


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Have the hooks read an edited copy of a module's source in the place of the installed one."""
    find_file, definitions = vllm_source.find_file, vllm_source.definitions
    copies: dict[str, Path | None] = {}

    def edit(module: str, change: Callable[[str], str] | None) -> None:
        copies[module] = None
        if change is not None:
            copies[module] = tmp_path / f"{module}.py"
            file = find_file(module)
            copies[module].write_text(change(file.read_text() if file else ""))

    monkeypatch.setattr(
        vllm_source,
        "find_file",
        lambda module, root=None: copies[module] if module in copies else find_file(module),
    )
    # What is not edited is parsed once in all tests.
    of_copies = functools.cache(definitions.__wrapped__)
    monkeypatch.setattr(
        vllm_source,
        "definitions",
        lambda module, root=None: (of_copies if module in copies else definitions)(module),
    )
    return edit


def sources_by_module(entry: Entry) -> dict[str, list[str]]:
    """The qualified names that an entry relies on."""
    sources: dict[str, list[str]] = {}
    for name in DIGESTS[entry.name]:
        module, _, qualname = name.partition(":")
        sources.setdefault(module, []).append(qualname)
    return sources


def find_lines(source: str, qualname: str) -> list[tuple[int, int]]:
    """The first and last lines of all that defines a name, counted from 0."""
    return [
        (node.lineno - 1, node.end_lineno - 1)
        for name, node in vllm_source._find_definitions(ast.parse(source), "", None)
        if name == qualname
    ]


@each_entry
def test_entry_fits_when_vllm_is_the_installed_one(entry: Entry) -> None:
    assert check(entry, DIGESTS) == []


@each_hook
def test_hook_watches_its_own_target_when_the_target_exists(hook: Hook) -> None:
    qualname = hook.target.partition(":")[2]
    watched = [name for name in DIGESTS[hook.target] if name.endswith(f":{qualname}")]
    assert watched == [] if hook.is_new else len(watched) == 1


@each_entry
def test_entry_is_refused_when_anything_it_relies_on_has_changed(
    edit: Callable[..., None], entry: Entry
) -> None:
    for module, qualnames in sources_by_module(entry).items():

        def change(source: str, qualnames: list[str] = qualnames) -> str:
            lines = source.splitlines()
            last_lines = {line for name in qualnames for _, line in find_lines(source, name)}
            for line in last_lines:
                lines[line] += "  # changed"
            return "\n".join(lines)

        edit(module, change)
    changed = [problem.partition(" has changed: ")[0] for problem in check(entry, DIGESTS)]
    digests = DIGESTS[entry.name].items()
    assert changed == [name for name, digest in digests if digest != vllm_source.ANY]


@each_entry
def test_entry_is_refused_when_anything_it_relies_on_is_missing(
    edit: Callable[..., None], entry: Entry
) -> None:
    for module, qualnames in sources_by_module(entry).items():

        def rename(source: str, qualnames: list[str] = qualnames) -> str:
            lines = source.splitlines()
            for qualname in qualnames:
                name = qualname.rpartition(".")[2]
                for first, last in find_lines(source, qualname):
                    text = "\n".join(lines[first : last + 1])
                    renamed = re.sub(rf"\b{name}\b", "renamed", text, count=1)
                    lines[first : last + 1] = renamed.split("\n")
            return "\n".join(lines)

        edit(module, rename)
    assert check(entry, DIGESTS) == missing(entry)


@each_entry
def test_entry_is_refused_when_a_module_it_relies_on_is_missing(
    edit: Callable[..., None], entry: Entry
) -> None:
    for module in sources_by_module(entry):
        edit(module, None)
    assert check(entry, DIGESTS) == missing(entry)


def missing(entry: Entry) -> list[str]:
    """What is to be said if nothing is left of what an entry relies on."""
    needed_by = f"the hook on {entry.name}" if isinstance(entry, Hook) else entry.name
    return [f"{name} is missing (needed by {needed_by})" for name in DIGESTS[entry.name]]


@pytest.mark.parametrize("hook", [hook for hook in HOOKS if hook.is_new], ids=name_of)
def test_hook_is_refused_when_its_new_attribute_exists(
    edit: Callable[..., None], hook: Hook
) -> None:
    module, _, qualname = hook.target.partition(":")
    class_name, _, attribute = qualname.rpartition(".")

    def change(source: str) -> str:
        lines = source.splitlines()
        ((_, last),) = find_lines(source, class_name)
        return "\n".join([*lines[: last + 1], f"    def {attribute}(cls): ...", *lines[last + 1 :]])

    edit(module, change)
    assert any(problem.startswith(f"{hook.target} exists") for problem in check(hook, DIGESTS))


@each_hook
def test_registration_is_refused_when_a_target_is_not_the_expected_one(
    edit: Callable[..., None], monkeypatch: pytest.MonkeyPatch, hook: Hook
) -> None:
    monkeypatch.setattr(hooks, "_states", {})
    edit(hook.module, lambda source: "")
    with pytest.raises(HookError, match=re.escape(hook.module)):
        install([hook], DIGESTS)
    assert hooks.hook_state(hook) == "refused"


def test_entry_is_left_out_when_its_digests_are_null() -> None:
    first, second = LEDGER[:2]
    assert find_needed([first, second], {first.name: None}) == [second]


def test_registration_is_refused_when_the_version_is_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    monkeypatch.setattr(hooks, "_states", {})
    with pytest.raises(HookError, match=r"vLLM 0\.31\.0 is not supported.*SKIP_VERSION_CHECK=1"):
        register()
    assert not hooks._states


@pytest.mark.parametrize(
    ("field", "is_ours"), [("create_config", True), ("configure", False)], ids=["ours", "another"]
)
def test_registry_stands_for_the_hooks_when_it_has_what_layerskip_needs(
    edit: Callable[..., None], field: str, is_ours: bool
) -> None:
    edit(REGISTRY, lambda source: f"class SpeculativeMethodSpec:\n    {field}: object\n")
    assert is_ours == (not set(METHOD_HOOKS) & set(entries_here()))


@pytest.mark.parametrize(
    "name",
    [
        HOOKS[0].definition,
        "vllm.v1.sample.sampler:_SAMPLING_EPS",
        "vllm.distributed.kv_transfer.kv_transfer_state:_KV_CONNECTOR_AGENT",
    ],
    ids=["a target", "what a drafter reads", "what a drafter sets"],
)
def test_changed_source_is_refused_when_the_version_check_is_skipped(
    edit: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(vllm, "__version__", "0.33.0")
    monkeypatch.setenv(SKIP_VERSION_CHECK, "1")
    monkeypatch.setattr(hooks, "_states", {})
    module, _, qualname = name.partition(":")
    attribute = qualname.rpartition(".")[2]
    edit(module, lambda source: re.sub(rf"\b{attribute}\b", "renamed", source))
    with pytest.raises(HookError, match=rf"{re.escape(name)} is missing"):
        register()
    assert set(hooks._states.values()) == {"refused"}
