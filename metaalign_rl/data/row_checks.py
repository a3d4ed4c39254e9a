"""Checks of rows beyond the schema: what training would refuse later, and what the row's use needs."""

from metaalign_rl.core.dataflow import Row
from metaalign_rl.core.errors import UserError
from metaalign_rl.data.checks import run_check


def check_row(row: Row, place: str) -> None:
    """Check what every use needs: an answer for each label, two answers that differ, and gold checks that run.

    Args:
        place: file and line, for errors.

    Raises:
        UserError: names the place and the field.
    """
    for answer in row.labels:
        if getattr(row, answer) is None:
            raise UserError(
                f"{place}: field 'labels.{answer}': expected labels of an answer of the row, found no {answer!r}; "
                "add it or remove its labels"
            )
    # Chat templates drop white space around an answer.
    if row.chosen is not None and row.rejected is not None and row.chosen.strip() == row.rejected.strip():
        raise UserError(
            f"{place}: field 'rejected': expected another answer than 'chosen', found the same text; "
            "remove the row or make the answers differ"
        )
    for tier, check in row.checks.items():
        run_check(check, row.response or row.chosen or "probe", f"{place}: field 'checks.{tier}'")


def check_use(use: str, row: Row, place: str) -> None:
    """Check what a row needs for its use in a run.

    Args:
        use: the name of its file, such as "pairs".

    Raises:
        UserError: see `check_row`; or a field is missing.
    """
    if use == "demonstrations" and row.response is None:
        raise UserError(f"{place}: field 'response': expected a string for a demonstration, found nothing")
    if use == "held_out_pairs" and row.chosen is None:
        raise UserError(f"{place}: field 'chosen': expected a pair, found nothing")
    if use == "pairs" and row.chosen is None and not row.labels:
        raise UserError(f"{place}: field 'chosen': expected a pair, or a response with 'labels', found nothing")
    if use in ("held_out_prompts", "paraphrases") and row.tier not in row.checks:
        raise UserError(f"{place}: field 'checks.{row.tier}': expected a check of the governing tier, found nothing")
    if use == "paraphrases" and "paraphrases" not in row.tags:
        raise UserError(f"{place}: field 'tags.paraphrases': expected a tag that paraphrases share, found nothing")
    check_row(row, place)
