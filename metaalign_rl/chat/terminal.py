"""The chat in a terminal."""

from argparse import ArgumentTypeError
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from metaalign_rl.chat.session import Reply, Session
from metaalign_rl.core.arguments import temperature
from metaalign_rl.core.errors import UserError

HELP = """/system TEXT       set System Info, the provider's tier (no TEXT clears it)
/user TEXT         set User Info, the user's tier
/again             answer the last message again, under the tiers as they are now
/clear             forget the dialog, keep the tiers
/temperature T     0 decodes greedily, 1 samples as in training
/help              these commands
/quit              end (Ctrl-D too)
Anything else is a message to the model."""


def run(session: Session, read: Callable[[str], str] = input, console: Console | None = None) -> None:
    """Read lines until the end of the input, answer each and show the scores."""
    console = console or Console(highlight=False)
    console.print("Chat under a meta-prompt. /help lists the commands.")
    if not session.keep_dialog:
        console.print("Every message starts a new dialog: the model learnt from single questions (--dialog goes on).")
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
    """Do what one line asks.

    Raises:
        UserError: an unknown command, or a message that does not fit beside the tiers.
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
        reply = session.again()
        show_reply(reply, console) if reply else console.print("nothing was asked yet")
    elif command == "/clear":
        session.messages = []
        console.print("the dialog is forgotten")
    elif command == "/temperature":
        session.temperature = _temperature(rest)
    elif command == "/help":
        console.print(Text(HELP))
    else:
        raise UserError(f"unknown command {command!r}; /help lists them")


def show_tiers(session: Session, console: Console) -> None:
    """Print the meta-prompt as it is now."""
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
