"""The command line: one verb a file, each importing what it needs only when it runs."""

from __future__ import annotations

import errno
import os
import sys
from types import MappingProxyType

# Before anything can import it: onnxruntime reports usage from Linux unless this is set.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

import typer

from defaker_opt import __version__
from defaker_opt.cli.compile import compile_
from defaker_opt.cli.convert import convert
from defaker_opt.cli.doctor import doctor
from defaker_opt.cli.plan import plan
from defaker_opt.cli.profile import profile
from defaker_opt.cli.quantize import quantize
from defaker_opt.cli.run import run
from defaker_opt.cli.show import show
from defaker_opt.cli.train import train
from defaker_opt.cli.validate import validate
from defaker_opt.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER_ERROR, DefakerError

app = typer.Typer(
    name="defaker-opt",
    help="Compress fake-image detectors (InternVL2 + SAM2), and judge images with the compact build.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(quantize)
app.command()(run)
app.command("compile")(compile_)
app.command()(convert)
app.command()(show)
app.command()(train)
app.command()(validate)
app.command()(profile)
app.command()(plan)
app.command()(doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"defaker-opt {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Compress fake-image detectors (InternVL2 + SAM2), and judge images with the compact build."""


# Packages and the extra that brings them; on a device most of them are missing, and `run` does without.
_HOST_PACKAGES = (
    "torch",
    "transformers",
    "onnx_ir",
    "onnxscript",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "yaml",
)
_EXTRAS = MappingProxyType({**dict.fromkeys(_HOST_PACKAGES, "host"), "scipy": "validate"})


def main() -> None:
    """Run a verb. A user's mistake ends with its message and exit code 2, Ctrl-C with 130."""
    try:
        app()
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get(error.name or "")
        if extra is None:
            raise
        print(f"error: this needs {error.name}; install it with: pip install 'defaker-opt[{extra}]'", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except DefakerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except BrokenPipeError:
        # Whoever read our output has seen enough; keep Python from writing the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_OK)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print("error: standard output: no space left to write it; free some or choose another place", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:
            print("interrupted; an unfinished build goes on where it stopped if you repeat it", file=sys.stderr)
        raise
