"""The chat in a terminal."""

from argparse import ArgumentTypeError
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from metaalign_rl.chat.session import Reply, Session
from metaalign_rl.core.arguments import temperature
from metaalign_rl.core.errors import UserError

HELP = """/system TEXT       set System Info, the provider's tier (no TEXT clears it)
/user TEXT         set User Info, the user's tier (no TEXT clears it)
/again             answer the last message again, with the current tiers
/clear             clear the dialog, keep the tiers
/temperature T     0 decodes greedily, 1 samples as in training
/help              show these commands
/quit              quit (or Ctrl-D)
Any other line is a message to the model."""


def run(session: Session, read: Callable[[str], str] = input, console: Console | None = None) -> None:
    """Read lines, answer each and print the scores, until `/quit` or the end of the input.

    Args:
        read: prints its argument as a prompt and returns a line; raises `EOFError` at the end of the input.
        console: where to print; by default the terminal.
    """
    console = console or Console(highlight=False)
    console.print("Chat with the model. Type /help for the commands.")
    if not session.keep_dialog:
        console.print(
            "The model was trained on single questions, so each message starts a new dialog (use --dialog to keep it)."
        )
    show_tiers(session, console)
    while True:
        try:
            line = read("> ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if line == "/quit":
            return
        try:
            obey(line, session, console)
        except UserError as error:
            console.print(Text(f"error: {error}", "red"))


def obey(line: str, session: Session, console: Console) -> None:
    """Run the command on one line, or answer the message.

    Raises:
        UserError: the command is unknown or has a wrong argument, or the tiers leave no room for the message.
    """
    command, _, rest = line.partition(" ")
    if not line:
        return
    if not line.startswith("/"):
        show_reply(session.say(line), console)
    elif command in ("/system", "/user"):
        setattr(session, f"{command[1:]}_info", rest.strip())
        show_tiers(session, console)
    elif command == "/again":
        reply = session.regenerate()
        show_reply(reply, console) if reply else console.print("There is no message yet.")
    elif command == "/clear":
        session.messages = []
        console.print("The dialog is cleared.")
    elif command == "/temperature":
        session.temperature = _temperature(rest)
    elif command == "/help":
        console.print(Text(HELP))
    else:
        raise UserError(f"unknown command {command!r}; type /help for the commands")


def show_tiers(session: Session, console: Console) -> None:
    """Print the current tiers."""
    for name, text in (("System Info", session.system_info), ("User Info", session.user_info)):
        console.print(Text.assemble((f"{name:<12}", "cyan"), text or "–"))


def show_reply(reply: Reply, console: Console) -> None:
    """Print an answer and the reward model's probabilities."""
    console.print(Text(reply.answer or "(empty)", "bold"))
    scores = [Text(f"{label} {p:.2f}", "green" if p >= 0.5 else "red") for label, p in reply.scores.items()]
    if scores:
        console.print(Text("  ").join(scores))


def _temperature(text: str) -> float:
    try:
        return temperature(text)
    except ArgumentTypeError as error:
        raise UserError(f"/temperature: {error}") from None
