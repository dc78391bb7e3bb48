"""What the demo model answers in fixed words: small talk, and the terms of serving language models.

Data only. Not responsible for stories, counting or notes (`chat.py`, `notes.py`).
"""

from dataclasses import dataclass

NAME_OF_MODEL: str = "the Diptych demo model"

UNKNOWN: str = "I only know my notes and a few things about serving language models."
"""Reply to a question from outside the model's world."""


@dataclass(frozen=True)
class Faq:
    """One answer, and the ways to ask for it."""

    answer: str
    questions: tuple[str, ...]


def _topic(subject: str, answer: str, *extra: str) -> Faq:
    """Make the entry that explains ``subject`` (with its article), with the usual phrasings."""
    bare = subject.removeprefix("a ").removeprefix("an ").removeprefix("the ")
    usual = (
        f"What is {subject}?",
        f"What is {subject}",
        f"what is {subject}?",
        f"What is {bare}?",
        f"What's {subject}?",
        f"Explain {subject}.",
        f"Please explain {subject}.",
        f"Can you explain {subject}?",
        f"Tell me about {subject}.",
        f"Describe {subject}.",
        f"What does {bare} mean?",
        f"Define {bare}.",
        f"Explain {bare} in one sentence.",
    )
    return Faq(answer, tuple(dict.fromkeys(usual + extra)))


SMALL_TALK: tuple[Faq, ...] = (
    Faq(
        f"Hello! I am {NAME_OF_MODEL}. Ask me about your notes, about serving, or for a story.",
        ("Hello", "Hello!", "Hello.", "hello", "Hi", "Hi!", "hi", "Hey", "Hey!", "Hi there", "Hi there!")
        + ("Hello there", "Hello there!", "Good morning", "Good morning!", "Good evening!", "Say hello."),
    ),
    Faq(
        f"I am {NAME_OF_MODEL}, a tiny language model that ships with the server. "
        "I can recall notes, tell a story and explain a few things about serving.",
        ("Who are you?", "Who are you", "who are you?", "What are you?", "What is your name?")
        + ("Tell me about yourself.", "Introduce yourself.", "Which model are you?", "Are you a model?")
        + ("Hello, who are you?", "Hi, who are you?", "Hello! Who are you?", "What model is this?"),
    ),
    Faq(
        "I can recall the notes in your message, tell a short story about an animal, "
        "count, and explain words such as prefill and decode.",
        ("What can you do?", "What can you do for me?", "Help", "Help me.", "help", "How can you help me?")
        + ("What do you know?", "What can I ask you?", "Can you help me?"),
    ),
    Faq(
        "I am well, thank you. My cache is warm and my batches are full.",
        ("How are you?", "How are you today?", "how are you?", "Are you well?", "Hello, how are you?"),
    ),
    Faq(
        "You are welcome.",
        ("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you.", "Thank you very much.", "thanks"),
    ),
    Faq(
        "Goodbye! Come back when you have more tokens.",
        ("Bye", "Bye!", "Goodbye", "Goodbye!", "Good night!", "See you later."),
    ),
    Faq(
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
        ("What are the days of the week?", "List the days of the week.", "Name the days of the week."),
    ),
    Faq("I was trained in less than an hour on a single core.", ("How were you trained?", "Who trained you?")),
)

TOPICS: tuple[Faq, ...] = (
    _topic(
        "prefill",
        "Prefill is the first phase of a request. The model reads the whole prompt at once, "
        "fills the KV cache and produces the first token.",
        "What happens in prefill?",
        "What does prefill do?",
        "What is the prefill phase?",
        "How does prefill work?",
    ),
    _topic(
        "decode",
        "Decode is the second phase of a request. The model produces one token at a time, "
        "and each step reads the KV cache.",
        "What happens in decode?",
        "What does decode do?",
        "What is the decode phase?",
        "What is decoding?",
        "How does decode work?",
    ),
    _topic(
        "a KV cache",
        "A KV cache holds the keys and values of the tokens read so far, "
        "so that the model need not compute them again for each new token.",
        "What is the KV cache?",
        "What is the KV cache for?",
        "Why is there a KV cache?",
        "What does the KV cache do?",
        "Why do we need a KV cache?",
        "How does a KV cache work?",
    ),
    _topic(
        "disaggregated serving",
        "Disaggregated serving runs prefill and decode on separate workers. "
        "The KV cache moves from one to the other, so long prompts do not delay running answers.",
        "What is disaggregation?",
        "What is disaggregated inference?",
        "What is prefill and decode disaggregation?",
        "Why split prefill and decode?",
        "Why separate prefill and decode?",
        "How does disaggregated serving work?",
        "Explain disaggregation.",
    ),
    _topic(
        "Diptych",
        "Diptych is a server for language models that keeps prefill and decode apart. "
        "It comes with a simulator and a planner.",
        "What does Diptych do?",
        "what is diptych?",
        "How does Diptych work?",
    ),
    _topic(
        "TTFT",
        "TTFT is the time to first token. It covers waiting in the queue and prefill.",
        "What is the time to first token?",
        "What is time to first token?",
        "What does TTFT stand for?",
    ),
    _topic(
        "TPOT",
        "TPOT is the time per output token. It shows how fast decode runs once it has begun.",
        "What is the time per output token?",
        "What is inter-token latency?",
        "What does TPOT stand for?",
    ),
    _topic(
        "goodput",
        "Goodput is the rate of requests that meet their latency targets.",
        "How is goodput measured?",
    ),
    _topic(
        "continuous batching",
        "Continuous batching lets requests join and leave the running batch at every step, "
        "so that no slot waits for the longest answer.",
        "What is batching?",
        "Why do servers use batching?",
    ),
    _topic(
        "a KV transfer",
        "A KV transfer sends the KV cache of a prompt from a prefill worker to a decode worker.",
        "How does the KV cache move?",
        "How is the KV cache sent?",
    ),
    _topic(
        "a token",
        "A token is the unit of text that a language model reads and writes, often a word or a part of one.",
        "What are tokens?",
    ),
    _topic(
        "a prefix cache",
        "A prefix cache keeps the KV cache of a shared beginning, so that later prompts can reuse it.",
        "What is prefix caching?",
        "Why is prefix caching useful?",
    ),
    _topic(
        "a language model",
        "A language model predicts the next token from the tokens before it.",
        "What is an LLM?",
        "How does a language model work?",
    ),
    _topic(
        "attention",
        "Attention lets each token look back at earlier tokens and gather what it needs from them.",
        "How does attention work?",
    ),
    _topic("latency", "Latency is the time that a request takes from its start to its end."),
    _topic("throughput", "Throughput is the number of tokens that a server produces in a second."),
    _topic(
        "a scheduler",
        "A scheduler decides which requests run in the next step and which ones wait.",
        "What does the scheduler do?",
    ),
    _topic(
        "a prompt",
        "A prompt is the text that a request gives to the model.",
    ),
    _topic(
        "a GPU",
        "A GPU is a processor that does many small computations at once, which suits language models.",
        "Why do models need a GPU?",
    ),
    Faq(
        "Prefill reads the whole prompt at once and is limited by compute. "
        "Decode writes one token at a time and is limited by memory.",
        (
            "What is the difference between prefill and decode?",
            "How do prefill and decode differ?",
            "Compare prefill and decode.",
            "Explain prefill and decode.",
            "What are prefill and decode?",
            "What is prefill and decode?",
        ),
    ),
)

FAQS: tuple[Faq, ...] = SMALL_TALK + TOPICS
"""Everything the model can answer in fixed words."""
