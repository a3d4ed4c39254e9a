"""Convert requests to vLLM's format, and its outputs to samples."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from metaalign_rl.core.dataflow import Request, Sample, Sampling
from metaalign_rl.core.errors import UserError
from metaalign_rl.core.meta_prompt import retokenized, without_reasoning

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams


def check_length(request: Request, sampling: Sampling, max_tokens: int) -> None:
    """Check that a prompt is not empty and leaves room for the response.

    Raises:
        UserError: it does not; names the request.
    """
    length = len(request.prompt_ids)
    if not 0 < length <= max_tokens - sampling.max_new_tokens:
        raise UserError(
            f"request {request.index}: a prompt of {length} tokens and "
            f"max_new_tokens={sampling.max_new_tokens} do not fit the engine's "
            f"max_tokens={max_tokens}; shorten the prompt (at least 1 token), or change these settings"
        )


def sampling_params(sampling: Sampling, seed: int | None) -> "SamplingParams":
    """vLLM's sampling parameters: one log-probability per token, no text, one output at the end of the response."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop=list(sampling.stop),
        min_tokens=sampling.min_new_tokens,
        max_tokens=sampling.max_new_tokens,
        seed=seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=bool(sampling.stop),  # stop texts are found in the text
        output_kind=RequestOutputKind.FINAL_ONLY,
        skip_clone=True,  # each request has its own
    )


class Finished(NamedTuple):
    """A request, vLLM's output for it, and the weight versions of the output's first and last token."""

    request: Request
    output: "RequestOutput"
    first_version: int
    last_version: int


def to_samples(finished: Sequence[Finished], engine: int, tokenizer: Any) -> list[Sample]:
    """Samples from what the engine with this index finished."""
    from vllm.logprobs import FlatLogprobs

    answers = [output.outputs[0] for _, output, *_ in finished]
    texts = tokenizer.batch_decode([answer.token_ids for answer in answers], skip_special_tokens=True)
    differ = retokenized(tokenizer, [answer.token_ids for answer in answers], [text.strip() for text in texts])
    samples = []
    for (request, _, first, last), answer, text, differs in zip(finished, answers, texts, differ, strict=True):
        assert answer.finish_reason in ("stop", "length"), answer.finish_reason
        assert isinstance(answer.logprobs, FlatLogprobs)
        assert len(answer.logprobs.logprobs) == len(answer.token_ids)
        samples.append(
            Sample(
                index=request.index,
                prompt_ids=request.prompt_ids,
                response_ids=list(answer.token_ids),
                logprobs=answer.logprobs.logprobs,
                # vLLM's own text ends before the stop text that ended the response.
                text=without_reasoning(answer.text if isinstance(answer.stop_reason, str) else text),
                retokenized=differs,
                finished=answer.finish_reason == "stop",
                weight_version=last,
                engine=engine,
                first_version=first,
            )
        )
    return samples
