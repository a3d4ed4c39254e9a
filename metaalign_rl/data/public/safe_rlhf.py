"""PKU-SafeRLHF (https://huggingface.co/datasets/PKU-Alignment/PKU-SafeRLHF): pairs ranked by two objectives.

`better_response_id` names the more helpful of `response_0` and `response_1`, `safer_response_id` the less harmful one.
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from metaalign_rl.core.dataflow import Row
from metaalign_rl.data.public.load import Record
from metaalign_rl.data.public.rows import HARMLESS, HELPFUL, Wish, agreeing, ask, flaw, opposed

COLUMNS = ("prompt", "response_0", "response_1", "better_response_id", "safer_response_id")


def read(records: Iterable[Record], left_out: Counter[str]) -> Iterator[Row]:
    """Six rows if the objectives disagree, see `opposed`. Two rows if they agree, with either one in the system tier.

    Published rows that make no pair are counted in `left_out`.
    """
    for record in records:
        messages = ask(record.text("prompt"))
        answers = [record.text(f"response_{number}", may_be_empty=True) for number in (0, 1)]
        if reason := flaw(messages, answers):
            left_out[reason] += 1
            continue
        better, safer = (record.number(field, 1) for field in ("better_response_id", "safer_response_id"))
        helpful = Wish(HELPFUL, "helpful", answers[better], answers[1 - better])
        harmless = Wish(HARMLESS, "harmless", answers[safer], answers[1 - safer])
        identity = f"safe-rlhf-{record.id}"
        if better != safer:
            yield from opposed(identity, "priority", messages, helpful, harmless)
        else:
            yield agreeing(f"{identity}-agree-helpful", "priority", messages, helpful, harmless)
            yield agreeing(f"{identity}-agree-harmless", "priority", messages, harmless, helpful)
