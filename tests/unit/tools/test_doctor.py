"""`layerskip-vllm doctor`, in this process, on checkpoints with and without weights."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from layerskip_vllm.checkpoint.weight_shares import read_shares
from layerskip_vllm.drafting import cpu_dtypes
from layerskip_vllm.hooks import install as hooks
from layerskip_vllm.hooks import method_hooks, vllm_source
from layerskip_vllm.plugin import LEDGER
from layerskip_vllm.tools.commands import main

Doctor = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def doctor(write_model: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Run `layerskip-vllm doctor --json`: the exit status and the object."""

    def doctor(*arguments: str) -> tuple[int, dict[str, Any]]:
        capsys.readouterr()
        status = main(["doctor", "--json", *arguments])
        text = capsys.readouterr().out
        return status, json.loads(text[text.index("{\n") :])

    return doctor


def test_doctor_finds_nothing_wrong_when_all_is_in_place(doctor: Doctor) -> None:
    import torch
    import vllm

    status, report = doctor()
    assert (status, report["problems"]) == (0, [])
    assert report["versions"]["vllm"].partition("+")[0] == vllm.__version__.partition("+")[0]
    assert report["versions"]["torch"] == torch.__version__
    assert report["versions"]["python"] == sys.version.split()[0]
    assert report["versions"].keys() >= {"layerskip-vllm", "transformers"}
    assert report["plugin"]["entry point"] == "layerskip_vllm.plugin:register"
    assert report["plugin"]["installed by"] == "hooks"
    assert len(report["devices"]["cuda"]) == torch.cuda.device_count()
    assert re.search(r", \d+ cores$", report["devices"]["cpu"])
    assert re.match(r"V[12]\b", report["devices"]["model runner"])
    assert report["checkpoint"] == {}


def test_doctor_lists_the_whole_ledger_when_all_is_in_place(doctor: Doctor) -> None:
    _, report = doctor()
    applied = [entry for entry in LEDGER if isinstance(entry, hooks.Hook)]
    assert report["hooks"] == [
        {
            "target": entry.name,
            "why": entry.why,
            "state": "applied" if entry in applied else "checked",
            "problems": [],
        }
        for entry in LEDGER
    ]
    assert {hooks.hook_state(hook) for hook in applied} == {"applied"}


def test_doctor_says_what_it_would_pick_when_a_checkpoint_is_named(
    doctor: Doctor, checkpoint: Callable[..., Path]
) -> None:
    model = str(checkpoint("llama", layerskip={"exit_layer": 3}))
    status, report = doctor(model, "--num-speculative-tokens", "5")
    assert status == 0
    picked = report["checkpoint"]
    assert picked["model"] == model
    assert picked["architecture"] == "LlamaForCausalLM"
    assert picked["layers"] == 8
    assert (picked["exit_layer"], picked["num_speculative_tokens"]) == (3, 5)
    assert picked["exit_layer from"] == "the checkpoint's config.json"
    assert picked["num_speculative_tokens from"] == "the user"
    assert picked["shares from"] == "the headers of the safetensors files"


def test_doctor_says_how_much_is_drafted_at_most_when_that_is_auto(
    doctor: Doctor, checkpoint: Callable[..., Path]
) -> None:
    status, report = doctor(str(checkpoint("llama")), "--num-speculative-tokens", "auto:6")
    assert status == 0
    assert report["checkpoint"]["num_speculative_tokens"] == "auto, up to 6"


@pytest.mark.parametrize("is_native", [True, False])
def test_doctor_says_that_a_data_type_is_emulated_when_the_cpu_does_not_have_it(
    doctor: Doctor,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    is_native: bool,
) -> None:
    flags = {"avx512f", *(["avx512_bf16"] if is_native else [])}
    monkeypatch.setattr(cpu_dtypes, "_read_flags", lambda: flags)
    monkeypatch.setattr(cpu_dtypes.platform, "machine", lambda: "x86_64")
    _, report = doctor(str(checkpoint("llama", dtype="bfloat16")))
    assert report["checkpoint"]["dtype"].startswith("bfloat16")
    assert ("emulates" in report["checkpoint"]["dtype"]) != is_native


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_shares_are_those_of_the_saved_tensors_when_a_checkpoint_is_here(
    checkpoint: Callable[..., Path], architecture: str
) -> None:
    from safetensors.torch import load_file

    folder = checkpoint(architecture)
    tensors = load_file(folder / "model.safetensors")
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    first = sum(sizes[name] for name in sizes if re.search(r"\.layers\.[012]\.", name))
    layers = sum(sizes[name] for name in sizes if ".layers." in name)
    head = sizes.get("lm_head.weight", sizes["model.embed_tokens.weight"])
    assert 0 < first < layers
    expected = (first / (layers + head), head / (layers + head))
    shares = read_shares(folder, num_layers=8, exit_layer=3)
    assert shares is not None
    assert (shares.layers, shares.head) == pytest.approx(expected)
    assert shares.total == pytest.approx(sum(expected))


def test_shares_are_unknown_when_a_folder_does_not_hold_all_layers(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    assert read_shares(checkpoint("llama"), num_layers=9, exit_layer=3) is None
    assert read_shares(tmp_path, num_layers=8, exit_layer=3) is None
    assert read_shares(None, num_layers=8, exit_layer=3) is None


def test_shares_are_estimated_when_there_are_no_weights(
    doctor: Doctor, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint("llama")
    _, report = doctor(str(folder), "--exit-layer", "3")
    shutil.copy(folder / "config.json", tmp_path)
    status, estimate = doctor(str(tmp_path), "--exit-layer", "3")
    assert status == 0
    assert estimate["checkpoint"]["shares from"].startswith("the config, for layers of attention")
    for key in ("share of layers", "share of head"):
        exact = report["checkpoint"][key]
        assert estimate["checkpoint"][key] == pytest.approx(exact, abs=0.005)


@pytest.mark.parametrize(
    ("entries", "arguments", "refusal"),
    [
        ({}, ["--exit-layer", "9"], "exit_layer is 9 (from the user), but"),
        ({}, ["--exit-layer", "0"], "exit_layer is 0; it must be an integer of at least 1."),
        ({}, ["--num-speculative-tokens", "900"], "num_speculative_tokens is 900"),
        ({"layerskip": 3}, [], "'layerskip' in the checkpoint's config.json is 3"),
        (
            {"rope_scaling": {"rope_type": "default", "mrope_section": [4, 6, 6]}},
            [],
            "which layerskip cannot draft with: it uses M-RoPE positions",
        ),
    ],
    ids=["E > L", "E < 1", "K", "entry", "model"],
)
def test_doctor_prints_the_refusal_when_an_engine_would_refuse(
    doctor: Doctor,
    write_model: Callable[..., str],
    entries: dict[str, Any],
    arguments: list[str],
    refusal: str,
) -> None:
    status, report = doctor(write_model("llama", **entries), *arguments)
    assert status == 1
    assert len(report["problems"]) == 1
    assert refusal in report["problems"][0]
    assert report["checkpoint"]["architecture"] == "LlamaForCausalLM"
    assert "exit_layer" not in report["checkpoint"]


def test_doctor_reports_a_problem_when_there_is_no_such_checkpoint(doctor: Doctor) -> None:
    status, report = doctor("./no-such-folder")
    assert status == 1
    assert "no-such-folder" in report["problems"][0]


def test_doctor_reports_a_problem_when_settings_come_without_a_model(doctor: Doctor) -> None:
    status, report = doctor("--exit-layer", "3")
    assert status == 1
    assert report["problems"] == ["exit_layer given without a MODEL to try it on."]


def test_doctor_reports_a_problem_when_vllm_may_not_load_the_plugin(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch, write_model: Callable[..., str]
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "another,plugin")
    status, report = doctor(write_model("llama"))
    assert status == 1
    assert "VLLM_PLUGINS is 'another,plugin'" in report["problems"][0]
    assert "add 'layerskip'" in report["problems"][0]
    assert report["checkpoint"]["draft"] == "not tried: see the problems"
    monkeypatch.setenv("VLLM_PLUGINS", "another,layerskip")
    assert doctor()[0] == 0


def test_doctor_reports_a_problem_when_the_version_of_vllm_is_another(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    status, report = doctor()
    assert status == 1
    assert "vLLM 0.31.0 is not supported" in report["problems"][0]


def test_doctor_names_the_hook_when_its_target_has_changed(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = method_hooks.METHOD_HOOKS[0].target
    digest = vllm_source.source_digest
    monkeypatch.setattr(
        vllm_source,
        "source_digest",
        lambda name, root: "0" if name == changed else digest(name, root),
    )
    status, report = doctor()
    assert status == 1
    assert f"{changed} has changed" in report["problems"][0]
    states = {hook["target"]: hook["state"] for hook in report["hooks"]}
    assert states.pop(changed) == "wrong"
    assert "wrong" not in states.values()


def test_doctor_reports_a_problem_when_vllm_is_not_installed(
    doctor: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from layerskip_vllm.tools.doctor import command as module

    monkeypatch.setattr(module, "_version", lambda package: None)
    status, report = doctor()
    assert status == 1
    assert report["versions"]["vllm"] is None
    assert report["problems"] == ["vLLM is not installed; install vllm==0.32.0 or vllm==0.33.0."]


def test_command_exits_with_usage_when_no_subcommand_is_given(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2
    assert "usage: layerskip-vllm" in capsys.readouterr().err
