"""`write_project` writes a project that is valid as it stands, and never into a folder that has something in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from slmops.core.example import Example
from slmops.core.spec import Spec
from slmops.errors import UsageError
from slmops.templates import MESSAGES, project_name, write_project
from slmops.templates.support_desk import generate


def read(path: Path) -> Spec:
    return Spec.model_validate_json(json.dumps(YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "deep" / "support-desk"
    write_project(folder, "support-desk", 3)
    return folder


def test_it_lists_what_it_wrote(tmp_path: Path):
    made = write_project(tmp_path / "desk", "desk", 0)
    assert made == [tmp_path / "desk" / name for name in ("slmops.yaml", "README.md", "data/messages.jsonl")]
    assert all(path.is_file() for path in made)


def test_the_project_file_is_valid_and_has_name_seed_and_data(project: Path):
    spec = read(project / "slmops.yaml")
    assert (spec.name, spec.seed) == ("support-desk", 3)
    assert (project / spec.data.path).is_file()
    assert spec.train.block_size == spec.convert.block_size, "quantisation-aware training rounds as the converter does"


def test_nothing_is_left_to_fill_in(project: Path):
    for name in ("slmops.yaml", "README.md"):
        assert "@" not in (project / name).read_text(encoding="utf-8")


def test_every_stage_of_the_lifecycle_is_shown_in_order(project: Path):
    loaded = YAML(typ="safe", pure=True).load((project / "slmops.yaml").read_text(encoding="utf-8"))
    stages = ["task", "data", "teacher", "synthesize", "student", "train", "convert", "evaluate"]
    assert [key for key in loaded if key in stages] == stages


def test_the_defaults_in_the_comments_are_the_defaults(project: Path):
    """A commented `# key: value` line that names a key of the spec must hold its real default."""
    spec = read(project / "slmops.yaml")
    text = (project / "slmops.yaml").read_text(encoding="utf-8")
    shown = {
        '# version: "1"': spec.version == "1",
        "# overlap: {near_duplicate: 0.9}": spec.data.overlap.near_duplicate == 0.9,
        "# votes: 1": spec.synthesize.votes == 1,
        "# tokenizer: teacher": spec.student.tokenizer == "teacher",
        "# logit_weight: 0.5": spec.train.logit_weight == 0.5,
        "# block_size: 32": spec.train.block_size == 32 and spec.convert.block_size == 32,
        "# baselines: [few, all]": spec.evaluate.baselines == ("few", "all"),
        '# instruction: ""': spec.task.instruction == "",
    }
    assert all(line in text and true for line, true in shown.items()), shown


def test_the_messages_are_those_of_the_seed(project: Path):
    rows = [json.loads(line) for line in (project / "data/messages.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == generate(MESSAGES, 3)
    assert len({Example.from_json(row).id for row in rows}) == MESSAGES


def test_an_empty_folder_is_used(tmp_path: Path):
    assert write_project(tmp_path, "desk", 0)


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty") as caught:
        write_project(tmp_path, "desk", 0)
    assert caught.value.hint and caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_file_in_its_place_is_refused(tmp_path: Path):
    (tmp_path / "desk").write_text("a file")
    with pytest.raises(UsageError, match="is a file"):
        write_project(tmp_path / "desk", "desk", 0)
    with pytest.raises(UsageError, match="cannot be made"):
        write_project(tmp_path / "desk" / "below", "desk", 0)


@pytest.mark.parametrize(
    ("given", "name"), [("Support Desk", "support-desk"), ("a.b_c-1", "a.b_c-1"), ("..x..", "x"), ("Ünï 2", "n-2")]
)
def test_names_are_brought_into_form(given: str, name: str):
    assert project_name(given) == name


def test_a_name_without_letters_is_refused_before_anything_is_written(tmp_path: Path):
    with pytest.raises(UsageError, match="project's name"):
        write_project(tmp_path / "new", "???", 0)
    assert not (tmp_path / "new").exists()
