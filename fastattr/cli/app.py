"""`fastattr demo | explain | show | models | eval | bench | log | worker | batch`."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict, replace
from enum import Enum
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

import fastattr
from fastattr.cli import batch, log, worker
from fastattr.cli.loading import Device, Dtype, DtypeName, Trust, choose_device, load_model
from fastattr.cli.output import (
    SCALES_HELP,
    Json,
    check_output,
    chosen_config,
    print_attributions,
    print_table,
    printable,
    shown_by,
    signed,
    where,
    write,
)
from fastattr.errors import FastattrError, InputError, how_to_install

if TYPE_CHECKING:
    from fastattr.adapters import Model
    from fastattr.chat import Messages

DEFAULT_PROMPT = "Describe the image."
DEMO_METHODS = ("best", "arc", "tam", "lens")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class FillName(str, Enum):
    grey = "grey"
    mean = "mean"
    blur = "blur"


class BackendName(str, Enum):
    auto = "auto"
    triton = "triton"
    torch = "torch"


class ExampleName(str, Enum):
    scene = "scene"
    images = "images"
    clip = "clip"


def _print_version(asked: bool) -> None:
    if asked:
        print(f"fastattr {version('fastattr')}")
        raise typer.Exit


@app.callback()
def fastattr_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """See why a multimodal LLM said each word."""


@app.command()
def demo(
    example: Annotated[
        ExampleName, typer.Option(help="One picture, three over two turns, or a short clip.")
    ] = ExampleName.scene,
    out: Annotated[Path, typer.Option(help="Where to write the report.")] = Path("fastattr-demo.html"),
    seed: Annotated[
        int | None, typer.Option(help="Which scenes; seeds from 10000000 on were never trained on.")
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the report when done.")] = True,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Explain drawn scenes with the bundled model, offline."""
    check_output(out, len(DEMO_METHODS))
    from fastattr.config import method_of
    from fastattr.demo.examples import EXAMPLES

    make = EXAMPLES[example.value]
    shown = make() if seed is None else make(seed)
    _explain(
        images=shown.images,
        prompt=shown.prompt,
        response=None,
        model_name="shapes",
        device=device,
        configs=[method_of(name) for name in DEMO_METHODS],
        out=out,
        max_new_tokens=128,
        as_json=as_json,
        open_browser=open_browser and sys.stdout.isatty(),
    )


@app.command()
def explain(
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Pictures or videos (mp4, webm, ...); a folder is a video, its files in order of their numbers the frames.",
            metavar="IMAGE...",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask; by default 'Describe the image.'")] = None,
    messages: Annotated[
        Path | None,
        typer.Option(
            help="A conversation instead of --prompt: a JSON file with a list of messages, or an object with messages, tools "
            "and template_options; parts may hold paths."
        ),
    ] = None,
    response: Annotated[str | None, typer.Option(help="The answer to explain; the model answers if not given.")] = None,
    model: Annotated[str, typer.Option(help="'shapes', a local directory, or a hub id.")] = "shapes",
    device: Device = None,
    dtype: Dtype = DtypeName.auto,
    trust_remote_code: Trust = False,
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            "--methods",
            help="lens, tam, arc or best, with scales as in tam@1+1.5+2; several are comma-separated, the first is printed. "
            "By default arc; best has the most exact maps and takes 50 more forwards per picture.",
        ),
    ] = None,
    scales: Annotated[str | None, typer.Option(help=SCALES_HELP)] = None,
    out: Annotated[Path, typer.Option(help="x.html, x.safetensors, x.png or x.json.")] = Path("fastattr.html"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    backend: Annotated[BackendName, typer.Option(help="What computes; auto: triton on a GPU.")] = BackendName.auto,
    live: Annotated[bool, typer.Option("--live", help="Print each token as it is said and explained.")] = False,
    as_json: Json = False,
) -> None:
    """Explain what a model says about pictures."""
    if prompt is not None and messages is not None:
        raise InputError("--prompt and --messages both say what is asked, expected one of them")
    if not images and messages is None:
        raise InputError("got no image, expected IMAGE... or --messages whose parts hold them")
    shown = [_frames(path) if path.is_dir() else path for path in images] if images else None
    asked = _read_messages(messages) if messages is not None else DEFAULT_PROMPT if prompt is None else prompt
    names = [name.strip() for given in method or ["arc"] for name in given.split(",") if name.strip()]
    configs = [chosen_config(name, scales, {"backend": backend.value}) for name in names]
    if model == "shapes":
        print("shapes, the bundled model, knows drawn shapes only; use --model for photographs", file=sys.stderr)
    if live:
        if response is not None or len(configs) > 1:
            raise InputError(
                "--live shows one method while the model answers; leave out --response and further methods"
            )
        _explain_live(shown, asked, model, device, dtype, trust_remote_code, configs[0], out, max_new_tokens, as_json)
        return
    _explain(
        images=shown,
        prompt=asked,
        response=response,
        model_name=model,
        device=device,
        dtype=dtype,
        trust=trust_remote_code,
        configs=configs,
        out=out,
        max_new_tokens=max_new_tokens,
        as_json=as_json,
        open_browser=False,
    )


@app.command()
def show(
    path: Annotated[Path, typer.Argument(help="A saved attribution, x.safetensors.")],
    out: Annotated[Path | None, typer.Option(help="Also write x.html, x.png or x.json.")] = None,
    as_json: Json = False,
) -> None:
    """Print a saved attribution, or turn it into a report."""
    if out is not None:
        check_output(out)
    why = fastattr.Attribution.load(path)
    if out is not None:
        write([why], out)
    print_attributions([why], out, as_json)


@app.command()
def models(as_json: Json = False) -> None:
    """List the model families that can be explained."""
    from fastattr.adapters.families.table import listed

    rows = [asdict(row) for row in listed()]
    if as_json:
        print(json.dumps(rows))
        return
    names = ("family", "model_type", "pictures", "video", "scales", "proven")
    print_table([name.replace("_", " ").upper() for name in names], [[row[name] for name in names] for row in rows])


@app.command(name="eval")
def evaluate(
    dataset: Annotated[str, typer.Argument(help="Bundled scenes by name, a folder, or a COCO instances file.")],
    model: Annotated[str, typer.Option(help="'shapes', a local directory, or a hub id.")] = "shapes",
    device: Device = None,
    dtype: Dtype = DtypeName.auto,
    trust_remote_code: Trust = False,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; with scales of their own as in tam@1+1.5+2.")
    ] = "lens,tam,arc,best",
    n: Annotated[int | None, typer.Option("--n", min=1, help="The first samples only.")] = None,
    out: Annotated[Path, typer.Option(help="Where to write; an interrupted run goes on there.")] = Path(
        "fastattr-eval.jsonl"
    ),
    prompt: Annotated[str | None, typer.Option(help="Instead of the dataset's own question.")] = None,
    words: Annotated[int, typer.Option(min=0, help="Words a sample judged by hiding patches; 0 for none.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Equal shares of the patches that are hidden.")] = 10,
    fill: Annotated[FillName, typer.Option(help="What stands where a patch is hidden.")] = FillName.grey,
    seed: Annotated[int, typer.Option(min=0, help="Decides the words and the random orders.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; by default a core each, one on a GPU.")] = None,
    plots: Annotated[bool, typer.Option("--plots/--no-plots", help="Draw beside the results.")] = True,
    calibration: Annotated[
        Path | None, typer.Option(help="Also write where low evidence begins, for words like these.")
    ] = None,
) -> None:
    """Judge maps and evidence on a dataset."""
    from fastattr.adapters import hide_loading_bars
    from fastattr.config import method_of
    from fastattr.evaluate import Settings, Task, run, summary

    if plots:
        from fastattr.evaluate.plots import draw
    if calibration is not None:
        from fastattr.storage import check_writable, write_calibration

        check_writable(calibration)
    if prompt is not None and not prompt.strip():
        raise InputError(f"--prompt is {prompt!r}, expected some text; leave it out for the dataset's own question")
    chosen = {name.strip(): method_of(name.strip()) for name in methods.split(",") if name.strip()}
    if not chosen:
        raise InputError(f"--methods is {methods!r}, expected at least one name, for example 'tam,arc'")
    settings = Settings(chosen, words=words, steps=steps, fill=fill.value, seed=seed)
    device = choose_device(device)
    task = Task(dataset, model, n, prompt, settings, device, dtype.value, trust_remote_code)
    hide_loading_bars()
    results = run(task, out, workers=workers or _workers(device))
    print(summary(results))
    print(f"\n{out.resolve()}")
    if not results.judged:
        raise typer.Exit(1)
    if plots:
        for path in draw(results, out):
            print(path.resolve())
    if calibration is not None:
        from fastattr.evaluate.tables import calibration_of

        write_calibration(calibration_of(results), calibration)
        print(calibration.resolve())


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="Where to write the figures.")] = Path("fastattr-bench.jsonl"),
    plots: Annotated[Path, typer.Option(help="The folder to draw the plots in.")] = Path("fastattr-bench"),
    smoke: Annotated[bool, typer.Option("--smoke", help="Small sizes only: does it run?")] = False,
) -> None:
    """Measure time and memory on this machine."""
    checkout = Path(fastattr.__file__).parent.parent
    if not (checkout / "benchmarks" / "suite.py").is_file():
        raise InputError(
            f"the benchmarks are not in {str(checkout)!r}; they come with the source: clone the repository, "
            'pip install -e ".[bench]", and run fastattr bench again'
        )
    if find_spec("matplotlib") is None:  # before hours of measuring, since plots are drawn last
        raise InputError(f"fastattr bench draws with matplotlib; {how_to_install('bench')}")
    from fastattr.storage import check_writable

    check_writable(out)
    options = ["--out", str(out.resolve()), "--plots", str(plots.resolve()), *(["--smoke"] if smoke else [])]
    ran = subprocess.run([sys.executable, "-m", "benchmarks.suite", *options], cwd=checkout, check=False)
    raise typer.Exit(ran.returncode)


app.add_typer(log.app, name="log")
app.command()(worker.worker)
app.command()(batch.batch)

# --- the work --------------------------------------------------------------------------------------


def _explain(
    *,
    images: Sequence[Any] | None,
    prompt: str | Messages | fastattr.Chat,
    response: str | None,
    model_name: str,
    device: str | None,
    configs: Sequence[fastattr.AttributionConfig],
    out: Path,
    max_new_tokens: int,
    as_json: bool,
    open_browser: bool,
    dtype: DtypeName = DtypeName.auto,
    trust: bool = False,
) -> None:
    from fastattr.config import name_of

    check_output(out, len(configs))
    device = _check_request(images, prompt, response, device)
    explained: list[fastattr.Attribution] = []
    with tqdm(total=len(configs) + 1, unit="step", disable=not sys.stderr.isatty(), leave=False) as progress:
        model = _load(model_name, device, dtype, trust, progress)
        progress.update()
        answer: Any = response
        for config in configs:
            _say(progress, f"explaining ({name_of(config)})")
            why = fastattr.attribute(model, images, prompt, answer, config, max_new_tokens=max_new_tokens)
            answer = why.token_ids  # every method explains the same tokens
            explained.append(why)
            progress.update()
    write(explained, out)
    print_attributions(explained, out, as_json)
    if open_browser:
        webbrowser.open(out.resolve().as_uri())


def _explain_live(
    images: Sequence[Any] | None,
    prompt: str | Messages | fastattr.Chat,
    model_name: str,
    device: str | None,
    dtype: DtypeName,
    trust: bool,
    config: fastattr.AttributionConfig,
    out: Path,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Print a line a token; the file and, with JSON, the whole come at the end."""
    from fastattr.streaming import check_streamable

    check_output(out)
    check_streamable(config)
    device = _check_request(images, prompt, None, device)
    with tqdm(disable=True) as progress:  # the tokens are the progress
        model = _load(model_name, device, dtype, trust, progress)
    streaming = fastattr.stream(model, images, prompt, config=config, max_new_tokens=max_new_tokens)
    if not as_json:
        print(shown_by([config]))
        print(f"{'token':<14}{'evidence':>10}  {'probability':>13}  where")
    for step in streaming:
        if not as_json:
            evidence = signed(step.evidence)
            shown = printable(repr(step.text.strip()))
            print(f"{shown:<14}{evidence:>10}  {math.exp(step.log_prob):>13.3f}  {where(step.image)}", flush=True)
    why = streaming.attribution()
    write([why], out)
    if as_json:
        print_attributions([why], out, True)
    else:
        print(f"\n{printable(why.response)}\n\n{out.resolve()}")


def _check_request(
    images: Sequence[Any] | None, prompt: str | Messages | fastattr.Chat, response: str | None, device: str | None
) -> str:
    """Check a request before the model is loaded; returns the device. Raises `InputError` or `ImageError`."""
    from fastattr.chat import as_chat, read_prompt
    from fastattr.parts import check_whole

    visuals, asked = read_prompt(images, prompt)
    as_chat(asked, len(visuals))
    if response is not None and not response.strip():
        raise InputError(f"--response is {response!r}, expected some text; leave it out to let the model answer")
    check_whole(response or "", "--response")
    return choose_device(device)


def _load(name: str, device: str, dtype: DtypeName, trust: bool, progress: Any) -> Model:
    _say(progress, f"loading {name} on {device}")
    return load_model(name, device, dtype, trust)


_PARTS = re.compile(r"(\d+)")  # text and numbers in turn, so that frame 10 comes behind frame 9


def _frames(folder: Path) -> list[Path]:
    """The frames of a video that lies in a folder, by the numbers and names of their files."""
    from fastattr.storage import is_litter

    files = [path for path in folder.iterdir() if path.is_file()]
    frames = [path for path in files if not is_litter(path.name) and not path.name.startswith(".")]
    if len(frames) < len(files):
        hidden = len(files) - len(frames)
        print(f"{str(folder)!r}: skipped {hidden} hidden files or files of macOS or Windows", file=sys.stderr)
    if not frames:
        raise InputError(
            f"the folder {str(folder)!r} holds no files, expected the frames of a video, numbered or named in order"
        )
    return sorted(
        frames, key=lambda path: [int(part) if part.isdecimal() else part for part in _PARTS.split(path.name)]
    )


def _read_messages(path: Path) -> fastattr.Chat:
    """A conversation from a JSON file. Raises `InputError`."""
    try:
        messages = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read as a conversation in JSON: {error}") from error
    if isinstance(messages, dict):
        unknown = sorted(set(messages) - {"messages", "tools", "template_options"})
        if unknown or "messages" not in messages:
            raise InputError(
                f"{str(path)!r} holds {', '.join(messages) or 'nothing'}, expected messages, and optionally tools and "
                "template_options"
            )
        return _beside(path, fastattr.Chat(**messages))
    if not isinstance(messages, list):
        raise InputError(f"{str(path)!r} holds {type(messages).__name__}, expected a list of messages")
    return _beside(path, fastattr.Chat(messages))


def _beside(path: Path, chat: fastattr.Chat) -> fastattr.Chat:
    """The conversation with relative paths of pictures resolved against the folder of its file."""

    def resolved(value: Any) -> Any:
        if isinstance(value, list):
            return [resolved(each) for each in value]
        is_path = isinstance(value, str) and "://" not in value and not value.startswith("data:")
        return str(path.parent / value) if is_path else value

    def with_paths(content: Any) -> Any:
        if not isinstance(content, list | tuple):
            return content
        return [
            {key: resolved(value) if key == part["type"] != "text" else value for key, value in part.items()}
            for part in content
        ]

    messages = [{**message, "content": with_paths(message.get("content"))} for message in chat.messages]
    return replace(chat, messages=messages)


def _workers(device: str) -> int:
    """One process for each core this one may use; one where a GPU does the work."""
    if device != "cpu":
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(progress: Any, text: str) -> None:
    """Name the step: on the bar of a terminal, as a plain line elsewhere."""
    if progress.disable:
        print(text, file=sys.stderr, flush=True)
    else:
        progress.set_description(text)


def main() -> None:
    """Run the command line; errors of our own tree are one line on stderr and exit code 2."""
    try:
        app()
    except FastattrError as error:
        print(printable(f"fastattr: {type(error).__name__}: {error}"), file=sys.stderr)  # it may quote anything
        raise SystemExit(2) from None
