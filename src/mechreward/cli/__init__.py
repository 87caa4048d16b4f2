"""The command line."""

from __future__ import annotations

import errno
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mechreward.cli.common import Interrupted
from mechreward.cli.discover import discover
from mechreward.cli.doctor import doctor
from mechreward.cli.eval import evaluate
from mechreward.cli.features import features
from mechreward.cli.gate import gate
from mechreward.cli.packs import packs
from mechreward.cli.probe import probe
from mechreward.cli.redteam import redteam
from mechreward.cli.report import report
from mechreward.cli.serve import serve
from mechreward.cli.train import train
from mechreward.cli.watch import watch
from mechreward.errors import MechRewardError


class OneSentence(TyperGroup):
    """What goes wrong, and an interruption, is said in one sentence; ``--debug`` shows where an error comes from."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Interrupted as kept:
            typer.echo(kept, err=True)
            raise typer.Exit(130) from None
        except KeyboardInterrupt:
            if ctx.invoked_subcommand == "serve":  # while it loads; a server has nothing to go on with
                raise typer.Exit(130) from None
            if ctx.invoked_subcommand in ("features", "probe"):  # short work, of which nothing is kept
                typer.echo("Interrupted: the same command starts again.", err=True)
            else:
                typer.echo("Interrupted: nothing that was finished is lost; give the same command to go on.", err=True)
            raise typer.Exit(130) from None
        except MechRewardError as error:
            if ctx.params.get("debug"):
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:  # a full disk, a folder that cannot be written to
            if ctx.params.get("debug") or error.errno is None or error.errno == errno.EPIPE:
                raise
            typer.echo(f"Error: {error.filename or 'A file'} cannot be read or written: {error.strerror}.", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(cls=OneSentence, no_args_is_help=True, pretty_exceptions_enable=False)
app.command()(discover)
app.command()(train)
app.command()(watch)
app.command()(gate)
app.command()(redteam)
app.command()(report)
app.command()(serve)
app.command()(doctor)
app.command("eval")(evaluate)
app.add_typer(packs, name="packs")
app.add_typer(features, name="features")
app.add_typer(probe, name="probe")


@app.callback()
def options(debug: Annotated[bool, typer.Option(help="Show where an error comes from.")] = False) -> None:
    """Mechanistic-interpretability rewards for GRPO.

    Example: mechreward packs list
    """
