"""Environments of tools: whole or not at all, made once, apart from slmops' packages; what runs in them ends with whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from slmops.cli.main import main
from slmops.core.environment import Environment, requirements
from slmops.core.method import Declaration, SilentProgress
from slmops.errors import ResourceError, ToolError, UsageError
from slmops.flow import methods
from slmops.store import environments
from slmops.store.files import write_json

HERE = Path(sys.executable)
TOOL = Environment("tiny-tool", ("tiny_tool==1.0",))


def wheel(folder: Path, version: str) -> None:
    """A package that says its version, its arguments and where its modules come from."""
    info = f"tiny_tool-{version}.dist-info"
    source = f"import json, sys\nprint(json.dumps([{version!r}, sys.argv[1:], sys.path]))\n"
    files = {
        "tiny_tool.py": source,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-tool\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"tiny_tool-{version}-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SLMOPS_ENVIRONMENTS", str(tmp_path / "cache"))
    monkeypatch.delenv("SLMOPS_ENVIRONMENT_TINY_TOOL", raising=False)
    yield tmp_path / "cache"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only place that pip looks in."""
    wheel(tmp_path / "wheels", "1.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def pretend(environment: Environment) -> Path:
    """A folder that counts as the environment."""
    folder = environments.folder_of(environment)
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(HERE)
    marker = {"name": environment.name, "python": environments.this_python(), "packages": environment.versions}
    write_json(folder / environments.MARKER, marker | {"size": 5, "made": 1.0, "also": {}})
    return folder / "bin" / "python"


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return True  # whoever it was left to does not collect it in a container
        time.sleep(0.05)
    return False


@pytest.mark.slow
def test_made_once_and_apart(shelf: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "tiny_tool.py").write_text("print('the wrong one')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "else"))
    monkeypatch.chdir(tmp_path / "else")
    first, second = SilentProgress(), SilentProgress()
    python = environments.ensure(TOOL, first)
    assert python.is_relative_to(cache) and "making the environment tiny-tool" in first.lines[0]
    environments.run(python, "tiny_tool", ["--a", "b c"], log=tmp_path / "log")
    said = (tmp_path / "log").read_text()
    assert '["1.0", ["--a", "b c"]' in said and str(tmp_path / "else") not in said
    assert str(HERE.parent.parent / "lib") not in said, "packages of slmops are not seen"
    assert environments.ensure(TOOL, second) == python and second.lines == []
    (found,) = environments.all_found()
    assert (found.name, found.whole) == ("tiny-tool", True) and found.size > 1e6
    assert not [path for path in cache.iterdir() if path.suffix == ".log"]


@pytest.mark.slow
def test_a_failed_making_leaves_nothing_and_says_why(shelf: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ToolError, match=r"(?s)pip failed:.*No matching distribution found for tiny_tool==2.0"
    ) as caught:
        environments.ensure(Environment("tiny-tool", ("tiny_tool==2.0",)))
    assert "SLMOPS_ENVIRONMENT_TINY_TOOL" in caught.value.hint
    assert not [path for path in cache.iterdir() if path.is_dir()]
    for name, value in {"PIP_NO_INDEX": "0", "PIP_INDEX_URL": "http://127.0.0.1:9/", "PIP_RETRIES": "1"}.items():
        monkeypatch.setenv(name, value)
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ToolError, match="the package index cannot be reached") as caught:
        environments.ensure(TOOL)
    assert "PIP_FIND_LINKS" in caught.value.hint
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.slow
def test_a_making_that_was_killed_is_made_again(shelf: Path, cache: Path) -> None:
    code = "from tests.store.test_environments import *; environments.ensure(TOOL)"
    process = subprocess.Popen([HERE, "-c", code], cwd=Path(__file__).parents[2])
    folder = environments.folder_of(TOOL)
    while not (folder / "bin" / "python").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not environments.ready(TOOL)
    assert [one.whole for one in environments.all_found()] == [False]
    python = environments.ensure(TOOL)
    assert python.exists() and environments.ready(TOOL)


def test_of_two_at_once_one_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(environment: Environment, folder: Path, progress: SilentProgress) -> None:
        made.append(folder)
        time.sleep(0.3)
        pretend(environment)

    monkeypatch.setattr(environments, "_make", make)
    talk = [SilentProgress(), SilentProgress()]
    threads = [threading.Thread(target=environments.ensure, args=(TOOL, one)) for one in talk]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert [line for one in talk for line in one.lines] == [
        "waiting until another slmops has made the environment tiny-tool"
    ]


def test_no_room_is_said_before_anything_is_made(cache: Path) -> None:
    with pytest.raises(ResourceError, match=r"needs about 1000000000\.0 GB") as caught:
        methods.require(Declaration("x.y", "1", "model", environment=Environment("tiny-tool", ("a==1",), size=10**18)))
    assert "SLMOPS_ENVIRONMENTS" in caught.value.hint
    assert not cache.exists()


def test_one_made_by_hand_is_taken_and_counts_by_its_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "own"
    packages = folder / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    monkeypatch.setenv("SLMOPS_ENVIRONMENT_TINY_TOOL", str(folder))
    with pytest.raises(UsageError, match="is no environment"):
        environments.ensure(TOOL)
    (folder / "bin" / "python").symlink_to(HERE)
    with pytest.raises(UsageError, match="has no tiny-tool") as caught:
        environments.require(TOOL)
    assert caught.value.hint == "install: tiny_tool==1.0"
    for version, same in (("1.0", True), ("1.1", False)):
        wheel(tmp_path / "w", version)
        with zipfile.ZipFile(tmp_path / "w" / f"tiny_tool-{version}-py3-none-any.whl") as archive:
            archive.extractall(packages)
        assert environments.ensure(TOOL) == folder / "bin" / "python"
        assert (environments.identity(TOOL) == TOOL.key(environments.this_python())) == same
        (packages / f"tiny_tool-{version}.dist-info" / "METADATA").unlink()


def test_versions_go_into_the_key_of_a_step_and_only_of_one_that_has_an_environment() -> None:
    plain = Declaration("x.y", "1", "model")
    assert methods.environment(plain, 1) == {}
    keys = set()
    for pins in (("a==1", "b==2"), ("b==2", "A==1"), ("a==1", "b==3")):
        (found,) = methods.environment(Declaration("x.y", "1", "model", environment=Environment("t", pins)), 1).items()
        assert found[0] == "environment t"
        keys.add(found[1])
    assert len(keys) == 2


def test_a_build_of_a_version_is_that_version() -> None:
    asked = Environment("t", ("torch==2.1", "b==1", "c==1+cpu"))
    assert environments.differing(asked, {"torch": "2.1+cpu", "b": "1", "c": "1+cpu", "d": "3"}) == []
    assert environments.differing(asked, {"torch": "2.1.1", "c": "1"}) == ["b missing", "c 1", "torch 2.1.1"]


@pytest.mark.parametrize("loose", ["a>=1", "a", "a==1; python_version<'3'", "a @ file:///x"])
def test_only_exact_versions(loose: str) -> None:
    with pytest.raises(ValueError, match="NAME==VERSION"):
        Environment("t", (loose,))


def test_lines_of_a_requirements_file() -> None:
    assert requirements("# pins\na==1  # why\n\n b==2\n") == ("a==1", "b==2")


def test_a_tool_that_fails_shows_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text("import sys\nfor i in range(30): print('line', i)\nprint('broken', file=sys.stderr)\nsys.exit(3)")
    with pytest.raises(ToolError, match=r"(?s)ended with code 3:.*  line 29\n  broken") as caught:
        environments.run(HERE, script, [], log=tmp_path / "tool.log")
    assert "line 12" not in caught.value.message and str(tmp_path / "tool.log") in caught.value.hint
    assert "line 0\n" in (tmp_path / "tool.log").read_text()


def test_what_a_tool_leaves_running_ends_with_it(tmp_path: Path) -> None:
    script = tmp_path / "tool.py"
    script.write_text("import subprocess\nprint('PID', subprocess.Popen(['sleep', '600']).pid)\n")
    environments.run(HERE, script, [], log=tmp_path / "log")
    assert gone(int((tmp_path / "log").read_text().split()[1]))


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_tool_ends_with_whoever_started_it(sign: signal.Signals, tmp_path: Path) -> None:
    script, log = tmp_path / "tool.py", tmp_path / "log"
    script.write_text("import os, time\nprint('PID', os.getpid())\ntime.sleep(600)\n")
    code = (
        "import signal, sys; from pathlib import Path; from slmops.store import environments\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"environments.run(Path(sys.executable), Path({str(script)!r}), [], log=Path({str(log)!r}))"
    )
    process = subprocess.Popen([HERE, "-c", code], stderr=subprocess.PIPE, text=True)
    while not (log.is_file() and "PID" in log.read_text()):
        time.sleep(0.01)
        assert process.poll() is None
    pid = int(log.read_text().split()[1])
    process.send_signal(sign)
    _, said = process.communicate(timeout=20)
    assert gone(pid)
    assert process.returncode == -sign
    assert ("KeyboardInterrupt" in said) == (sign == signal.SIGINT)


def test_the_command_lists_and_removes(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "environments"]) == 0
    assert "no environments in" in capsys.readouterr().out
    pretend(TOOL)
    (cache / "half-made" / "bin").mkdir(parents=True)
    assert main(["cache", "environments"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["environment", "half", "tiny-tool"] and "cut off" in lines[1]
    assert main(["cache", "environments", "--remove", "nothing"]) == 2
    assert main(["cache", "environments", "--remove", "tiny-tool"]) == 0
    assert [one.name for one in environments.all_found()] == ["half"]
    assert main(["cache", "environments", "--remove", "all"]) == 0
    assert environments.all_found() == []
