"""What a person types and sees."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

import fastattr
from fastattr.cli import main
from fastattr.demo import scenes
from tests.engine.samples import make_attribution

SEED = 30_000_000


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    scenes.make_scene(SEED).image.save(path)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *words: object) -> int:
    """Exit code of `fastattr WORDS...`."""
    monkeypatch.setattr(sys, "argv", ["fastattr", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


def test_demo_writes_a_report_and_names_what_it_sees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo.html"
    assert run(monkeypatch, "demo", "--out", out, "--seed", SEED, "--no-open") == 0
    shown, progress = capsys.readouterr()
    assert progress.splitlines() == [
        "loading shapes on cpu",
        *(f"explaining ({name})" for name in ("best", "arc", "tam", "lens")),
    ]
    truth = scenes.make_scene(SEED).objects
    assert any(item.shape in shown for item in truth)
    assert str(out) in shown
    assert "<html" in out.read_text()


def test_the_best_method_is_asked_for_by_name(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.safetensors"
    words = ("explain", picture, "--response", "A red circle.", "--method", "best", "--scales", "1,2", "--out", out)
    assert run(monkeypatch, *words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["scales"] == [1.0, 2.0]
    config = fastattr.Attribution.load(out).config
    assert (config.method, config.scale_mean, config.regions) == ("arc", "geometric", 6)


@pytest.mark.parametrize("suffix", ["html", "safetensors", "png", "json"])
def test_explain_writes_every_format(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    out = tmp_path / f"x.{suffix}"
    words = ("explain", picture, "--prompt", "List the objects.", "--response", "a red circle.", "--scales", "1,2")
    assert run(monkeypatch, *words, "--out", out, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["response"] == "a red circle."
    assert printed["scales"] == [1.0, 2.0]
    assert [token["token"] for token in printed["tokens"]] == ["a", " red", " circle", "."]
    assert all(token["evidence"] is not None for token in printed["tokens"])
    if suffix == "safetensors":
        assert fastattr.Attribution.load(out).response == "a red circle."
    elif suffix == "json":
        stored = json.loads(out.read_text())
        assert [len(stored["image"][0]), len(stored["context"])] == [4, 4]
    elif suffix == "png":
        with Image.open(out) as sheet:
            assert sheet.width > 100


def test_several_methods_make_one_report(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("explain", picture, "--response", "a circle", "--scales", "1", "--method", "arc,tam", "--method", "lens")
    assert run(monkeypatch, *words, "--out", tmp_path / "x.HTML") == 0
    page = (tmp_path / "x.HTML").read_text()
    assert "arc" in page and "tam" in page and "lens" in page
    assert run(monkeypatch, *words, "--out", tmp_path / "x.png") == 2


def test_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved = make_attribution().save(tmp_path / "x.safetensors")
    assert run(monkeypatch, "show", saved, "--out", tmp_path / "x.html") == 0
    shown = capsys.readouterr().out
    assert "A red circle and a red circle." in shown
    assert "note: made up" in shown
    assert (tmp_path / "x.html").stat().st_size > 1000


def test_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "models") == 0
    table = capsys.readouterr().out
    assert "qwen2_vl" in table and "gemma3" in table
    assert run(monkeypatch, "models", "--json") == 0
    rows = {row["model_type"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["gemma3"]["scales"] == "1"
    assert rows["qwen2_5_vl"]["scales"] == "any"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("explain", "{picture}", "--scales", "1,x"), "--scales is '1,x', expected numbers"),
        (("explain", "{picture}", "--scales", "0"), "scales holds 0.0, expected numbers above 0"),
        (("explain", "{picture}", "--out", "x.txt"), "ends in '.txt', expected .html, .safetensors, .png or .json"),
        (
            (
                "explain",
                "missing.png",
            ),
            "image 'missing.png' is not a file",
        ),
        (
            ("explain", "{picture}", "--model", "no-such-folder/model"),
            "no model can be loaded from 'no-such-folder/model'",
        ),
        (("explain", "{picture}", "--model", "./nowhere"), "a hub id: there is no such directory"),
        (("explain", "{picture}", "--model", "shape"), "there is no model 'shape'; did you mean 'shapes'?"),
        (("show", "{picture}"), "expected a .safetensors file that Attribution.save wrote"),
        (("explain", "{picture}", "--prompt", " "), "the prompt is ' ', expected some text"),
        (("explain", "{picture}", "--out", "missing/x.html", "--response", "a"), "'missing/x.html' cannot be written"),
        (("show", "missing.safetensors"), "'missing.safetensors' is not a file"),
        (
            ("show", "missing.safetensors", "--out", "missing/x.html"),
            "'missing/x.html' cannot be written: No such file",
        ),
        (("explain", "{picture}", "--prompt", ""), "the prompt is '', expected some text"),
        (("explain", "{picture}", "--response", " "), "--response is ' ', expected some text"),
        (("explain", "{picture}", "--messages", "missing.json"), "'missing.json' cannot be read as a conversation"),
        (("explain", "{picture}", "--device", "abacus"), "--device is 'abacus', which cannot be used here"),
        (("explain", "{picture}", "--device", "cuda:77"), "--device is 'cuda:77', which cannot be used here"),
        (("eval", "scenes", "--prompt", ""), "--prompt is '', expected some text"),
        (("eval", "scenes", "--calibration", "missing/c.json"), "'missing/c.json' cannot be written"),
        (("eval", "scenes", "--device", "abacus"), "--device is 'abacus'"),
        (("eval", "nowhere"), "there is no dataset 'nowhere'"),
        (("demo", "--out", "missing/x.html"), "'missing/x.html' cannot be written"),
        (("demo", "--out", "x.png"), "'x.png' holds one method; got 4"),
        (("worker", "missing", "--model", "shapes"), "give the spool directory that a logger uses"),
        (("bench", "--out", "missing/x.jsonl"), "'missing/x.jsonl' cannot be written"),
    ],
)
def test_errors_are_one_clear_line(
    tmp_path: Path,
    picture: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(word.format(picture=picture) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["scene.png"]


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert {"demo", "explain", "show", "models"} <= set(shown.split())
    assert "..." not in shown.partition("Commands:")[2], "a command's first line is too long for the list"


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"fastattr {version('fastattr')}\n"


def test_help_imports_neither_torch_nor_transformers() -> None:
    """The help of every command and subcommand."""
    code = (
        "import sys\n"
        "from typer.main import get_command\n"
        "from typer.testing import CliRunner\n"
        "from fastattr.cli import app\n"
        "def paths(command, path=()):\n"
        "    yield path\n"
        "    for name, each in getattr(command, 'commands', {}).items():\n"
        "        yield from paths(each, (*path, name))\n"
        "asked = list(paths(get_command(app)))\n"
        "assert len(asked) > 15, asked\n"
        "for path in asked:\n"
        "    shown = CliRunner().invoke(app, [*path, '--help'])\n"
        "    assert shown.exit_code == 0 and 'Usage' in shown.output, (path, shown.output)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


LOADING = {
    "explain": ("explain", "{picture}", "--out", "{folder}/x.html"),
    "live": ("explain", "{picture}", "--live", "--out", "{folder}/x.html"),
    "demo": ("demo", "--out", "{folder}/x.html"),
    "eval": ("eval", "scenes", "--n", "1", "--workers", "1", "--out", "{folder}/x.jsonl"),
}


@pytest.mark.parametrize("words", LOADING.values(), ids=LOADING)
def test_device_and_dtype_reach_the_model(
    picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    """Every command that loads a model passes them to `load`; nothing is explained here."""
    asked: list[tuple[str, dict[str, object]]] = []

    def note(name: str, **options: object) -> None:
        asked.append((name, options))
        raise fastattr.InputError("far enough")

    monkeypatch.setattr("fastattr.adapters.load", note)
    monkeypatch.setattr("fastattr.evaluate.running.load", note)
    words = tuple(word.format(picture=picture, folder=picture.parent) for word in words)
    dtype = () if words[0] == "demo" else ("--dtype", "bfloat16")
    trust = ("--trust-remote-code",) if dtype else ()
    assert run(monkeypatch, *words, "--device", "cpu", *dtype, *trust) == 2
    expected = {"device": "cpu", "dtype": "bfloat16", "trust_remote_code": True}
    if not dtype:
        expected = {"device": "cpu", "dtype": "auto", "trust_remote_code": False}
    assert asked == [("shapes", expected)]
    assert "with shapes on cpu" in (said := capsys.readouterr().err) or "loading shapes on cpu" in said


WRONG = {
    "no folder": ("{picture}", "--out", "{folder}/missing/x.html"),
    "a folder": ("{picture}", "--out", "{folder}/folder.html"),
    "suffix": ("{picture}", "--out", "{folder}/x.gif"),
    "methods": ("{picture}", "--out", "{folder}/x.png", "--method", "arc", "--method", "tam"),
    "scales": ("{picture}", "--scales", "0"),
    "prompt": ("{picture}", "--prompt", ""),
    "half a character of an answer": ("{picture}", "--response", "caf\udce9"),
    "half a character": ("{picture}", "--prompt", "caf\udce9"),  # as Python reads an argument that is not UTF-8
    "image": ("{folder}/missing.png",),
    "no picture": ("{folder}/notes.txt",),
    "a broken frame": ("{folder}/frames",),
    "messages": ("--messages", "{folder}/notes.txt"),
    "pictures of messages": ("--messages", "{folder}/chat.json"),
    "device": ("{picture}", "--device", "cuda:77"),
}


@pytest.mark.parametrize("words", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("live", [False, True], ids=["whole", "live"])
def test_wrong_requests_are_refused_before_a_model_is_loaded(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], live: bool
) -> None:
    monkeypatch.setattr("fastattr.adapters.load", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "notes.txt").write_text("shopping list")
    (tmp_path / "frames").mkdir()
    for name in ("1.png", "2.png"):
        (tmp_path / "frames" / name).write_bytes(picture.read_bytes()[: 500 if name == "2.png" else None])
    part = {"type": "image", "image": str(tmp_path / "missing.png")}
    turn = {"role": "user", "content": [part, {"type": "text", "text": "What?"}]}
    (tmp_path / "chat.json").write_text(json.dumps([turn]))
    before = sorted(tmp_path.rglob("*"))
    chosen = [word.format(picture=picture, folder=tmp_path) for word in words]
    assert run(monkeypatch, "explain", *chosen, *(["--live"] if live else [])) == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_pictures_of_a_conversation_lie_beside_its_file(
    tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative paths, whatever the working directory; other ways to give a picture are unchanged."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    maps = []
    for part in (
        {"type": "image", "image": picture.name},
        {"type": "image_url", "image_url": {"url": picture.name}},
        {"type": "image", "path": str(picture)},
        {"type": "image", "base64": base64.b64encode(picture.read_bytes()).decode()},
    ):
        told = tmp_path / "chat.json"
        told.write_text(json.dumps([{"role": "user", "content": [part, {"type": "text", "text": "What?"}]}]))
        out = tmp_path / "x.json"
        assert run(monkeypatch, "explain", "--messages", told, "--response", "a", "--scales", "1", "--out", out) == 0
        assert "knows drawn shapes only; use --model" in capsys.readouterr().err
        maps.append(json.loads(out.read_text())["tokens"])
    assert all(each == maps[0] for each in maps)


def test_a_conversation_with_a_byte_order_mark(tmp_path: Path, picture: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = [{"type": "image", "image": str(picture)}, {"type": "text", "text": "What?"}]
    told = tmp_path / "chat.json"
    told.write_text(json.dumps([{"role": "user", "content": content}]), encoding="utf-8-sig")
    out = tmp_path / "x.json"
    assert run(monkeypatch, "explain", "--messages", told, "--response", "a", "--scales", "1", "--out", out) == 0
    assert json.loads(out.read_text())["prompt"] == "What?"


def test_plots_without_matplotlib_are_refused_before_anything_is_judged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "fastattr.evaluate.plots", raising=False)
    out = tmp_path / "x.jsonl"
    assert run(monkeypatch, "eval", "scenes", "--n", "1", "--out", out) == 2
    told = capsys.readouterr().err
    assert "--no-plots" in told and 'pip install ".[eval]"' in told
    assert not out.exists()


def test_bench_measures_in_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it runs is tested where it is, in `benchmarks/test_suite.py`; here: that it is run, and its verdict kept."""
    asked: list[tuple[list[str], Path]] = []

    def note(command: list[str], *, cwd: Path, check: bool) -> subprocess.CompletedProcess[str]:
        asked.append((command, cwd))
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.chdir(tmp_path)
    checkout = tmp_path / "checkout"
    (checkout / "benchmarks").mkdir(parents=True)
    (checkout / "benchmarks" / "suite.py").touch()
    monkeypatch.setattr(fastattr, "__file__", str(checkout / "fastattr" / "__init__.py"))
    assert run(monkeypatch, "bench", "--smoke", "--out", "here.jsonl") == 3
    ((command, cwd),) = asked
    assert cwd == checkout
    assert command[1:3] == ["-m", "benchmarks.suite"] and "--smoke" in command
    assert command[command.index("--out") + 1] == str(tmp_path / "here.jsonl")


def test_bench_outside_a_checkout_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fastattr, "__file__", str(tmp_path / "fastattr" / "__init__.py"))
    assert run(monkeypatch, "bench") == 2
    assert "clone the repository" in capsys.readouterr().err


def test_a_backend_that_cannot_run_is_one_line(
    picture: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "explain", picture, "--response", "a circle", "--backend", "triton") == 2
    lines = capsys.readouterr().err.splitlines()
    assert "'triton' was asked for, but the tensors are on cpu" in lines[-1]
    assert not any("Traceback" in line for line in lines)


def test_a_live_explanation_is_that_of_the_whole(
    picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line a token while the model answers, then the file; as `explain` without --live, but for rounding."""
    live, whole = (tmp_path / name for name in ("live.json", "whole.json"))
    options = ("explain", picture, "--scales", "1", "--method", "lens")
    assert run(monkeypatch, *options, "--out", whole) == 0
    capsys.readouterr()
    assert run(monkeypatch, *options, "--live", "--out", live) == 0
    shown = capsys.readouterr().out
    ours, expected = json.loads(live.read_text()), json.loads(whole.read_text())
    assert [token["id"] for token in ours["tokens"]] == [token["id"] for token in expected["tokens"]]
    np.testing.assert_allclose(ours["image"], expected["image"], atol=0.05)
    lines = [line.split()[0] for line in shown.splitlines() if line.startswith("'")]
    assert lines == [repr(token["token"].strip()) for token in ours["tokens"]]
    assert ours["response"] in shown
    assert run(monkeypatch, *options, "--live", "--response", "a red circle") == 2
    assert "leave out --response" in capsys.readouterr().err


def test_a_movie_and_a_folder_of_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Given by their names; files of macOS and Windows between frames are skipped, with a message."""
    frames = [scenes.make_scene(SEED + k).image for k in range(4)]
    folder, clip, out = tmp_path / "frames", tmp_path / "clip.mp4", tmp_path / "x.safetensors"
    folder.mkdir()
    with av.open(str(clip), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height = frames[0].size
        for k, frame in enumerate(frames):
            frame.save(folder / f"{k}.png")
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
    for name in ("._0.png", ".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    told = tmp_path / "asked.json"
    parts = [{"type": "video", "path": str(clip), "nframes": 2}, {"type": "text", "text": "Describe the image."}]
    told.write_text(json.dumps([{"role": "user", "content": parts}]))
    options = ("--response", "A red circle.", "--method", "lens", "--scales", "1", "--out", out)
    for words, n_frames in (((folder,), 4), ((clip,), 4), (("--messages", told), 2)):
        assert run(monkeypatch, "explain", *words, *options) == 0
        said = capsys.readouterr().err
        assert ("skipped 4 hidden files or files of macOS or Windows" in said) == (words == (folder,))
        assert fastattr.Attribution.load(out).pictures[0].shape[0] == n_frames
