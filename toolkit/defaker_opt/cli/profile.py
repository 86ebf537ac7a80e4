"""`defaker-opt profile`: what a build costs on this machine, where, and how far from the limit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defaker_opt.errors import EXIT_LIMIT_BROKEN, DefakerError

if TYPE_CHECKING:
    from defaker_opt.device import Device
    from defaker_opt.profiles.profile import Profile
    from defaker_opt.profiles.remote import Host
    from defaker_opt.runtime import Build

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}

Build_ = Annotated[Path | None, typer.Argument(metavar="BUILD", help="A build folder.")]
Images_ = Annotated[Path | None, typer.Option(help="A folder of pictures, or one; default: one that is drawn.")]
Repeat_ = Annotated[int, typer.Option(min=1, help="Rounds over all pictures that count.")]
Compare_ = Annotated[Path | None, typer.Option(metavar="BUILD2", help="Run this build in turns with the first.")]
Target_ = Annotated[str | None, typer.Option(help="Also say the floor on this device (see: show targets).")]
Report_ = Annotated[Path | None, typer.Option(help="Folder for profile.html and profile.json.")]
Diff_ = Annotated[
    tuple[Path, Path] | None, typer.Option(metavar="A B", help="Instead: what got slower between two profile.json.")
]
Gate_ = Annotated[float, typer.Option(min=0, max=1, help="Make masks from this fake probability on; 0 runs it all.")]
Threads_ = Annotated[int, typer.Option(min=0, help="Threads for each stage; 0 means one for each core.")]
Remote_ = Annotated[
    str, typer.Option(metavar="USER@HOST", help="Measure there instead, over ssh; nothing stays there.")
]
Ssh_ = Annotated[str, typer.Option(help="The ssh command with its options, such as 'ssh -p 2222'.")]
Python_ = Annotated[str, typer.Option(help="The interpreter on the other machine.")]
Json_ = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]


def profile(
    build: Build_ = None,
    images: Images_ = None,
    repeat: Repeat_ = 20,
    compare: Compare_ = None,
    target: Target_ = None,
    report: Report_ = None,
    diff: Diff_ = None,
    gate: Gate_ = 0.0,
    threads: Threads_ = 0,
    remote: Remote_ = "",
    ssh: Ssh_ = "ssh",
    remote_python: Python_ = "python3",
    as_json: Json_ = False,
) -> None:
    """Measure a build: latency by stage and operator, memory, energy, throughput, and the distance to the roofline.

    --diff compares two kept results, and ends with exit code 1 if a stage got slower.
    """
    if (build is None) == (diff is None):
        raise DefakerError("profile: give either a build, or --diff A B with two profile.json")
    if diff is not None:
        _diff(diff, as_json)
        return
    from rich.console import Console

    from defaker_opt.cli.progress import progress_bar
    from defaker_opt.profiles.profile import Settings, pictures, profile_build
    from defaker_opt.profiles.table import profile_tables
    from defaker_opt.runtime import open_build

    assert build is not None
    opened = open_build(build)
    other = open_build(compare) if compare else None
    aim = _device(target) if target else None
    paths = _paths(images) if images else []
    if remote:
        from defaker_opt.profiles.remote import Host

        if aim:
            raise DefakerError(f"--target {target}: with --remote the roofline is that of {remote}; leave one out")
        told = ["--repeat", str(repeat), "--gate", str(gate), "--threads", str(threads)]
        builds = [opened, *([other] if other else [])]
        found = _remotely(Host(remote, ssh, remote_python), builds, paths, told, report)
        if as_json:
            print(found)
        return
    loaded = pictures(paths)
    settings = Settings(len(loaded), repeat, gate=gate, threads=threads)
    with progress_bar() as progress:
        result = profile_build(opened, loaded, settings, progress, other, aim)
    console = Console()
    for part in profile_tables(result):
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))
    if report:
        print(f"report: {_write(result, report)}")
    if as_json:
        print(json.dumps(result.as_json()))


def _paths(images: Path) -> list[Path]:
    if images.is_file():
        return [images]
    found = sorted(path for path in images.glob("*") if path.suffix.lower() in _SUFFIXES) if images.is_dir() else []
    if not found:
        raise DefakerError(f"--images {images}: no picture there; give a picture, or a folder that has some")
    return found


def _device(target: str) -> tuple[str, Device]:
    from defaker_opt.target import load_target

    loaded = load_target(target)
    if loaded.device is None:
        raise DefakerError(
            f"--target {target}: has no facts of a device, it stands for whatever machine this is; leave it out, or "
            "name a device (see: show targets)"
        )
    return loaded.name, loaded.device


def _write(result: Profile, folder: Path) -> Path:
    from defaker_opt.profiles.page import profile_as_html
    from defaker_opt.profiles.write import write_files
    from defaker_opt.runtime.build import json_text

    write_files(folder, {"profile.json": json_text(result.as_json()), "profile.html": profile_as_html(result)})
    return folder / "profile.html"


def _remotely(host: Host, builds: list[Build], paths: list[Path], arguments: list[str], report: Path | None) -> str:
    """The result as JSON; the page's place is printed."""
    from defaker_opt.profiles.remote import profile_remotely

    build, other = builds[0], builds[1] if len(builds) > 1 else None
    folder = report or Path("reports") / f"{build.folder.resolve().name}-on-{host.destination.rpartition('@')[2]}"
    data = profile_remotely(host, build, other, paths, arguments, folder)
    print(f"{data['measured']['total']['median']:.1f} ms an image on {data['machine']['processor']}")
    print(f"report: {folder / 'profile.html'}")
    return json.dumps(data)


def _diff(paths: tuple[Path, Path], as_json: bool) -> None:
    import dataclasses

    from rich.console import Console

    from defaker_opt.profiles.compare import diff_results
    from defaker_opt.profiles.table import diff_table

    found = diff_results(*map(_read, paths))
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "regressed": found.regressed}))
    else:
        console = Console()
        console.print(diff_table(found), highlight=False)
        for warning in found.warnings:
            console.print(f"warning: {warning}", highlight=False, soft_wrap=True)
        print(f"slower: {found.attributed or 'the whole'}" if found.regressed else "no stage got slower")
    if found.regressed:
        raise typer.Exit(EXIT_LIMIT_BROKEN)


def _read(path: Path) -> dict[str, Any]:
    from defaker_opt.files import read_json_object
    from defaker_opt.profiles.profile import FORMAT

    file = path / "profile.json" if path.is_dir() else path
    data = read_json_object(file)
    if data is None or data.get("format") != FORMAT or "samples" not in data:
        raise DefakerError(f"--diff {file}: not a profile of this version; write one with: profile BUILD --report DIR")
    return data
