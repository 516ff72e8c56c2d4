"""What `slmops pull` takes, what it refuses by name, and what it leaves on the disk."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("huggingface_hub", reason="needs the extra `hub`")

from slmops.catalog import check, source
from slmops.catalog.hub import Hub as RealHub
from slmops.catalog.pull import Plan, Wish, get, plan
from slmops.catalog.transfer import LARGEST_HEADER, Pace, refuse_head
from slmops.cli.main import main
from slmops.errors import ModelError, RefusedError, UnreachableError
from tests.catalog.models import CONFIG, LARGE, PARTS, contents
from tests.catalog.test_pull_faults import start
from tests.hub_stand_in import Fault, Hub, tensors

ONE = {"config.json": CONFIG, "tokenizer.json": b"{}", "model.safetensors": tensors(b"0", 3000)}
Stand = tuple[Hub, str]


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Stand]:
    """A hub, which is also the one of the environment; whose cache is empty."""
    hub = Hub(ONE, "models", {"acme/gated": (401, "GatedRepo"), "acme/none": (404, "RepoNotFound")})
    with hub.serve() as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("SLMOPS_MODELS", str(tmp_path / "cache"))
        for name in ("HF_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        yield hub, url


def ask(target: Path, text: str = "hf:acme/desk", pace: Pace = Pace(sleep=lambda s: None), **wish: Any) -> Plan:
    return plan(source.parse(text), Wish(**{"run": False, **wish}), target, pace=pace)


def pull(target: Path, text: str = "hf:acme/desk", pace: Pace = Pace(sleep=lambda s: None), **wish: Any) -> int:
    """Bytes that were fetched."""
    return int(get(ask(target, text, pace, **wish), pace=pace)["fetched"])


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("../../etc/passwd", "`..`"), ("a/../../b.json", "`..`"), ("/etc/passwd", "an absolute name"),
        ("C:/b.json", "an absolute name"), ("a\\..\\b.json", "a backslash"), ("a\x00b.json", "a control character"),
        ("a\x9bb.json", "a control character"),
        ("a\u202eb.json", "a control character"),
        ("a//b.json", "an empty part"), (".git/config", "git itself"), ("x" * 256 + ".json", "a name longer"),
        ("/".join(["x" * 200] * 6), "a name longer"), ("config.json/x", "both a file and a folder"), ("a\ud800", "not Unicode"),
    ],
)  # fmt: skip
def test_a_repository_with_an_unsafe_name_is_refused_by_name(
    name: str, says: str, stand: Stand, tmp_path: Path
) -> None:
    hub, _url = stand
    hub.files = {**ONE, name: b"x"} if name.isascii() else ONE
    hub.about = {} if name.isascii() else {"siblings": [{"rfilename": name, "size": 1, "blobId": "a" * 40}]}
    with pytest.raises(RefusedError, match=says) as caught:
        pull(tmp_path / "out")
    shown = "config.json" if "config.json" in name else name[:40]
    assert ascii(shown)[1:-1] in caught.value.message and "acme/desk" in caught.value.message
    assert not hub.spans and not list(tmp_path.iterdir())


def npz(members: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return made.getvalue()


def gguf(tensor_count: int = 0, entries: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensor_count, entries) + rest


def index(**where: str) -> bytes:
    return json.dumps({"weight_map": where}).encode()


NO_WEIGHTS = {name: body for name, body in ONE.items() if name != "model.safetensors"}
HEADER = json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
MINE = json.dumps({"model_type": "mine", "auto_map": {"AutoModel": "modeling_mine.Mine"}}).encode()


def packed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def tensor(**change: Any) -> bytes:
    return json.dumps({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} | change}).encode()


def session(options: Any) -> bytes:
    return json.dumps({"model": {"decoder": {"session_options": options}}}).encode()


SESSIONS: list[tuple[Any, str]] = [
    ({"enable_profiling": "/tmp/x"}, "session_options.'enable_profiling'"),
    ({"ep.context_file_path": "x"}, "session_options.'ep.context_file_path'"),
    ({"provider_options": [{"RyzenAI": {}}]}, "asks for the provider"),
    ({"provider_options": [{"QNN": {"backend_path": "x.so"}}]}, "asks for the provider"),
    ([], "another kind than an object"),
]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({**NO_WEIGHTS, "pytorch_model.bin": b"x"}, "pickles: pytorch_model.bin"),
        pytest.param({**ONE, "config.json": MINE, "modeling_mine.py": b"1/0"}, r"its own code: modeling_mine\.py", marks=pytest.mark.slow),
        ({**ONE, "config.json": b"../../../etc/passwd"}, r"config\.json: a symbolic link to .*etc/passwd"),
        ({**ONE, "model.safetensors": packed(b"{}", length=10_000_000_000)}, r"model\.safetensors: a safetensors header of 10000000000"),
        ({**ONE, "model.safetensors": b"abc"}, "a safetensors header of"),
        ({**ONE, "model.safetensors": packed(b"[1" * 9)}, "its header is not JSON"),
        ({**ONE, "model.safetensors": packed(HEADER, b"12345")}, "4 bytes, and it holds 5"),
        ({**ONE, "model.safetensors": packed(tensor(shape=[2**40, 2**40]), b"1234")}, "is not 4 bytes of U8"),
        ({**ONE, "model.safetensors": packed(tensor(data_offsets=[4, 8]), b"12345678")}, "overlap or leave a gap"),
        ({**ONE, "model.safetensors": packed(tensor(dtype="X"), b"1234")}, "nothing sound of 'a'"),
        ({**ONE, "model.safetensors.index.json": index(a="../../a.safetensors")}, r"index\.json names '../../a"),
        ({**LARGE, "model.safetensors.index.json": index(a="model-00003-of-00003.safetensors")}, "names 'model-00003.*not there"),
        ({**ONE, "model.safetensors.index.json": index(b="model.safetensors")}, "holds no 'b'"),
        ({**NO_WEIGHTS, "a.gguf": b"PK\x03\x04"}, r"a\.gguf: it does not begin as GGUF"),
        ({**NO_WEIGHTS, "a.gguf": gguf(2**60)}, r"a\.gguf: says it has 1152921504606846976 tensors"),
        ({**NO_WEIGHTS, "a.gguf": gguf(0, 1, struct.pack("<Q", 2**50))}, "bytes of a string"),
        ({**NO_WEIGHTS, "a.gguf": gguf(1, 0, struct.pack("<Q1sIQIQ", 1, b"a", 1, 4, 0, 99))}, "ends before its tensors"),
        ({"model.onnx": b"x", "genai_config.json": b'{"model": {"session_options": {"custom_ops_library": "x.so"}}}'},
         "its own code: genai_config.json"),
        *[({"model.onnx": b"x", "genai_config.json": session(options)}, says) for options, says in SESSIONS],
        ({**ONE, "model.safetensors": packed(tensor(shape="4"), b"1234")}, "nothing sound of 'a'"),
        ({**ONE, "model.safetensors": packed(tensor(shape=[1e400]), b"1234")}, "nothing sound of 'a'"),
        ({**ONE, "model.safetensors": packed(tensor(shape=[1] * 99), b"1234")}, "nothing sound of 'a'"),
        ({"README.md": b""}, "no weights in it"),
    ],
)  # fmt: skip
def test_what_is_not_a_sound_model_is_refused_by_name(
    files: dict[str, bytes], says: str, stand: Stand, tmp_path: Path
) -> None:
    hub, _url = stand
    hub.files = files
    with pytest.raises(ModelError, match=says) as caught:
        pull(tmp_path / "out")
    assert caught.value.hint and not list(tmp_path.iterdir()), "nothing of it stays"


def test_a_header_of_ten_gigabytes_is_refused_at_its_first_bytes() -> None:
    """Also where the file is large enough for it."""
    refuse_head("a.safetensors", 20_000_000_000, struct.pack("<Q", LARGEST_HEADER), "it")
    with pytest.raises(RefusedError, match="header of 10000000000 bytes"):
        refuse_head("a.safetensors", 20_000_000_000, struct.pack("<Q", 10_000_000_000), "it")


@pytest.mark.slow
def test_code_that_only_some_tools_want_is_left_out(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    known = json.dumps({**json.loads(CONFIG), "auto_map": {"AutoModel": "modeling_llama.X"}}).encode()
    hub.files = {
        **ONE,
        "config.json": known,
        "modeling_llama.py": b"1/0",
        "training_args.bin": b"x",
        "a/model.onnx": b"x",
    }
    planned = ask(tmp_path / "out")
    reasons = dict(planned.choice.left_out)
    assert "--allow-code" in reasons["modeling_llama.py"] and "--allow-pickle" in reasons["training_args.bin"]
    assert "--only" in reasons["a/model.onnx"]
    get(planned)
    assert set(contents(tmp_path / "out")) == set(ONE)
    hub.files = {**hub.files, "config.json": MINE}
    pull(tmp_path / "mine", code=True)
    assert set(contents(tmp_path / "mine")) == {*ONE, "modeling_llama.py"}


def test_pickles_for_who_asks_and_no_bombs(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    hub.files = {**NO_WEIGHTS, "weights.npz": npz({"a.npy": os.urandom(5000)}), "optimizer.pt": b"x"}
    pull(tmp_path / "out", pickles=True)
    assert set(contents(tmp_path / "out")) == {*NO_WEIGHTS, "weights.npz"}
    for members, says in (({"a.npy": bytes(10**7)}, "zip bomb"), ({"../a.npy": b"x"}, r"the name '\.\./a\.npy'")):
        hub.files = {**NO_WEIGHTS, "weights.npz": npz(members)}
        with pytest.raises(RefusedError, match=f"weights.npz: refused.*{says}"):
            pull(tmp_path / "bomb", pickles=True)
        assert not (tmp_path / "bomb").exists()


# --------------------------------------------------------------------------------------------------------------- choice


def test_one_of_several_is_asked_for(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    body = gguf(0, 0, bytes(64))
    hub.files = {"README.md": b"", "m-Q4_K_M.gguf": body, "m-Q8_0.gguf": body + b"8", "mmproj-m.gguf": body + b"m"}
    with pytest.raises(ModelError, match=r"(?s)several GGUF files.*m-Q4_K_M\.gguf.*m-Q8_0\.gguf") as caught:
        pull(tmp_path / "out")
    assert "--only" in caught.value.hint and not hub.spans
    pull(tmp_path / "out", only=("*Q4_K_M*",))
    assert set(contents(tmp_path / "out")) == {"README.md", "m-Q4_K_M.gguf"}
    assert pull(tmp_path / "out", only=("*Q8_0*",)) == len(body) + 1
    assert set(contents(tmp_path / "out")) == {"README.md", "m-Q4_K_M.gguf", "m-Q8_0.gguf"}, "the first stays"
    with pytest.raises(ModelError, match=r"no weights match \*Q2\*"):
        pull(tmp_path / "out", only=("*Q2*",))


def test_onnx_of_one_folder(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    folder = {"cpu/genai_config.json": b"{}", "cpu/model.onnx": b"a", "cpu/model.onnx.data": b"b"}
    hub.files = {"README.md": b"", "config.json": CONFIG, **folder}
    pull(tmp_path / "out")
    assert set(contents(tmp_path / "out")) == set(hub.files)
    hub.files = {**hub.files, "gpu/model.onnx": b"c"}
    with pytest.raises(ModelError, match=r"(?s)several ONNX models.*cpu/\*"):
        pull(tmp_path / "other")
    pull(tmp_path / "other", only=("gpu/*",))
    assert set(contents(tmp_path / "other")) == {"README.md", "config.json", "gpu/model.onnx"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("hf:a/../b", "not the name"), ("hf:acme/desk@../x", "not the name"), ("hf:acme/desk/more", "not the name"),
        ("./none", "is not there"), ("desk", "neither a path nor"),
    ],
)  # fmt: skip
def test_what_cannot_be_named(text: str, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        source.parse(text)
    assert "hf:ORG/NAME" in caught.value.hint


# ------------------------------------------------------------------------------------------------------ again and again


def test_a_link_stays_and_what_it_leads_to_is_filled(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    disk, link = tmp_path / "disk" / "model", tmp_path / "link"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    pull(link)
    hub.files = {**hub.files, "LICENSE": b"new"}
    hub.commit = "f" * 40
    pull(link)
    assert link.is_symlink() and set(contents(disk)) == set(hub.files)
    assert {path.name for path in tmp_path.rglob("*")} >= {"disk", "link"} and not list(tmp_path.rglob(".*.pull"))


def test_a_record_that_no_pull_wrote_is_none(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    hub.files = {**hub.files, ".slmops-pull.json": b"{}"}
    pull(tmp_path / "out")
    assert pull(tmp_path / "out") == 0, "the file of the repository is not taken for the record"
    record = tmp_path / "out" / ".slmops-pull.json"
    for change in ({"name": "../../x"}, {"size": "1"}, {"digest": "../x"}, {"kind": 5}):
        found = json.loads(record.read_text())
        found["files"][0] |= change
        (tmp_path / "odd").mkdir()
        (tmp_path / "odd" / ".slmops-pull.json").write_text(json.dumps(found))
        assert pull(tmp_path / "odd") > 0 and set(contents(tmp_path / "odd")) == set(contents(tmp_path / "out"))
        shutil.rmtree(tmp_path / "odd")


def test_only_what_is_damaged_or_gone_is_fetched_again(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    hub.files, out = LARGE, tmp_path / "out"
    total = sum(map(len, {*LARGE.values()}))
    assert pull(out) == total
    assert pull(out) == 0
    (out / "LICENSE").touch()
    assert pull(out) == 0, "a newer time alone is no damage"
    part = out / PARTS[1]
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    (out / "tokenizer.json").unlink()
    assert pull(out) == len(LARGE[PARTS[1]]) + len(LARGE["tokenizer.json"])
    assert contents(out) == LARGE


def test_what_others_put_there_is_not_lost(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    out = tmp_path / "out"
    pull(out)
    (out / "notes.txt").write_text("mine")
    assert pull(out) == 0
    hub.files, hub.commit = {**ONE, "LICENSE": b"new"}, "b" * 40
    with pytest.raises(ModelError, match=r"holds notes\.txt"):
        pull(out)
    assert (out / "notes.txt").read_text() == "mine" and "LICENSE" not in contents(out)
    (out / "notes.txt").unlink()
    assert pull(out) == 3


def test_offline_takes_what_is_there(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pull(tmp_path / "out")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    planned = ask(tmp_path / "out")
    assert planned.current and "HF_HUB_OFFLINE" in planned.unreachable
    with pytest.raises(UnreachableError, match="HF_HUB_OFFLINE is set"):
        ask(tmp_path / "other")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert ask(tmp_path / "out").current
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(UnreachableError, match=r"cannot be reached at http://127\.0\.0\.1:9") as caught:
        ask(tmp_path / "out")
    assert "HF_ENDPOINT" in caught.value.hint


@pytest.mark.slow
def test_two_at_once(stand: Stand, tmp_path: Path) -> None:
    """The second waits, and then finds everything there."""
    hub, url = stand
    hub.files = LARGE
    held: list[Fault | None] = [Fault("stall", 9)]
    hub.fault = lambda name, start: held.pop() if name == PARTS[0] and held else None
    both = [start(url, tmp_path / "out", 0) for _ in range(2)]
    assert hub.stalled.wait(30)
    assert not (tmp_path / "out").exists()
    both[0].join(2)
    assert both[0].is_alive() and both[1].is_alive()
    hub.freed.set()
    for process in both:
        process.join(30)
        assert process.exitcode == 0
    assert contents(tmp_path / "out") == LARGE
    assert sum(sent for _name, _start, sent, _right in hub.spans) == sum(map(len, {*LARGE.values()}))


# -------------------------------------------------------------------------------------------------- what the hub answers


def test_access(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gated model is listed to everybody; its files are not given to everybody."""
    hub, _url = stand
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.about = {"gated": "auto", "cardData": {"license": "gemma"}}
    hub.fault = lambda name, start: Fault("status", 403, {"X-Error-Code": "GatedRepo"}) if name else None
    planned = ask(tmp_path / "out")
    assert planned.listing.gated and planned.listing.licence == "gemma"
    with pytest.raises(ModelError, match="the model is gated") as caught:
        get(planned)
    assert "HF_TOKEN" in caught.value.hint
    assert set(hub.tokens) == {"Bearer hf_secret"}
    hub.fault = lambda name, start: Fault(
        "status", 401, {"X-Error-Message": "Invalid credentials in Authorization header"}
    )
    with pytest.raises(ModelError, match="does not accept the token"):
        ask(tmp_path / "out")


def test_the_hub_is_given_the_time_it_asks_for(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    slept: list[float] = []
    answers = [{"Retry-After": "7"}, {"RateLimit": '"resolvers";r=0;t=11'}, {}]
    hub.fault = lambda name, start: Fault("status", 429, answers.pop(0)) if answers else None
    pull(tmp_path / "out", pace=Pace(sleep=slept.append))
    assert sum(slept) == pytest.approx(7 + 11 + 2, abs=1)
    for name in ("", "config.json"):
        hub.fault = lambda asked, start, name=name: (
            Fault("status", 429, {"Retry-After": "3600"}) if asked == name else None
        )  # type: ignore[misc]
        with pytest.raises(ModelError, match="429") as caught:
            pull(tmp_path / "later", pace=Pace(sleep=slept.append))
        assert "run again in 3600 s" in caught.value.hint
    assert sum(slept) < 25, "an hour is not waited for"


def test_a_mirror_that_does_not_serve_parts(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    faults: list[Fault] = [Fault("cut", 1000), Fault("whole")]
    hub.fault = lambda name, start: faults.pop(0) if name == "model.safetensors" and faults else None
    pull(tmp_path / "out")
    assert contents(tmp_path / "out") == ONE and not faults
    hub.fault = lambda name, start: Fault("whole") if name == "model.safetensors" else None
    with pytest.raises(ModelError, match="does not serve parts of files"):
        pull(tmp_path / "other", pace=Pace(segment=1024))


def test_no_room(stand: Stand, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is fetched."""
    hub, _url = stand
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 16 << 20}))
    from slmops.errors import ResourceError

    with pytest.raises(ResourceError, match=r"0\.0 MB are still to come.*16\.8 MB free"):
        ask(tmp_path / "out")
    assert not hub.spans


# -------------------------------------------------------------------------------------------------------------- folders


def test_from_a_folder(tmp_path: Path) -> None:
    """As a hub cache has it: names are links into `blobs`."""
    root = tmp_path / "models--acme--desk"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for name, body in LARGE.items():
        (root / "blobs" / name).write_bytes(body)
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    (snapshot / "a.bin").write_bytes(b"pickle")
    out = tmp_path / "out"
    assert pull(out, str(snapshot)) > 0
    assert contents(out) == LARGE and not any(path.is_symlink() for path in out.iterdir())
    assert pull(out, str(snapshot)) == 0
    (root / "blobs" / "LICENSE").write_bytes(b"other")
    assert pull(out, str(snapshot)) == 5
    (snapshot / "passwd.json").symlink_to("/etc/passwd")
    with pytest.raises(RefusedError, match=r"passwd\.json: a symbolic link to /etc/passwd"):
        pull(out, str(snapshot))
    with pytest.raises(ModelError, match="is where the model is already"):
        pull(snapshot / "inner", str(snapshot))


# --------------------------------------------------------------------------------------------------- the command, loaded


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["pull", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_what_a_dry_run_shows(stand: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub, url = stand
    hub.files = {**ONE, "pytorch_model.bin": b"x", "mine.py": b"x"}
    hub.about = {"tags": ["license:mit"]}
    code, out, err = run(capsys, "acme/desk", "--dry-run", "--json")
    found = json.loads(out)
    assert code == 0 and not hub.spans and not (tmp_path / "cache").exists()
    assert found["licence"] == "mit" and found["bytes"] == sum(map(len, ONE.values())) and not found["current"]
    assert found["folder"] == str(tmp_path / "cache" / "hub" / "acme" / "desk")
    assert {entry["name"]: len(entry.get("sha256", entry.get("git", ""))) for entry in found["files"]} == {
        "config.json": 40, "tokenizer.json": 40, "model.safetensors": 64,
    }  # fmt: skip
    assert {entry["name"] for entry in found["left_out"]} == {"pytorch_model.bin", "mine.py"}
    for shown in (
        f"commit {'a' * 12}",
        url,
        "mit",
        "3.1 kB in 3 files (safetensors)",
        "pytorch_model.bin",
        "--allow-code",
    ):
        assert shown in err


def test_a_terminal_is_asked(
    stand: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, _url = stand
    for answer, fetched in (("n\n", False), ("\n", True)):
        terminal = io.StringIO(answer)
        monkeypatch.setattr(terminal, "isatty", lambda: True)
        monkeypatch.setattr("sys.stdin", terminal)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        code, out, err = run(capsys, "acme/desk", "--no-check")
        assert "fetch it?" in err and bool(hub.spans) == fetched and (code == 0) == fetched
    assert out.strip() == str(tmp_path / "cache" / "hub" / "acme" / "desk")
    assert contents(Path(out.strip())) == ONE


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["torch", "llama_cpp", "onnx_genai"])
def test_what_is_left_loads_offline_by_the_loader_of_each_runtime(
    runtime: Any, stand: Stand, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip({"torch": "torch"}.get(runtime, {"onnx_genai": "onnxruntime_genai"}.get(runtime, runtime)))
    from slmops.engines import open_engine
    from slmops.engines.minimal import write_minimal

    hub, _url = stand
    (tmp_path / "made").mkdir()
    write_minimal(tmp_path / "made", runtime)
    hub.files = contents(tmp_path / "made")
    if runtime == "llama_cpp":  # as repositories of GGUF have it
        hub.files = {"config.json": CONFIG, "README.md": b"", "desk-Q4_K_M.gguf": hub.files["model.gguf"]}
    code, out, err = run(capsys, "hf:acme/desk@main", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["checked"]["vocabulary"] == 261 and found["checked"]["tokens"] > 20
    folder = Path(found["folder"])
    before = len(hub.spans)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    LOADERS[runtime](folder)
    engine = open_engine(folder)
    assert engine.encode([{"role": "user", "content": "hello"}])
    engine.close()
    monkeypatch.delenv("HF_HUB_OFFLINE")
    code, out, err = run(capsys, "hf:acme/desk@main")
    assert code == 0 and out.strip() == str(folder) and "nothing to fetch" in err
    assert len(hub.spans) == before, "a second pull moves no bytes"


def _transformers(folder: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert model.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=3).shape[1] > 5


def _llama_cpp(folder: Path) -> None:
    import llama_cpp

    model = llama_cpp.Llama(str(folder / "desk-Q4_K_M.gguf"), n_ctx=64, verbose=False)
    assert model.create_completion("hello", max_tokens=3)["usage"]["prompt_tokens"] >= 5  # type: ignore[index]


def _genai(folder: Path) -> None:
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=16)
    generator = genai.Generator(model, params)
    generator.append_tokens([list(genai.Tokenizer(model).encode("hello"))])
    generator.generate_next_token()
    assert len(generator.get_sequence(0)) == 6


LOADERS: dict[str, Callable[[Path], None]] = {
    "torch": _transformers, "llama_cpp": _llama_cpp, "onnx_genai": _genai
}  # fmt: skip


@pytest.mark.slow
def test_a_model_that_does_not_work_is_told_from_one_that_does(stand: Stand, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import torch
    from safetensors.torch import load_file, save_file

    from slmops.engines.minimal import write_minimal

    hub, _url = stand
    (tmp_path / "made").mkdir()
    write_minimal(tmp_path / "made", "torch")
    good = contents(tmp_path / "made")
    config = json.loads(good["config.json"])
    weights = load_file(tmp_path / "made" / "model.safetensors")

    def saved(change: dict[str, torch.Tensor]) -> bytes:
        save_file({**weights, **change}, tmp_path / "bad.safetensors", {"format": "pt"})
        return (tmp_path / "bad.safetensors").read_bytes()

    norm = weights["model.norm.weight"]
    cases = [
        (
            {"config.json": json.dumps({**config, "intermediate_size": 64}).encode()},
            r"_proj\.weight is \(32, 32\), and config\.json makes it \((64, 32|32, 64)\)",
        ),
        ({"model.safetensors": saved({"model.norm.weight": norm * float("nan")})}, "are not numbers"),
    ]  # fmt: skip
    for number, (change, says) in enumerate(cases):
        hub.files = {**good, **change}
        with pytest.raises(ModelError, match=says) as caught:
            pull(tmp_path / str(number), run=True)
        assert "--no-check" in caught.value.hint and not (tmp_path / str(number)).exists()
        before = len(hub.spans)
        assert pull(tmp_path / str(number)) == 0 and len(hub.spans) == before, "its bytes were kept"


def test_a_tokenizer_gives_texts_back() -> None:
    """Spaces and case may go, letters may not."""
    from slmops.catalog.one_pass import _round_trip

    def encode(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(ids: list[int]) -> str:
        return "".join(map(chr, ids))

    assert len(_round_trip(encode, decode, 2**17)) > 40
    _round_trip(encode, lambda ids: decode(ids).replace(" ", "").upper(), 2**17)
    with pytest.raises(ValueError, match="makes id 26481, and the model has 256"):
        _round_trip(encode, decode, 256)
    with pytest.raises(ValueError, match="its tokenizer makes 'Te 3ettles"):
        _round_trip(encode, lambda ids: "Te 3ettles", 2**17)
    with pytest.raises(ValueError, match="makes nothing of"):
        _round_trip(lambda text: [], decode, 2**17)


def test_what_was_pulled_is_not_fetched_for_a_project(stand: Stand, tmp_path: Path) -> None:
    from slmops.catalog import fetch
    from slmops.catalog import pull as pulls
    from slmops.core.method import Context

    hub, _url = stand
    pull(pulls.place(source.parse("hf:acme/desk")))
    before = len(hub.spans)
    (tmp_path / "out").mkdir()
    context = Context(seed=0, scratch=tmp_path / "scratch", shared=tmp_path / "shared")
    fetch.run(fetch.Params(model="hf:acme/desk"), {}, tmp_path / "out", context)
    assert contents(tmp_path / "out") == ONE and len(hub.spans) == before
    (tmp_path / "cache" / "hub" / "acme" / "desk" / "config.json").write_text("{}")
    (tmp_path / "again").mkdir()
    context = Context(seed=0, scratch=tmp_path / "scratch2", shared=tmp_path / "shared")
    fetch.run(fetch.Params(model="hf:acme/desk"), {}, tmp_path / "again", context)
    assert contents(tmp_path / "again") == ONE and {name for name, *_rest in hub.spans[before:]} == {"config.json"}


def test_nothing_that_a_terminal_obeys_and_no_password_is_shown(
    stand: Stand, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, url = stand
    hub.about = {"cardData": {"license": "mit\x1b[2J\nlicence   mit"}}
    monkeypatch.setenv("HF_ENDPOINT", url.replace("//", "//me:secret@"))
    code, out, err = run(capsys, "acme/desk", "--dry-run", "--json")
    assert code == 0 and "\x1b" not in err and "secret" not in out + err
    assert json.loads(out)["licence"] == "mit[2Jlicence   mit"


def test_gguf_entries_are_read_to_their_end(tmp_path: Path) -> None:
    """Lists, strings and numbers before the tensors."""
    text = struct.pack("<Q1sIQ2s", 1, b"k", 8, 2, b"hi")
    listed = struct.pack("<Q1sIIQ", 1, b"l", 9, 8, 2) + struct.pack("<Q1s", 1, b"x") * 2
    numbers = struct.pack("<Q1sIIQ", 1, b"n", 9, 5, 3) + bytes(12)
    entry = struct.pack("<Q1sIQIQ", 1, b"a", 1, 4, 0, 0)
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf(1, 3, text + listed + numbers + entry) + bytes(32))
    assert check.gguf_header(path, "a") == 1
    path.write_bytes(gguf(1, 3, text + listed + numbers + entry)[:-3])
    with pytest.raises(RefusedError, match="ends in its header"):
        check.gguf_header(path, "a")


def test_an_endpoint_that_is_no_hub(stand: Stand, tmp_path: Path) -> None:
    hub, _url = stand
    hub.about = {"siblings": [{"rfilename": "config.json"}]}
    with pytest.raises(ModelError, match=r"states no size or checksum of config\.json") as caught:
        ask(tmp_path / "out")
    assert "HF_ENDPOINT" in caught.value.hint
    assert RealHub("http://x/").endpoint == "http://x"
