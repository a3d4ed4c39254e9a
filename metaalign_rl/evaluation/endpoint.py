"""Policies that an OpenAI-compatible endpoint serves."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

from metaalign_rl.core.dataflow import Row, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import MARKERS, without_reasoning
from metaalign_rl.core.net import check_url, proxy_for, via

TierFormat = Literal["template", "message"]
MAX_REQUESTS = 32  # concurrent requests


class Endpoint:
    """Requests responses from `/chat/completions`.

    The API key comes from the environment variable OPENAI_API_KEY, if the server needs one.

    Args:
        url: base URL, such as http://127.0.0.1:8000/v1.
        model: name of the served model. If it is empty, the server must serve exactly one.
        tiers: how a request carries the tiers. `template` sends User Info as the argument `user_info` of the chat
            template, so the server needs the meta-prompt's template (`metaalign-rl serve` has it). `message` sends
            both tiers as the text of one system message, for any other model.

    Raises:
        UserError: the URL holds a user or a password, no endpoint at `url`, several models without a name to choose
            one, or an unknown name.
    """

    def __init__(self, url: str, model: str, tiers: TierFormat) -> None:
        from openai import DefaultHttpxClient, OpenAI

        check_url("the endpoint's URL", url, "OPENAI_API_KEY")
        self._proxy = proxy_for(url)
        client = DefaultHttpxClient(proxy=self._proxy, trust_env=False)  # httpx cannot read ranges in no_proxy
        key = os.environ.get("OPENAI_API_KEY", "none")
        self._client = OpenAI(base_url=url, api_key=key, max_retries=3, http_client=client)
        self._tiers = tiers
        self.model = self._find_model(url, model)

    def answer(self, rows: Sequence[Row], sampling: Sampling) -> Iterator[str]:
        """Yield one response per row, in the order of the rows, as they arrive.

        Raises:
            UserError: the server rejects a request, stops responding, or ignores User Info.
        """
        self._require_user_info_is_read(rows)
        with ThreadPoolExecutor(MAX_REQUESTS) as pool:
            completions = pool.map(lambda row: self._complete(row, sampling), rows)
            # Servers decode token by token, which leaves a space before the first word.
            yield from (without_reasoning(completion.choices[0].message.content or "") for completion in completions)

    def _require_user_info_is_read(self, rows: Sequence[Row]) -> None:
        """Compare the prompt's length with and without User Info: a template may silently drop it."""
        row = next((row for row in rows if row.user_info.strip()), None)
        if row is None:
            return
        one_token = Sampling(0.0, max_new_tokens=1)
        both = (row, replace(row, user_info=""))
        tokens, without = (self._complete(asked, one_token).usage.prompt_tokens for asked in both)
        if tokens == without:
            raise UserError(
                f"row {row.id!r}: expected User Info in the prompt, found {tokens} tokens with it and without it; "
                "the endpoint's chat template ignores User Info: give --tiers message"
            )

    def _complete(self, row: Row, sampling: Sampling) -> Any:
        from openai import OpenAIError

        try:
            return self._client.chat.completions.create(
                model=self.model,
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                stop=list(sampling.stop) or None,
                **self._request(row),
            )
        except OpenAIError as error:
            place = f"row {row.id!r}: the request to {self._client.base_url}"
            raise UserError(f"{place} failed: {error}{via(self._proxy)}") from None

    def _request(self, row: Row) -> dict[str, Any]:
        """The request's fields that depend on the row."""
        if self._tiers == "template":
            system = [{"role": "system", "content": row.system_info}]
            arguments = {"chat_template_kwargs": {"user_info": row.user_info}}
            return {"messages": [*system, *row.messages], "extra_body": arguments}
        texts = {MARKERS["system"]: row.system_info, MARKERS["user"]: row.user_info}
        text = "\n\n".join(f"{marker}\n{text}" for marker, text in texts.items() if text)
        return {"messages": [*([{"role": "system", "content": text}] if text else []), *row.messages]}

    def _find_model(self, url: str, name: str) -> str:
        from openai import OpenAIError

        try:
            served = [model.id for model in self._client.models.list()]
        except OpenAIError as error:
            raise UserError(
                f"{url}: expected an OpenAI-compatible endpoint, found none ({error}{via(self._proxy)}); "
                "give its base URL"
            ) from None
        names = ", ".join(served)
        if name and name not in served:
            raise UserError(f"--served-model: expected a model that {url} serves ({names}), found {name!r}")
        if not name and len(served) != 1:
            raise UserError(f"{url}: expected one model, found {len(served)} ({names}); choose one with --served-model")
        return name or served[0]
