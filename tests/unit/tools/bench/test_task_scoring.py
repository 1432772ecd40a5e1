"""Scores, against what the libraries say by themselves and what can be counted by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from absl import logging as absl_logging

from layerskip_vllm.tools.bench.samples import TaskSample
from layerskip_vllm.tools.bench.scoring import cut_body, measure_rouge_2, score_runs
from layerskip_vllm.tools.bench.tasks import TASKS
from layerskip_vllm.tools.engine_process import EngineProcess

# rouge-score brings absl, whose handler closes its stream when vLLM configures logging anew: that
# must not be pytest's.
absl_logging.get_absl_handler().python_handler.setStream(sys.__stderr__)

PROBLEM = {
    "task_id": "Test/0",
    "prompt": "def double(x):\n",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(3) == 6\n",
    "entry_point": "double",
}


def test_rouge_2_is_the_f_measure_of_common_pairs_of_words() -> None:
    # Of 4 pairs in the text and 2 in the reference, one is in both: P = 1/4, R = 1/2.
    scores = measure_rouge_2(
        ["The cat sat down there.", "", "running fast"], ["the CAT, slept", "a b", "runs fast"]
    )
    assert scores == pytest.approx([2 * 0.25 * 0.5 / 0.75, 0, 0])


def test_summaries_are_scored_as_a_whole() -> None:
    sample = TaskSample("0", "", {"document": "", "summary": "a b c"})
    scores = score_runs(TASKS["xsum"], [sample], {"plain": [" a b c\nArticle: a"]}, Path())
    # 2 of 4 pairs, which are 2 of 2.
    assert scores == {"plain": {"ROUGE-2": [pytest.approx(2 / 3)]}}


@pytest.mark.parametrize(
    ("text", "expected"), [(" [IN:GET ]\nnext", 1), ("[IN:GET]", 0), ("", 0), ("\n[IN:GET ]", 1)]
)
def test_parse_matches_when_its_first_line_is_the_reference(text: str, expected: int) -> None:
    sample = TaskSample("0", "", {"utterance": "", "semantic_parse": "[IN:GET ]"})
    scores = score_runs(TASKS["topv2"], [sample], {"plain": [text]}, Path())
    assert scores["plain"]["exact match"] == [expected]


@pytest.mark.parametrize(
    ("completion", "body"),
    [
        ("    return x\n\n\ndef other():\n    pass\n", "    return x\n\n"),
        ("    if x:\n        print(x)\n\nprint(f(1))\nclass A:", "    if x:\n        print(x)\n"),
        ("    return x", "    return x"),
        ("", ""),
    ],
)
def test_body_ends_where_something_else_begins(completion: str, body: str) -> None:
    assert cut_body(completion) == body


def test_tests_of_the_harness_say_which_answers_pass(tmp_path: Path) -> None:
    """Also where one ends its process, takes all memory, or looks for a secret."""
    answers = [
        "    return x + x\n\nprint(double(4))",
        "    return x",
        "    import os; os._exit(0)",
        "    y = bytearray(5 << 30)\n    return 2 * x",
        "    import os\n    assert 'SECRET' not in os.environ\n    return 2 * x",
        "    return (",
    ]
    samples = [TaskSample(f"Test/{n}", "", PROBLEM | {"task_id": f"Test/{n}"}) for n in range(6)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SECRET", "1")
        scores = score_runs(
            TASKS["humaneval"], samples, {"plain": answers, "layerskip": answers[::-1]}, tmp_path
        )
    assert scores["plain"]["pass@1"] == [1, 0, 0, 0, 1, 0]
    assert scores["layerskip"]["pass@1"] == [0, 1, 0, 0, 0, 1]
    assert (
        scores["plain"]["ROUGE-2"][0]
        == measure_rouge_2(answers[:1], [PROBLEM["canonical_solution"]])[0]
    )


def test_answer_has_no_socket_of_the_process_that_tests(tmp_path: Path) -> None:
    """Such as that of its jobs: what is written there is unpickled by the command."""
    answer = (
        "    import os\n"
        "    def sockets(process):\n"
        "        folder = f'/proc/{process}/fd/'\n"
        "        files = [os.path.realpath(folder + name) for name in os.listdir(folder)]\n"
        "        return {name for file in files if 'socket:' in (name := os.path.basename(file))}\n"
        "    theirs = sockets(os.getppid())\n"
        "    assert theirs and not theirs & sockets(os.getpid())\n"
        "    return 2 * x"
    )
    sample = TaskSample("Test/0", "", PROBLEM)
    scores = score_runs(TASKS["humaneval"], [sample], {"plain": [answer]}, tmp_path)
    assert scores["plain"]["pass@1"] == [1]


def test_answer_is_tested_once_when_two_runs_gave_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tested = []

    def run(self: EngineProcess, job: str, problems: object, answers: list[object]) -> list[bool]:
        tested.extend(answers)
        return [True] * len(answers)

    monkeypatch.setattr(EngineProcess, "run", run)
    sample = TaskSample("Test/0", "", PROBLEM)
    runs = {"plain": ["    return 1"], "layerskip": ["    return 1\nprint(2)"]}
    score_runs(TASKS["humaneval"], [sample], runs, tmp_path)
    assert tested == [("Test/0", "    return 1")]
