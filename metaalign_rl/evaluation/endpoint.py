"""A model behind an OpenAI-compatible endpoint, asked for answers to rows."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

from metaalign_rl.core.dataflow import Row, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import MARKERS

Tiers = Literal["template", "message"]
CONCURRENT = 32  # requests under way together


class Endpoint:
    """Asks `/chat/completions`. The API key, if the server wants one, comes from OPENAI_API_KEY.

    Args:
        url: such as http://127.0.0.1:8000/v1.
        model: the name under which the server has it; empty takes the only one that it serves.
        tiers: `template` sends User Info as the argument `user_info` of the meta-prompt's chat template, which the
            server must have (`metaalign-rl serve` does); `message` sends both tiers as the text of one system
            message, for any other model.

    Raises:
        UserError: nobody answers there, or the server has several models, or not the one that is named.
    """

    def __init__(self, url: str, model: str, tiers: Tiers) -> None:
        from openai import OpenAI

        self._client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=3)
        self._tiers = tiers
        self.model = self._find_model(url, model)

    def answer(self, rows: Sequence[Row], sampling: Sampling) -> Iterator[str]:
        """The answers, in the rows' order, as they come.

        Raises:
            UserError: the server refuses a row, stops answering, or does not read User Info.
        """
        self._require_user_info_is_read(rows)
        with ThreadPoolExecutor(CONCURRENT) as pool:
            completions = pool.map(lambda row: self._ask(row, sampling), rows)
            # Servers decode token by token, which leaves a space before the first word.
            yield from ((completion.choices[0].message.content or "").strip() for completion in completions)

    def _require_user_info_is_read(self, rows: Sequence[Row]) -> None:
        """A template without `user_info` would drop that tier without a word, and the figures would mean nothing."""
        row = next((row for row in rows if row.user_info.strip()), None)
        if row is None:
            return
        once = Sampling(0.0, max_new_tokens=1)
        counts = [self._ask(asked, once).usage.prompt_tokens for asked in (row, replace(row, user_info=""))]
        if counts[0] == counts[1]:
            raise UserError(
                f"row {row.id!r}: the prompt has {counts[0]} tokens with User Info and without: the endpoint's chat "
                "template does not read it; give --tiers message"
            )

    def _ask(self, row: Row, sampling: Sampling) -> Any:
        from openai import OpenAIError

        try:
            return self._client.chat.completions.create(
                model=self.model,
                temperature=sampling.temperature,
                max_tokens=sampling.max_new_tokens,
                **self._request(row),
            )
        except OpenAIError as error:
            where = f"row {row.id!r}: the endpoint {self._client.base_url}"
            raise UserError(f"{where} does not answer it: {error}") from None

    def _request(self, row: Row) -> dict[str, Any]:
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
            reason = f"no OpenAI-compatible endpoint answers there ({error})"
            raise UserError(f"{url}: {reason}; give its base URL") from None
        if name and name not in served:
            raise UserError(f"--served-model {name}: {url} serves {', '.join(served)}")
        if not name and len(served) != 1:
            raise UserError(f"{url} serves {len(served)} models: {', '.join(served)}; name one with --served-model")
        return name or served[0]
