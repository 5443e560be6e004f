"""`tunledger completion`: the script that teaches a shell to complete our commands, options and interface names."""

import click
from click.shell_completion import get_completion_class

VARIABLE = "_TUNLEDGER_COMPLETE"  # click's: how the script asks us for completions


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script of a shell.

    Names of interfaces are completed by asking the service.

    \b
    Examples:
      eval "$(tunledger completion bash)"      # in ~/.bashrc
      eval "$(tunledger completion zsh)"       # in ~/.zshrc
      tunledger completion fish > ~/.config/fish/completions/tunledger.fish
    """
    script = get_completion_class(shell)
    assert script is not None, f"click completes for {shell}"
    click.echo(script(ctx.find_root().command, {}, "tunledger", VARIABLE).source())


COMMANDS = (completion,)
