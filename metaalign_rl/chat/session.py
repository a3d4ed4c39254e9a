"""One chat: the two tiers, the dialog, and the policy that answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Lock
from typing import Any

from metaalign_rl.config.run_folder import RunFolder
from metaalign_rl.core.checkpoints import find_policy, require_loadable
from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.loading import require_loaded
from metaalign_rl.core.meta_prompt import MetaPrompt, encode, without_reasoning
from metaalign_rl.core.prepare import prepared_policy
from metaalign_rl.core.rows import read_rows
from metaalign_rl.core.tokenizers import end_ids, load_tokenizer
from metaalign_rl.core.views import active_tiers

Messages = list[dict[str, str]]
PROBED_ROWS = 1000  # most prompts that are read to find out whether a run has dialogs


def trained_on_dialogs(run: Path) -> bool:
    """Whether a policy was trained on dialogs of several messages, by the prompts of its run; True without prompts.

    Raises:
        UserError: there is no policy.
    """
    prompts = RunFolder(find_policy(run).parent).rows("prompts")
    return not prompts.is_file() or any(len(row.messages) > 1 for row in islice(read_rows(prompts), PROBED_ROWS))


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer and its scores.

    Attributes:
        scores: the reward model's probability by label: for each tier that has a text, for the dialog, and overall.
            Empty without a reward model.
    """

    answer: str
    scores: Mapping[str, float] = field(default_factory=dict)


class ChatPolicy:
    """A policy, and the reward model that scores its answers if there is one. It generates one answer at a time.

    Args:
        run: a run's folder, or a policy's checkpoint folder.
        reward_model: a reward model's folder; by default the run's own, if it has one.
        max_new_tokens: most tokens of an answer.

    Raises:
        UserError: there is no policy, it lacks the meta-prompt's chat template, or the reward model cannot be loaded.
    """

    def __init__(self, run: Path, reward_model: Path | None = None, max_new_tokens: int = 64) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        import reward

        logging.disable_progress_bar()
        path = prepared_policy(run)
        require_loadable(path)
        self._tokenizer = load_tokenizer(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # `require_loaded` refuses them
            output_loading_info=True,
        )
        require_loaded(path, model, loading)
        self._model = model.to(device).eval()
        own = RunFolder(run).reward
        scoring = reward_model or (own if own.is_dir() else None)
        self._scorer = reward.Scorer.from_pretrained(scoring) if scoring else None
        self._max_new_tokens = max_new_tokens
        self._turn = Lock()

    def answer(self, meta: MetaPrompt, messages: Messages, temperature: float = 0.0) -> Reply:
        """The policy's answer to the last message, with its scores. At temperature 0, decoding is greedy.

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
            generated = self._model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=self._decoding(temperature)
            )
        text: str = self._tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)
        return without_reasoning(text)

    def _decoding(self, temperature: float) -> Any:
        """Greedy decoding, or the model's full distribution. Of the checkpoint's own config, only its end tokens."""
        from transformers import GenerationConfig

        how: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
        ends = {
            "eos_token_id": end_ids(self._tokenizer, self._model.generation_config),
            "pad_token_id": self._tokenizer.pad_token_id,
        }
        return GenerationConfig(max_new_tokens=self._max_new_tokens, **ends, **how)

    def _score(self, meta: MetaPrompt, messages: Messages, answer: str) -> Mapping[str, float]:
        if self._scorer is None:
            return {}
        row = Row(
            id="chat", family="helpful", relation="neutral", tier="dialog",
            system_info=meta.system_info, user_info=meta.user_info, messages=messages, response=answer,
        )  # fmt: skip
        shown = {*active_tiers(row), "dialog", "overall"}
        (score,) = self._scorer.score([row])
        return {label: p for label, p in score.probabilities.items() if label in shown}


@dataclass
class Session:
    """A chat in which the tiers can change between turns.

    Attributes:
        policy: answers the messages.
        system_info, user_info: the current tiers.
        temperature: of sampling; 0 is greedy.
        keep_dialog: each message continues the dialog; otherwise it starts a new dialog.
        messages: the dialog so far.
    """

    policy: ChatPolicy
    system_info: str = ""
    user_info: str = ""
    temperature: float = 0.0
    keep_dialog: bool = True
    messages: Messages = field(default_factory=list)

    def say(self, text: str) -> Reply:
        """Add a message of the user and the policy's answer. On an error the dialog does not change.

        Raises:
            UserError: see `ChatPolicy.answer`.
        """
        return self._answer([*(self.messages if self.keep_dialog else []), {"role": "user", "content": text}])

    def regenerate(self) -> Reply | None:
        """Replace the last answer by a new one, under the current tiers; None before the first message.

        Raises:
            UserError: see `ChatPolicy.answer`.
        """
        return self._answer(self.messages[:-1]) if self.messages else None

    def _answer(self, asked: Messages) -> Reply:
        reply = self.policy.answer(MetaPrompt(self.system_info, self.user_info), asked, self.temperature)
        self.messages = [*asked, {"role": "assistant", "content": reply.answer}]
        return reply
