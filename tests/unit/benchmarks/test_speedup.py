"""The speed-up benchmark on a GPU, as far as none is needed to see it."""

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.decoding import engines, speedup
from benchmarks.decoding.engines import Facts, Measurement, StepTimes
from benchmarks.decoding.speedup import parse_options
from benchmarks.decoding.speedup_picture import make_speedup_figure
from benchmarks.decoding.speedup_report import describe_run, make_engine_table, make_speedup_table
from benchmarks.decoding.speedup_summary import Load, summarize
from benchmarks.decoding.synthetic_checkpoint import make_shape
from benchmarks.decoding.synthetic_spec import PRESETS
from benchmarks.decoding.systems import count_kv_bytes, make_engine_args
from benchmarks.decoding.timed_worker import TimedWorker
from benchmarks.decoding.weight_counts import count_weights
from layerskip_vllm.checkpoint.draft_vocab import read_draft_vocab
from layerskip_vllm.tools.output import make_console
from layerskip_vllm.tools.server.metrics import SpecDecodeCounters

FACTS = Facts(2**30, 4096, "cuda", "compiled", 1, start_s=12.0, capture_s=3, graph_gib=0.25)
LOADS = (Load(1, 16), Load(4, 16), Load(1, 300))


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(speedup, "list_gpu_names", lambda: ["a GPU"])


def test_engine_has_a_process_and_long_texts_when_there_is_a_gpu(on_gpu):
    options = parse_options([])
    assert (options.preset, options.engine_process, options.max_tokens) == ("gpu-1b", True, 512)
    assert not parse_options(["--no-engine-process"]).engine_process


def test_engine_is_in_its_callers_process_when_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(speedup, "list_gpu_names", list)
    options = parse_options(["--dummy-weights"])
    assert (options.preset, options.engine_process, options.max_tokens) == ("cpu-0.6b", False, 128)
    # Model Runner V1 would refuse it.
    args = make_engine_args("layerskip", options, make_shape(PRESETS["tiny"], tmp_path))
    assert "rejection_sample_method" not in args["speculative_config"]


def test_kv_cache_holds_all_texts_when_nobody_says_how_large_it_is(on_gpu, tmp_path):
    arguments = ["--preset", "gpu-8b", "--batch-sizes", "1", "64", "--max-tokens", "512"]
    # 32 layers and a draft model's 8, keys and values, 8 heads of 128, 2 bytes.
    token_bytes = 40 * 2 * 8 * 128 * 2
    texts = 64 * 640  # 16 + 512 + 64 tokens, in blocks of 128
    config = make_shape(PRESETS["gpu-8b"], tmp_path).config
    assert count_kv_bytes(parse_options(arguments), config) == (texts + 128) * token_bytes
    long = parse_options([*arguments[:3], "1", "--num-long-prompt-tokens", "3000"])
    assert count_kv_bytes(long, config) == (3584 + 128) * token_bytes
    options = parse_options([*arguments, "--kv-cache-gib", "2"])
    assert count_kv_bytes(options, config) == 2 * 2**30


def test_acceptance_is_given_when_a_gpu_has_drawn_the_weights(on_gpu, tmp_path):
    options = parse_options(["--dummy-weights", "--preset", "tiny", "--acceptance", "0.5"])
    checkpoint = make_shape(PRESETS["tiny"], tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    by_system = {s: make_engine_args(s, options, checkpoint) for s in options.systems}
    assert {args["load_format"] for args in by_system.values()} == {"dummy"}
    for system in ("layerskip", "draft_model"):
        settings = by_system[system]["speculative_config"]
        assert settings["rejection_sample_method"] == "synthetic"
        assert settings["synthetic_acceptance_length"] == 3.0  # half of four drafts, and one
    assert "rejection_sample_method" not in by_system["ngram"]["speculative_config"]
    assert (
        json.loads((checkpoint.draft_folder / "config.json").read_text())["num_hidden_layers"] == 1
    )


def test_layerskip_has_the_settings_that_its_name_says(on_gpu, tmp_path):
    name, reusing = "layerskip+auto+draft_vocab+lookup", "layerskip+reuse"
    systems = ["--systems", "plain", name, reusing]
    options = parse_options(["--dummy-weights", "--preset", "tiny", *systems])
    checkpoint = make_shape(PRESETS["tiny"], tmp_path)
    reused = make_engine_args(reusing, options, checkpoint)["speculative_config"]
    assert (reused["reuse_exit_states"], "lookup" in reused) == ("auto", False)
    settings = make_engine_args(name, options, checkpoint)["speculative_config"]
    assert settings["num_speculative_tokens"] == "auto:4"
    assert (settings["lookup"], "reuse_exit_states" in settings) == ("auto", False)
    draft_vocab = read_draft_vocab(Path(settings["draft_vocab"]))
    assert (draft_vocab.vocab_size, len(draft_vocab.token_ids)) == (1024, 256)
    options.draft_vocab = tmp_path / "mine.json"
    args = make_engine_args(name, options, make_shape(PRESETS["tiny"], tmp_path))
    assert args["speculative_config"]["draft_vocab"] == str(options.draft_vocab)


@pytest.mark.parametrize("name", ["plain+auto", "layerskip+fast", "eagle", "layerskip+"])
def test_unknown_systems_are_refused_by_name(name, capsys):
    with pytest.raises(SystemExit):
        parse_options(["--systems", "plain", name])
    assert f"{name!r} is no system" in capsys.readouterr().err


def test_draft_vocab_is_asked_for_when_acceptance_hangs_on_it(monkeypatch):
    monkeypatch.setattr(speedup, "list_gpu_names", list)
    with pytest.raises(ValueError, match="--draft-vocab is not given"):
        parse_options(["--systems", "plain", "layerskip+draft_vocab"])


def test_peak_memory_is_the_workers_when_it_is_in_another_process():
    llm = SimpleNamespace(
        llm_engine=SimpleNamespace(
            vllm_config=SimpleNamespace(
                device_config=SimpleNamespace(device_type="cuda"),
                cache_config=SimpleNamespace(num_gpu_blocks=4, block_size=16),
                compilation_config=SimpleNamespace(mode=3),
            )
        ),
        collective_rpc=lambda method: {"read_peak_memory": [123456]}[method],
    )
    engines._start_s = 1.0
    assert engines._gather_facts(llm).peak_memory_bytes == 123456


def test_worker_gives_the_medians_of_steps_without_the_first():
    class Runner:
        speculator, decode_query_len = object(), 5

        def __init__(self):
            self.runs = []
            self.step_timing = SimpleNamespace(collect=lambda: contextlib.nullcontext(self.steps))
            self.steps = []

        def _dummy_run(self, num_tokens, **kwargs):
            self.runs.append((num_tokens, kwargs))
            is_first = len(self.runs) <= 5
            ms = 1000.0 if is_first else float(len(self.runs))
            self.steps.append(SimpleNamespace(forward_ms=ms, drafter_ms=ms / 10))

    worker = TimedWorker()
    worker.model_runner = Runner()
    assert worker.time_steps(batch_size=4, context_len=300) == pytest.approx((15.5, 1.55))
    assert set(map(str, worker.model_runner.runs)) == {
        str((20, {"uniform_decode": True, "context_len": 300}))
    }
    worker.model_runner = SimpleNamespace(speculator=None)  # plain
    assert worker.time_steps(4, 300) is None
    worker.model_runner = SimpleNamespace(drafter=object())  # Model Runner V1
    assert worker.time_steps(4, 300) is None


def test_engine_reads_what_graphs_took_from_its_log():
    line = "INFO [model_runner.py:1128] Graph capturing finished in 4 secs, took 0.57 GiB"
    engine = engines.Engine.__new__(engines.Engine)
    engine._process = SimpleNamespace(log=f"...\n{line}\n...")
    engine._update(Facts(1, 1, "cuda", "compiled", 1, start_s=20.0))
    assert (engine.facts.capture_s, engine.facts.graph_gib) == (4, 0.57)


def test_tables_and_picture_show_each_load_when_step_times_are_there(on_gpu, tmp_path):
    arguments = ["--preset", "tiny", "--dummy-weights", "--batch-sizes", "1", "4"]
    arguments += ["--num-long-prompt-tokens", "300", "--systems", "plain", "layerskip"]
    options = parse_options(arguments)
    checkpoint = make_shape(PRESETS["tiny"], tmp_path)
    counts = count_weights(json.loads((checkpoint.folder / "config.json").read_text()))
    plain = Measurement(100.0, 0.1, 1.0, SpecDecodeCounters(0, 0, 0, ()), [[1, 2]])
    counters = SpecDecodeCounters(10, 40, 30, (10, 10, 10, 0))
    drafted = Measurement(180.0, 0.1, 1.0, counters, [[1, 3]])
    results = {load: {"plain": [plain], "layerskip": [drafted]} for load in LOADS}
    summaries = [
        replace(line, step_times=StepTimes(6.25, 1.75))
        for line in summarize(results, counts, options)
    ]
    assert [line.load for line in summaries[::2]] == list(LOADS)
    assert {line.speedup for line in summaries[1::2]} == {1.8}
    assert {line.same_texts for line in summaries} == {None}  # acceptance was given
    facts = {"plain": FACTS, "layerskip": FACTS}
    console = make_console()
    with console.capture() as capture:
        for note in describe_run(checkpoint, counts, facts, summaries, options):
            console.print(note)
        console.print(make_speedup_table(summaries, options))
        console.print(make_engine_table(facts, counts, options))
    text = capture.get()
    for expected in ("6.25 ms", "1.75 ms", "300", "0.25 GiB", "3 s", "acceptance given (72%)"):
        assert expected in text
    figure = make_speedup_figure({"tiny": [asdict(line) for line in summaries]}, "a GPU")
    figure.savefig(tmp_path / "picture.png")
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_xticklabels()][2] == "batch 1,\nprompt 300"
