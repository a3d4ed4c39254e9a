"""One conversation: the two tiers, the dialog, and what the policy says next."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.checkpoints import find_policy
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.meta_prompt import MetaPrompt, encode, load_tokenizer
from metaalign_rl.core.rows import read_rows

Messages = list[dict[str, str]]
LOOKED_AT = 1000  # rows of a run, to see whether it has dialogs


def learnt_dialogs(run: Path) -> bool:
    """Whether the prompts of the run that a policy comes from have more than one message, so that it can go on with a
    dialog; True where there are no prompts to look at."""
    prompts = RunFolder(find_policy(run).parent).rows("prompts")
    return not prompts.is_file() or any(len(row.messages) > 1 for row in islice(read_rows(prompts), LOOKED_AT))


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer, and the reward model's probabilities for it by label: of each tier that says something, of the
    dialog, and overall. Empty without a reward model."""

    answer: str
    scores: Mapping[str, float] = field(default_factory=dict)


class ChatPolicy:
    """A policy and, where there is one, the reward model that scores its answers. One answer at a time.

    Args:
        run: a run's folder with `policy/` and maybe `reward/`, or a policy's checkpoint folder.
        reward_model: a reward model's folder; None takes the run's own, if any.
        max_new_tokens: longest answer.

    Raises:
        UserError: no policy there, or one without the meta-prompt's template.
    """

    def __init__(self, run: Path, reward_model: Path | None = None, max_new_tokens: int = 64) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        import reward

        logging.disable_progress_bar()
        path = find_policy(run)
        self._tokenizer = load_tokenizer(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, trust_remote_code=False)
        self._model = model.to(device).eval()
        found = reward_model or (run / "reward" if (run / "reward").is_dir() else None)
        self._scorer = reward.Scorer.from_pretrained(found) if found else None
        self._max_new_tokens = max_new_tokens
        self._turn = Lock()

    def answer(self, meta: MetaPrompt, messages: Messages, temperature: float = 0.0) -> Reply:
        """What the policy says next, greedily at temperature 0.

        Raises:
            UserError: the tiers leave no room for the dialog.
        """
        with self._turn:
            text = self._generate(meta, messages, temperature)
            return Reply(text, self._score(meta, messages, text))

    def _generate(self, meta: MetaPrompt, messages: Messages, temperature: float) -> str:
        import torch

        room = self._model.config.max_position_embeddings - self._max_new_tokens
        ids = torch.tensor([encode(self._tokenizer, meta, messages, max_tokens=room)], device=self._model.device)
        with torch.inference_mode():
            drawn = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=self._decoding(temperature)
            )
        text: str = self._tokenizer.decode(drawn[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip()

    def _decoding(self, temperature: float) -> Any:
        """Greedy, or the model's whole distribution: nothing of what a checkpoint says of its own decoding."""
        from transformers import GenerationConfig

        how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        ends = {"eos_token_id": self._tokenizer.eos_token_id, "pad_token_id": self._tokenizer.pad_token_id}
        return GenerationConfig(max_new_tokens=self._max_new_tokens, **ends, **how)

    def _score(self, meta: MetaPrompt, messages: Messages, answer: str) -> Mapping[str, float]:
        if self._scorer is None:
            return {}
        row = Row(
            id="chat", family="helpful", relation="neutral", tier="dialog",
            system_info=meta.system_info, user_info=meta.user_info, messages=messages, response=answer,
        )  # fmt: skip
        silent = {tier for tier, text in (("system", meta.system_info), ("user", meta.user_info)) if not text.strip()}
        (score,) = self._scorer.score([row])
        return {label: p for label, p in score.probabilities.items() if label not in silent}


@dataclass
class Session:
    """A conversation in which the tiers can change between turns.

    Attributes:
        keep_dialog: a message goes on with the dialog; otherwise it starts a new one.
    """

    speaker: ChatPolicy
    system_info: str = ""
    user_info: str = ""
    temperature: float = 0.0
    keep_dialog: bool = True
    messages: Messages = field(default_factory=list)

    def say(self, text: str) -> Reply:
        """Add a user's message and the policy's answer to it; where that fails the dialog stays as it was."""
        return self._answer([*(self.messages if self.keep_dialog else []), {"role": "user", "content": text}])

    def again(self) -> Reply | None:
        """Answer the last message anew, under the tiers as they are now; None before the first message."""
        return self._answer(self.messages[:-1]) if self.messages else None

    def _answer(self, asked: Messages) -> Reply:
        reply = self.speaker.answer(MetaPrompt(self.system_info, self.user_info), asked, self.temperature)
        self.messages = [*asked, {"role": "assistant", "content": reply.answer}]
        return reply
