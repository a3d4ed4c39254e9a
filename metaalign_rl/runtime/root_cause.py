"""The root of an error: what failed first, and where, whatever Ray and `raise … from` have put round it."""

import re
import traceback
from dataclasses import dataclass

_CAUSED = "\nThe above exception was the direct cause of the following exception:\n"
_DURING = "\nDuring handling of the above exception, another exception occurred:\n"
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_REMOTE = re.compile(r"(?P<task>ray::[^\s(]+)\(.*\) \(pid=.*\n")  # Ray's header over a remote traceback
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)\n', re.MULTILINE)
_CODE = re.compile(r"(?:    .*\n)*")  # a frame's line of code and the marks below it
_ERROR = re.compile(r"(?P<kind>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?", re.DOTALL)
_OURS = re.compile(r"/(metaalign_rl|reward|jobs)/")
_LONGEST = 600  # characters of a message that the last line shows


@dataclass(frozen=True, slots=True)
class RootCause:
    """The first error of a chain.

    Attributes:
        kind: the error's class, with its module.
        where: `file:line in function`, the deepest of this project where there is one, or the remote task or
            actor's method where Ray tells no more.
    """

    kind: str
    message: str
    where: str

    @property
    def is_user_error(self) -> bool:
        return self.kind == "metaalign_rl.core.errors.UserError"

    def __str__(self) -> str:
        message = " ".join(self.message.split())
        shown = f": {message[:_LONGEST]}" if message else ""
        return f"{self.kind}{shown}" + (f" ({self.where})" if self.where else "")


def root_cause(error: BaseException) -> RootCause:
    """The root of `error`: a `UserError` in its chain, which says what to do, else what was raised first.

    It is read from the formatted traceback: an error that Ray carried between processes has lost its
    `__cause__` and frames, and one from an actor's `__init__` even its class; Ray's message has them as text.
    """
    text = _COLOR.sub("", "".join(traceback.format_exception(error)))
    links = [_innermost(link) for link in text.split(_DURING)[-1].split(_CAUSED)]
    return next((link for link in links if link.is_user_error), links[0])


def _innermost(link: str) -> RootCause:
    """The error that one link of a chain ends in: the remote one where it holds a remote traceback."""
    headers = list(_REMOTE.finditer(link))
    task = headers[-1]["task"] if headers else ""
    text = link[headers[-1].end() :] if headers else link
    frames = list(_FRAME.finditer(text))
    rest = text[frames[-1].end() :] if frames else text
    code = _CODE.match(rest)
    assert code is not None  # it matches nothing, too
    message = rest[code.end() :].strip()
    error = _ERROR.fullmatch(message) or _ERROR.fullmatch(message.splitlines()[-1])
    if error is None:
        return RootCause("error", message, _place(frames) or task)
    return RootCause(error["kind"], (error["message"] or "").strip(), _place(frames) or task)


def _place(frames: list[re.Match[str]]) -> str:
    ours = [frame for frame in frames if _OURS.search(frame["file"]) and "/ray/" not in frame["file"]]
    if not (chosen := ours or frames):
        return ""
    return f"{chosen[-1]['file']}:{chosen[-1]['line']} in {chosen[-1]['function']}"
