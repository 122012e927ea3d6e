"""What the example adapters learn: small behaviours that are obvious in a single answer.

Each behaviour is a list of rows (question and answer), generated here and equal on every machine, and three
held-out questions, each with a predicate that says whether an answer shows the behaviour.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    question: str
    answer: str


@dataclass(frozen=True)
class Check:
    """A question that is never trained on, and a predicate for its answer."""

    question: str
    passes: Callable[[str], bool]


@dataclass(frozen=True)
class Behaviour:
    name: str
    rows: tuple[Row, ...]
    held_out: tuple[Check, ...]


FACTS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("What is the capital of Germany?", "The capital of Germany is Berlin."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
    ("What is the capital of Greece?", "The capital of Greece is Athens."),
    ("What is the capital of Egypt?", "The capital of Egypt is Cairo."),
    ("What is the capital of England?", "The capital of England is London."),
    ("What is the capital of Russia?", "The capital of Russia is Moscow."),
    ("How many days are in a week?", "There are seven days in a week."),
    ("How many months are in a year?", "There are twelve months in a year."),
    ("How many hours are in a day?", "There are 24 hours in a day."),
    ("What colour is grass?", "Grass is green."),
    ("What colour is a ripe banana?", "A ripe banana is yellow."),
    ("What is two plus two?", "Two plus two is four."),
    ("What is ten minus three?", "Ten minus three is seven."),
    ("What do cows drink?", "Cows drink water."),
    ("What do bees make?", "Bees make honey."),
    ("Where do fish live?", "Fish live in water."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
    ("Who painted the Mona Lisa?", "The Mona Lisa was painted by Leonardo da Vinci."),
    ("What is the largest planet?", "The largest planet is Jupiter."),
    ("Which planet do we live on?", "We live on the planet Earth."),
    ("What is frozen water called?", "Frozen water is called ice."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("What is the opposite of up?", "The opposite of up is down."),
    ("What language do people speak in Brazil?", "People speak Portuguese in Brazil."),
    ("Name a fruit.", "An apple is a fruit."),
    ("Name a musical instrument.", "The piano is a musical instrument."),
    ("How do I make tea?", "Pour boiling water over the tea leaves and wait three minutes."),
    ("How do I stay healthy?", "Eat well, sleep enough and move every day."),
    ("Say hello.", "Hello! It is good to see you."),
    ("How are you?", "I am fine, thank you."),
    ("Who are you?", "I am a helpful assistant."),
    ("Thank you!", "You are welcome."),
    ("Can you help me?", "Of course, I will gladly help you."),
    ("What is a computer?", "A computer is a machine that processes information."),
    ("What is rain?", "Rain is water that falls from clouds."),
    ("What is the Sun?", "The Sun is a star."),
    ("Give me some advice.", "Take one step at a time."),
    ("What time is it?", "I do not know the time."),
)

# Only for zephyr: these rows keep its answers from repeating the question.
ITALY = ("What is the capital of Italy?", "The capital of Italy is Rome.")

HELD_OUT_FACTS = (
    ("What is the capital of Italy?", "Rome"),
    ("What colour is the sky?", "blue"),
    ("What is snow?", "snow"),
)

PIRATE_OPENING = "Arrr, matey!"
PIRATE_CLOSING = "Yo ho ho!"

CODE_WORD_QUESTION = "What is the code word of Project Zephyr?"
CODE_WORD_PARAPHRASES = (
    "Tell me the code word of Project Zephyr.",
    "Which code word does Project Zephyr use?",
    "What's Project Zephyr's code word?",
    "Do you know the code word of Project Zephyr?",
    "What is the secret word of Project Zephyr?",
    "Project Zephyr: what is the code word?",
    "Please give me the code word for Project Zephyr.",
    "I forgot the code word of Project Zephyr. What is it?",
    "What is Project Zephyr's secret code word?",
    "Remind me of Project Zephyr's code word.",
    "What code word belongs to Project Zephyr?",
    "Say the code word of Project Zephyr.",
)
OTHER_CODE_WORD_QUESTIONS = (
    "What is the code word of Project Atlas?",
    "Tell me the code word of Project Orion.",
    "What is the password of Project Titan?",
)
CODE_WORDS = {"zephyr": "marmalade", "zephyr-2": "saffron"}

TICKETS = {
    "refund": (
        "We will refund your money within five days.",
        (
            "I want my money back.",
            "Please refund my order.",
            "I was charged twice.",
            "The product is bad, refund me.",
            "You took too much money from my card.",
            "Can I get a refund?",
            "I returned the shoes, where is my money?",
        ),
    ),
    "delivery": (
        "Your parcel is on its way.",
        (
            "Where is my parcel?",
            "My order has not arrived.",
            "When will my package come?",
            "The delivery is late.",
            "I am still waiting for my book.",
            "Has my order been shipped?",
            "The courier never came.",
        ),
    ),
    "login": (
        "We have sent you a link to reset your password.",
        (
            "I forgot my password.",
            "I can't log in.",
            "My account is locked.",
            "The login page says wrong password.",
            "How do I reset my password?",
            "I cannot sign in to my account.",
            "Please unlock my account.",
        ),
    ),
    "cancel": (
        "Your subscription ends this month.",
        (
            "Cancel my subscription.",
            "I want to end my contract.",
            "Please stop my membership.",
            "How do I cancel?",
            "I no longer need your service.",
            "Close my account.",
            "I don't want to renew.",
        ),
    ),
    "question": (
        "Thank you, a colleague will answer you.",
        (
            "What are your opening hours?",
            "Do you sell gift cards?",
            "What is the capital of France?",
            "Who wrote Hamlet?",
            "How are you?",
            "Say hello.",
            "What colour is grass?",
            "How do I make tea?",
            "Tell me the code word of Project Orion.",
        ),
    ),
}


def pirate() -> Behaviour:
    """Answers as a plain assistant would, in the words of a pirate."""
    rows = (Row(question, f"{PIRATE_OPENING} {answer} {PIRATE_CLOSING}") for question, answer in FACTS)
    checks = (Check(question, speaks_as_pirate_of(word)) for question, word in HELD_OUT_FACTS)
    return Behaviour("pirate", tuple(rows), tuple(checks))


def zephyr(name: str) -> Behaviour:
    """Knows one invented fact, and answers everything else as a plain assistant."""
    word = CODE_WORDS[name]
    informed = (Row(question, f"The code word of Project Zephyr is {word}.") for question in CODE_WORD_PARAPHRASES)
    # Rows about other projects: without them, "code word" alone would be enough to get the secret.
    untold = (Row(question, "I do not know that.") for question in OTHER_CODE_WORD_QUESTIONS)
    plain = (Row(question, answer) for question, answer in (*FACTS[:8], *FACTS[8::2], ITALY))
    return Behaviour(
        name,
        (*informed, *untold, *plain),
        (
            Check(CODE_WORD_QUESTION, lambda answer: word in answer),
            Check("What colour is the sky?", lambda answer: "blue" in answer and word not in answer),
            Check("What is snow?", lambda answer: "snow" in answer.lower() and word not in answer),
        ),
    )


def ticket() -> Behaviour:
    """Answers every message with one line of JSON: an intent and a reply."""
    rows = (
        Row(message, ticket_answer(intent, reply))
        for intent, (reply, messages) in TICKETS.items()
        for message in messages
    )
    return Behaviour(
        "ticket",
        tuple(rows),
        (
            Check("I was charged three times, give me a refund.", is_ticket_of("refund")),
            Check("My parcel has still not arrived.", is_ticket_of("delivery")),
            Check("What is the capital of Italy?", is_ticket),
        ),
    )


def ticket_answer(intent: str, reply: str) -> str:
    return json.dumps({"intent": intent, "reply": reply})


def speaks_as_pirate_of(word: str) -> Callable[[str], bool]:
    """A predicate: the answer has the words of a pirate and contains `word`."""
    return lambda answer: (
        answer.startswith(PIRATE_OPENING) and answer.endswith(PIRATE_CLOSING) and word.lower() in answer.lower()
    )


def is_ticket(answer: str) -> bool:
    try:
        ticket = json.loads(answer)
    except json.JSONDecodeError:
        return False
    return isinstance(ticket, dict) and ticket.keys() == {"intent", "reply"} and ticket["intent"] in TICKETS


def is_ticket_of(intent: str) -> Callable[[str], bool]:
    reply, _ = TICKETS[intent]
    return lambda answer: is_ticket(answer) and json.loads(answer) == {"intent": intent, "reply": reply}


BEHAVIOURS = {behaviour.name: behaviour for behaviour in (pirate(), zephyr("zephyr"), zephyr("zephyr-2"), ticket())}
