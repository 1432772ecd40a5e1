"""The standard library as a corpus: what is in it, what is held out, and where prompts end."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from layerskip_vllm.tools import stdlib_corpus
from layerskip_vllm.tools.prompts import held_out_prompts

SOURCE = '''"""A module."""


def documented(x):
    """Doubles.

    Twice."""
    return 2 * x


class Thing:
    def plain(self):
        return 1

    def only_documented(self):
        """Nothing else."""

    def on_one_line(self): return 2
'''


def write_library(root: Path, num_files: int = 64) -> None:
    """A small library; about one in 16 of its files is held out."""
    for i in range(num_files):
        (root / f"module{i:02d}.py").write_text(SOURCE.replace("Thing", f"Thing{i}"))


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("json/decoder.py", True),
        ("unittest/case.py", True),
        ("test/test_json.py", False),
        ("idlelib/idle_test/test_run.py", False),
        ("lib2to3/tests/data/bom.py", False),
        ("site-packages/torch/nn.py", False),
        ("encodings/cp037.py", False),
        ("html/entities.py", False),
        ("_sysconfigdata__linux_x86_64-linux-gnu.py", False),
        ("config-3.11-x86_64-linux-gnu/python-config.py", False),
        ("LICENSE.txt", False),
    ],
)
def test_is_corpus_path_tells_library_source_when_given_a_path(path, expected):
    assert stdlib_corpus.is_corpus_path(path) is expected


def test_held_out_split_is_as_recorded_when_paths_are_known():
    """A change of the split would put files that the checkpoint was trained on into the prompts."""
    paths = ["random.py", "traceback.py", "ast.py", "json/decoder.py", "argparse.py", "heapq.py"]

    assert [stdlib_corpus.is_held_out(path) for path in paths] == [True] * 3 + [False] * 3


def test_split_is_complete_and_about_a_twentieth_when_on_this_library():
    train, held_out = stdlib_corpus.train_files(), stdlib_corpus.held_out_files()
    train_paths, held_out_paths = ({file.path for file in files} for files in (train, held_out))
    num_chars = [sum(len(file.text) for file in files) for files in (train, held_out)]

    assert not train_paths & held_out_paths
    assert sorted(train_paths | held_out_paths) == [
        file.path for file in stdlib_corpus.read_files(stdlib_corpus.corpus_paths())
    ]
    assert 0.02 < num_chars[1] / sum(num_chars) < 0.1
    assert sum(num_chars) > 5_000_000


def test_files_are_sorted_and_readable_when_the_folder_has_others(tmp_path):
    for path in ("b.py", "a/z.py", "a.py", "test/no.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(f"# {path}\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nname = '\xe9'\r\n")
    (tmp_path / "broken.py").write_bytes(b"name = '\xe9'\n")

    files = stdlib_corpus.read_files(stdlib_corpus.corpus_paths(tmp_path), tmp_path)

    assert [file.path for file in files] == ["a.py", "a/z.py", "b.py", "latin.py"]
    assert files[-1].text == "# -*- coding: latin-1 -*-\nname = 'é'\n"


def test_sha256_changes_when_a_path_or_text_or_boundary_does():
    make = stdlib_corpus.SourceFile
    corpora = [
        [make("a.py", "xy")],
        [make("b.py", "xy")],
        [make("a.py", "xz")],
        [make("a.pyx", "y")],
        [make("a.py", "x"), make("", "y")],
    ]

    assert len({stdlib_corpus.corpus_sha256(files) for files in corpora}) == 5
    assert stdlib_corpus.corpus_sha256(corpora[0]) == stdlib_corpus.corpus_sha256(corpora[0])


def test_prompts_end_before_a_functions_body_when_cut(tmp_path):
    write_library(tmp_path)

    prompts = held_out_prompts(2, max_prompt_chars=60, root=tmp_path)

    assert prompts[0].endswith('    """Doubles.\n\n    Twice."""')
    assert prompts[1].endswith("    def plain(self):")


def test_prompts_are_cut_at_two_places_a_file_when_only_two_bodies_follow(tmp_path):
    write_library(tmp_path)
    num_held_out = len(stdlib_corpus.held_out_files(tmp_path))
    assert num_held_out > 0

    prompts = held_out_prompts(2 * num_held_out, max_prompt_chars=60, root=tmp_path)

    assert len(prompts) == 2 * num_held_out
    with pytest.raises(ValueError, match=f"at most {2 * num_held_out}"):
        held_out_prompts(2 * num_held_out + 1, max_prompt_chars=60, root=tmp_path)


def test_prompts_are_whole_held_out_lines_within_the_limit_when_on_this_library():
    texts = [file.text for file in stdlib_corpus.held_out_files()]

    prompts = held_out_prompts(50, max_prompt_chars=500)

    assert len(set(prompts)) == 50
    for prompt in prompts:
        assert 0 < len(prompt) <= 500
        assert not prompt[-1].isspace()
        sources = [text for text in texts if prompt in text]
        assert any(text.startswith(prompt) or "\n" + prompt in text for text in sources)


def test_prompts_are_spread_over_files_when_few_are_asked_for():
    texts = [file.text for file in stdlib_corpus.held_out_files()]

    prompts = held_out_prompts(8)

    homes = [next(i for i, text in enumerate(texts) if prompt in text) for prompt in prompts]
    assert len(set(homes)) >= 6


def test_prompts_raise_when_none_are_asked_for():
    with pytest.raises(ValueError, match=r"num_prompts must be .*0"):
        held_out_prompts(0)


def test_corpus_files_parse_when_on_this_library():
    for file in stdlib_corpus.held_out_files():
        ast.parse(file.text)


def test_import_loads_no_torch_when_fresh():
    code = (
        "import sys; import layerskip_vllm.tools.stdlib_corpus; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'vllm')))"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
