"""Finds the root cause of an exception: the first error, without the wrappers of Ray and `raise ... from`."""

import re
import traceback
from dataclasses import dataclass

_CAUSED = "\nThe above exception was the direct cause of the following exception:\n"
_DURING = "\nDuring handling of the above exception, another exception occurred:\n"
_COLOR = re.compile(r"\x1b\[[0-9;]*m")
_REMOTE = re.compile(r"(?P<task>ray::[^\s(]+)\(.*\) \(pid=.*\n")  # Ray's header of a remote traceback
_FRAME = re.compile(r'^  File "(?P<file>.+)", line (?P<line>\d+), in (?P<function>.+)\n', re.MULTILINE)
_CODE = re.compile(r"(?:    .*\n)*")  # a frame's line of code and the marks below it
_ERROR = re.compile(r"(?P<kind>[A-Za-z_][\w.]*)(?:: (?P<message>.*))?", re.DOTALL)
_OURS = re.compile(r"/(metaalign_rl|reward|jobs)/")
_MAX_LENGTH = 600  # characters of the message that are shown


@dataclass(frozen=True, slots=True)
class RootCause:
    """The first error of a chain.

    Attributes:
        kind: the class of the error, with its module.
        message: the error's text.
        where: `file:line in function` of the innermost frame, in this project if possible; without frames, the remote
            task or actor method; else empty.
    """

    kind: str
    message: str
    where: str

    @property
    def is_user_error(self) -> bool:
        """Whether the message is for the user: it says what to change."""
        return self.kind == "metaalign_rl.core.errors.UserError"

    def __str__(self) -> str:
        message = " ".join(self.message.split())
        shown = f": {message[:_MAX_LENGTH]}" if message else ""
        return f"{self.kind}{shown}" + (f" ({self.where})" if self.where else "")


def root_cause(error: BaseException) -> RootCause:
    """The first `UserError` in the chain of `error`; without one, the error that was raised first.

    It parses the formatted traceback. An error that Ray carried between processes has lost its `__cause__` and frames,
    and one from an actor's `__init__` even its class. Ray's message has all of them as text.
    """
    text = _COLOR.sub("", "".join(traceback.format_exception(error)))
    links = [_innermost(link) for link in text.split(_DURING)[-1].split(_CAUSED)]
    return next((link for link in links if link.is_user_error), links[0])


def _innermost(link: str) -> RootCause:
    """The error of one link of a chain: the remote error, if the link has a remote traceback."""
    headers = list(_REMOTE.finditer(link))
    task = headers[-1]["task"] if headers else ""
    text = link[headers[-1].end() :] if headers else link
    frames = list(_FRAME.finditer(text))
    rest = text[frames[-1].end() :] if frames else text
    code = _CODE.match(rest)
    assert code is not None  # the pattern also matches the empty string
    message = rest[code.end() :].strip()
    error = _ERROR.fullmatch(message) or _ERROR.fullmatch(message.splitlines()[-1])
    if error is None:
        return RootCause("error", message, _location(frames) or task)
    return RootCause(error["kind"], (error["message"] or "").strip(), _location(frames) or task)


def _location(frames: list[re.Match[str]]) -> str:
    ours = [frame for frame in frames if _OURS.search(frame["file"]) and "/ray/" not in frame["file"]]
    if not (chosen := ours or frames):
        return ""
    return f"{chosen[-1]['file']}:{chosen[-1]['line']} in {chosen[-1]['function']}"
