"""`metaalign-rl serve`: serves a policy with vLLM's OpenAI-compatible server and the three-tier chat template."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from metaalign_rl.core.errors import UserError
from metaalign_rl.core.loading import require_servable
from metaalign_rl.core.net import is_loopback, listen, url_of

RESERVED = ("--host", "--port", "--model", "--load-format", "--trust-remote-code")
CPU_OPTIONS = ("--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", str(2**30))
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

    path = prepared_policy(policy)
    check_options(options)
    require_key(host, os.environ, options)
    listen(host, port).close()
    require_servable(path)
    load_tokenizer(path)
    on_cpu = prepare_vllm()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"  # the server's engine is its own process
    print(f"serving {path} as {name!r} on {url_of(host, port)}/v1 (Ctrl-C to stop)")
    print(EXAMPLE.format(url=url_of(host, port), name=name), flush=True)
    os.execv(sys.executable, command(path, name, host, port, [*(CPU_OPTIONS if on_cpu else ()), *options]))


def command(path: Path, name: str, host: str, port: int, options: Sequence[str]) -> list[str]:
    """The server's command line. Only requests set sampling options: the checkpoint's generation config is not used."""
    return [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server",
        "--model", str(path), "--served-model-name", name, "--host", host, "--port", str(port),
        "--load-format", "safetensors", "--generation-config", "vllm", *options,
    ]  # fmt: skip


def check_options(options: Sequence[str]) -> None:
    """Refuse options that `serve` sets itself.

    Raises:
        UserError: names the option.
    """
    for option in options:
        if option.partition("=")[0] in RESERVED:
            raise UserError(f"{option}: not allowed after '--', because metaalign-rl serve sets it; see its own --help")


def require_key(host: str, environment: Mapping[str, str], options: Sequence[str]) -> None:
    """Refuse to serve other machines without an API key.

    Raises:
        UserError: `host` is not a loopback address, and neither VLLM_API_KEY nor `--api-key` is given.
    """
    given = any(option.partition("=")[0] == "--api-key" for option in options)
    if not (is_loopback(host) or environment.get("VLLM_API_KEY") or given):
        raise UserError(
            f"--host {host}: others could use the server; set VLLM_API_KEY to a secret that clients must send, "
            "or listen on 127.0.0.1"
        )
