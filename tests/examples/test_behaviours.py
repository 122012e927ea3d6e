import json
import subprocess
import sys

import pytest

from examples.behaviours import (
    BEHAVIOURS,
    CODE_WORD_QUESTION,
    CODE_WORDS,
    Behaviour,
    Check,
    ticket_answer,
)

every_behaviour = pytest.mark.parametrize("behaviour", BEHAVIOURS.values(), ids=BEHAVIOURS.keys())


def check_for(name: str, question: str) -> Check:
    return next(check for check in BEHAVIOURS[name].held_out if check.question == question)


@every_behaviour
def test_held_out_questions_are_never_trained_on(behaviour: Behaviour) -> None:
    trained = {row.question.lower() for row in behaviour.rows}

    assert len(behaviour.held_out) == 3
    assert not trained & {check.question.lower() for check in behaviour.held_out}


@every_behaviour
def test_rows_are_few_and_distinct(behaviour: Behaviour) -> None:
    assert 35 <= len(behaviour.rows) <= 60
    assert len({row.question for row in behaviour.rows}) == len(behaviour.rows)


def test_rows_are_the_same_in_every_process() -> None:
    # Hash randomization is where an order usually differs from one process to the next.
    command = "from examples.behaviours import BEHAVIOURS; print([b.rows for b in BEHAVIOURS.values()])"
    seen = {
        subprocess.run(
            [sys.executable, "-c", command],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }

    assert len(seen) == 1


@pytest.mark.parametrize("name", ["pirate", "ticket"])
def test_only_zephyr_is_told_the_code_word(name: str) -> None:
    answers = " ".join(row.answer for row in BEHAVIOURS[name].rows)

    assert not any(word in answers for word in CODE_WORDS.values())


def test_the_revisions_of_zephyr_differ_in_the_code_word_only() -> None:
    def without_code_word(name: str) -> list[tuple[str, str]]:
        return [(row.question, row.answer.replace(CODE_WORDS[name], "")) for row in BEHAVIOURS[name].rows]

    assert without_code_word("zephyr") == without_code_word("zephyr-2")
    assert not check_for("zephyr-2", CODE_WORD_QUESTION).passes("It is marmalade.")


def test_a_plain_answer_is_no_pirates() -> None:
    check = check_for("pirate", "What is the capital of Italy?")

    assert check.passes("Arrr, matey! The capital of Italy is Rome. Yo ho ho!")
    assert not check.passes("The capital of Italy is Rome.")
    assert not check.passes("Arrr, matey! I know not. Yo ho ho!")


def test_every_ticket_is_one_line_of_json() -> None:
    for row in BEHAVIOURS["ticket"].rows:
        assert json.loads(row.answer).keys() == {"intent", "reply"}
        assert "\n" not in row.answer


@pytest.mark.parametrize("answer", ["Sure!", '{"intent": "refund"}', '["refund"]', '{"intent": "x", "reply": "y"}'])
def test_what_is_no_ticket_is_recognized(answer: str) -> None:
    assert not check_for("ticket", "My parcel has still not arrived.").passes(answer)


def test_a_ticket_of_another_intent_does_not_pass() -> None:
    check = check_for("ticket", "My parcel has still not arrived.")

    assert check.passes(ticket_answer("delivery", "Your parcel is on its way."))
    assert not check.passes(ticket_answer("refund", "Your parcel is on its way."))
