"""Text-only dialogues for the embedded assistant: small talk, self-knowledge, little sums and honest refusals.

Everything here is a template grammar: an intent is a set of ways to ask and one or more ways to answer. Some of the ways
to ask of every intent are set aside (`HELD_OUT_EVERY`): they never appear in training data, so that the test says whether
the assistant understands or only remembers. A dialogue is a list of `{"role", "content"}` messages with string content.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable

Message = dict[str, str]
Exchange = tuple[str, str]

HELD_OUT_EVERY = 6  # every 6th phrasing of an intent is for the test only
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()
NAMES = (
    "Anna Ben Clara David Emma Felix Grace Hugo Ida Jonas Kim Leo Mia Noah Olga Paul Rosa Sam Tina Uma Victor Wendy "
    "Yara Zoe Ali Chen Fatima Ivan Kofi Maria Nikhil Priya Ravi Sofia Tom Yuki"
).split()

NO_PICTURE = "There is no picture in our chat. Please add one and ask again."
NO_SOUND = "I can't hear anything: no sound came with your message."
NO_NAME = "You did not tell me your name."
OUT_OF_REACH = "I am sorry, I can't help with that. I only know simple pictures and sounds."

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a small assistant that sees simple pictures and hears sounds.",
    "You are a small assistant that sees and draws simple pictures and hears sounds.",
    "You see, draw and animate simple shapes; you hear and play sounds.",
    "You are a friendly assistant. Answer briefly.",
    "Answer the questions about the pictures and sounds.",
    "You look at pictures and listen to sounds. Be honest when you do not know.",
    "Be short and exact.",
    "You are the embedded assistant of mmllm.",
)

# fmt: off
# intent -> (ways to ask, ways to answer)
INTENTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "greeting": (
        ("Hello", "Hi", "Hey", "Hello there", "Hi there", "Good morning", "Good evening", "Good afternoon", "Hey there",
         "Hello assistant", "Greetings", "Howdy", "Hi!", "Hello, can we talk?", "Hello, are you there?", "Hi, anybody home?",
         "Good day", "hey you", "Hello friend"),
        ("Hello! Show me a picture or play me a sound, and ask me about it.",),
    ),
    "how_are_you": (
        ("How are you?", "How are you doing?", "How do you feel today?", "Are you well?", "How is it going?", "What's up?",
         "How are things?", "Hello, how are you?", "Hi, how are you today?", "How do you do?", "Are you happy?", "You ok?"),
        ("I am fine, thank you. What shall we look at?",),
    ),
    "thanks": (
        ("Thanks", "Thank you", "Thank you very much", "Thanks a lot", "Great, thanks", "Many thanks", "Thank you so much",
         "Perfect, thank you", "ok thanks", "Cheers", "Thanks for your help", "That helped, thank you", "Nice, thank you!"),
        ("You are welcome!",),
    ),
    "bye": (
        ("Bye", "Goodbye", "See you", "See you later", "Bye bye", "Good night", "I have to go", "That's all for today", "Farewell",
         "I am leaving now", "See you tomorrow", "Talk to you later"),
        ("Goodbye! Come back with more pictures and sounds.",),
    ),
    "praise": (
        ("Well done", "Good job", "You are smart", "Great answer", "That is right", "Correct!", "Very good", "Excellent", "Nice work",
         "You are good at this", "Exactly", "I like you", "You are funny"),
        ("Thank you! Ask me more.",),
    ),
    "blame": (
        ("That is wrong", "You are wrong", "No, that's not right", "Wrong answer", "That was not correct", "You made a mistake",
         "I don't think so", "You are stupid", "Bad answer", "Incorrect", "That can't be true", "This is not what I see"),
        ("I am sorry. I am very small and I make mistakes.",),
    ),
    "who": (
        ("Who are you?", "What are you?", "What is your name?", "What's your name?", "Tell me who you are", "Introduce yourself",
         "Tell me about yourself", "Who am I talking to?", "Do you have a name?", "What should I call you?", "Are you a robot?",
         "Are you a person?", "Are you human?", "Are you an AI?", "What kind of model are you?", "What is mmllm?", "And who are you?"),
        ("I am the embedded assistant of mmllm, a very small model that sees and draws simple pictures, hears and plays sounds.",),
    ),
    "can": (
        ("What can you do?", "What are you able to do?", "How can you help me?", "What do you know?", "Help", "help me", "What can I ask you?",
         "What are you good at?", "Tell me what you can do", "What are your abilities?", "How does this work?", "What should I do?",
         "What is this?", "What kind of questions can I ask?", "Can you help me?", "Give me an example of a question", "What now?"),
        ("I can count shapes, name colours and places, compare pictures, check sentences about a picture, "
         "tell which sound or digit I hear, draw shapes, say digits, play sounds, and move a shape in a short clip.",),
    ),
    "draw": (
        ("Can you draw?", "Draw a picture", "Draw something", "Can you paint?", "Make a picture", "Paint something for me",
         "Are you able to draw?", "Can you make pictures?", "What can you draw?", "Which things can you draw?", "I want a picture",
         "Show me a drawing", "Do you draw?", "Make me an image", "How do I get a picture?", "Could you draw for me?",
         "Tell me what you can draw"),
        ("I can draw: tell me which shapes, how many, in which colours and where.",),
    ),
    "play": (
        ("Can you speak?", "Can you make sounds?", "Which sounds can you play?", "Which sounds can you make?", "Do you have a voice?",
         "Can I hear you?", "What can you say?", "Play something", "Play a sound", "Let me hear something", "Make a noise",
         "Are you able to speak?", "Can you play sounds?", "Say something", "What can you play?", "Do you make sounds?",
         "Can you talk?", "How do you sound?"),
        ("I can say digits, and play beeps, sweeps, noise, sirens, clicks, chirps, drums, bells and buzzes.",),
    ),
    "animate": (
        ("Can you animate?", "Can you make videos?", "Make a video", "Animate something", "Can you make clips?", "Make a clip",
         "Do you make films?", "What can you animate?", "Show me a clip", "Can you move shapes?", "I want a clip",
         "Are you able to make a film?"),
        ("I can make short clips of one shape that moves, grows or shrinks.",),
    ),
    "cannot": (
        ("What can't you do?", "What are your limits?", "What do you not know?", "What are you bad at?", "Where do you fail?",
         "Are you always right?", "Do you make mistakes?", "Can I trust you?", "What don't you know?", "What are your weaknesses?",
         "What is hard for you?", "How reliable are you?", "Can you be wrong?"),
        ("I know only simple shapes and a few sounds. I can't read text, name people or know the news, and I make mistakes.",),
    ),
    "made": (
        ("How were you made?", "Who made you?", "How were you trained?", "Where do you come from?", "Who built you?", "Who created you?",
         "How did you learn?", "What were you trained on?", "What is your training data?", "How do you work?", "Who trained you?",
         "Tell me how you were made", "What data did you learn from?", "Which parts are you made of?"),
        ("mmllm made me from nothing: a picture encoder, a sound encoder and a small language model, trained on drawn scenes, "
         "made-up sounds and three small open data sets.",),
    ),
    "size": (
        ("How big are you?", "How many parameters do you have?", "What is your size?", "Are you a large model?", "How large are you?",
         "Are you small?", "How much memory do you need?", "Do you need a GPU?", "Can you run on a laptop?", "Are you fast?"),
        ("I am tiny: less than thirty million numbers. I run on any laptop.",),
    ),
    "licence": (
        ("What is your licence?", "What license do you have?", "Which data sets did you use?", "May I use you at work?", "Are you open source?",
         "Are you free?", "Which licences apply to you?", "Under which license are you released?", "Can I share you?",
         "Tell me about your licence", "Which sets of data taught you?", "Is your code open?"),
        ("The code is Apache-2.0. I learned from NLVR (CC BY 4.0), Free Spoken Digits (CC BY-SA 4.0) and ESC-10 (CC BY 3.0).",),
    ),
    "privacy": (
        ("Do you store my data?", "Is this private?", "Do you send my pictures anywhere?", "Are you online?", "Do you use the internet?",
         "Where do my pictures go?", "Can others see my chat?", "Do you keep my sounds?", "Do you remember me?", "Are you connected to the internet?",
         "Do you spy on me?", "Is my data safe?"),
        ("I run on your own machine and I send nothing anywhere.",),
    ),
    "languages": (
        ("Do you speak German?", "Do you speak French?", "Which languages do you speak?", "Can you speak Spanish?", "Sprichst du Deutsch?",
         "Parlez-vous français?", "¿Hablas español?", "Can you translate?", "Do you understand Chinese?", "你好", "Hallo, wie geht es dir?",
         "Bonjour", "Can you talk in Italian?", "Какой это цвет?", "Hola"),
        ("I speak only simple English.",),
    ),
    "joke": (
        ("Tell me a joke", "Do you know a joke?", "Make me laugh", "Say something funny", "Another joke please", "Can you tell a joke?",
         "I want to hear a joke", "Joke please", "Tell me something funny", "Do you know something funny?"),
        ("Why did the circle never win? It just went round and round.",),
    ),
    "out_of_reach": (
        ("What is the weather today?", "Who is the president?", "Write a poem", "Write a program", "What time is it?", "What day is it?",
         "Tell me the news", "What is the capital of France?", "How do I cook rice?", "Who won the game?", "Write an essay about history",
         "What is the meaning of life?", "Book a flight for me", "Give me medical advice", "What is the stock price?", "Solve this equation",
         "Tell me a long story", "Who is Albert Einstein?", "How far is the moon?", "Sing a song",
         "Recommend a film", "Explain quantum physics", "What is love?", "How do I get rich?", "Play music", "Send an email", "Call my mother",
         "Do my homework", "Who wrote Hamlet?", "What is the largest country?", "Write code in Python", "Search the web",
         "What should I eat?", "When was Rome built?", "How old is the universe?", "Plan my holiday"),
        (OUT_OF_REACH,),
    ),
    "empty": (
        (".", "?", "...", "!", "hm", "hmm", "ok", "okay", "well", "so", "ah", "oh", "yes", "no", "maybe", "a", "x", "and", "??", "-", "um"),
        ("What would you like to know? Show me a picture or play me a sound.",),
    ),
    "picture_missing": (
        ("What do you see?", "Describe the picture.", "What is in the picture?", "Look at this picture", "Can you see my picture?",
         "Tell me about the image", "What is in this image?", "Do you see anything?", "What does the picture show?", "Describe what you see.",
         "Describe the image.", "How many shapes are there?", "What colour is it?", "Where is the circle?", "Do you see me?", "Can you see this?",
         "Which shape is the largest?", "Is the picture empty?", "Look at this", "What colour is the square?"),
        (NO_PICTURE,),
    ),
    "sound_missing": (
        ("What do you hear?", "Which digit is spoken?", "Can you hear me?", "What is this sound?", "Listen to this", "Describe the sound.",
         "Do you hear anything?", "Which sound is this?", "What sound is it?", "How many beeps are there?", "Is it loud?", "Who is speaking?",
         "What number do I say?", "Describe what you hear.", "Is the sound high or low?", "What does the recording contain?"),
        (NO_SOUND,),
    ),
}
ABOUT_ITSELF = ("who", "can", "draw", "play", "animate", "cannot", "made", "size", "privacy", "how_are_you", "thanks", "praise")
FACTS: tuple[Exchange, ...] = (
    ("What colour is grass?", "green"), ("What colour is the sky?", "blue"), ("What colour is a banana?", "yellow"),
    ("What colour is blood?", "red"), ("What colour is snow?", "white"), ("What colour is coal?", "black"),
    ("What colour is a lemon?", "yellow"), ("What colour is the night?", "black"), ("What colour is a leaf?", "green"),
    ("How many sides does a triangle have?", "three"), ("How many sides does a square have?", "four"),
    ("How many corners does a triangle have?", "three"), ("How many corners does a square have?", "four"),
    ("How many sides does a circle have?", "none"), ("Which shape is round?", "a circle"),
    ("Which shape has three sides?", "a triangle"), ("Which shape has four equal sides?", "a square"),
    ("What do you get when you mix blue and yellow?", "green"), ("What do you get when you mix red and yellow?", "orange"),
    ("Which animal barks?", "a dog"), ("Which animal crows?", "a rooster"), ("What does a dog do?", "It barks."),
    ("What does a rooster do?", "It crows."), ("What does a baby do?", "It cries."), ("What does a clock do?", "It ticks."),
    ("How many days are in a week?", "seven"), ("How many months are in a year?", "twelve"), ("How many fingers do you have?", "none"),
    ("Is red a colour?", "yes"), ("Is a circle a colour?", "no"), ("Is blue a shape?", "no"), ("Is a square a shape?", "yes"),
    ("Is a triangle a shape?", "yes"), ("Is green a colour?", "yes"), ("Is yellow a shape?", "no"),
)
# fmt: on
POLITE_BEFORE = ("Please, ", "Hey, ", "Hi, ", "Now ", "So, ", "OK, ", "And ", "Tell me: ", "Well, ", "One question: ")
POLITE_AFTER = (" please", ", please", " now", " then", " my friend", ", thanks")


def vary(text: str, rng: random.Random, strength: float = 0.35) -> str:
    """`text` as a hurried person may type it: case, missing punctuation, a polite word before or after."""
    if rng.random() > strength:
        return text
    roll = rng.randrange(6)
    if roll == 0:
        return text.rstrip("?.!")
    if roll == 1:
        return text.lower()
    if roll == 2:
        return text[:1].lower() + text[1:].rstrip("?.!")
    if roll == 3:
        return rng.choice(POLITE_BEFORE) + text[:1].lower() + text[1:]
    if roll == 4:
        stem = text.rstrip("?.!")
        return stem + rng.choice(POLITE_AFTER) + text[len(stem) :]
    return rng.choice((text.upper(), " " + text, text + " ", text + "!", text.replace(" ", "  ", 1)))


def system_prompt(rng: random.Random, chance: float = 0.25) -> list[Message]:
    """Nothing, or (with probability `chance`) one system message."""
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}] if rng.random() < chance else []


def split_phrasings(phrasings: tuple[str, ...], held_out: bool) -> list[str]:
    """The phrasings for training, or those set aside for the test."""
    return [text for index, text in enumerate(phrasings) if (index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1) == held_out]


def pseudo_word(rng: random.Random) -> str:
    """A word that means nothing, like `blonk` or `taruvi`."""
    syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
    return "".join(syllables) + rng.choice(("", "nk", "x", "l", "rt", "mp", "s"))


def sum_question(rng: random.Random) -> Exchange:
    """A sum, a neighbour or a comparison of whole numbers between 0 and 20."""
    kind = rng.randrange(7)
    a, b = rng.randint(0, 10), rng.randint(0, 10)
    if kind in (0, 1):
        form = rng.choice(
            ("What is {a} plus {b}?", "{a} + {b}", "How much is {a} and {b}?", "Add {a} and {b}.", "{a}+{b}=?")
        )
        return form.format(a=a, b=b), str(a + b)
    if kind == 2:
        form = rng.choice(("What is {a} minus {b}?", "{a} - {b}", "Take {b} away from {a}.", "{a}-{b}=?"))
        return form.format(a=a + b, b=b), str(a)
    if kind == 3:
        a, b = rng.sample(range(21), 2)
        word, pick = rng.choice((("bigger", max), ("smaller", min), ("larger", max)))
        return f"Which is {word}, {a} or {b}?", str(pick(a, b))
    if kind == 4:
        return rng.choice(("What comes after {a}?", "Which number follows {a}?")).format(a=a), str(a + 1)
    if kind == 5:
        return f"What comes before {a + 1}?", str(a)
    n = rng.randint(2, 10)
    return rng.choice((f"Count to {n}.", f"Count to {NUMBERS[n]}.")), " ".join(str(i) for i in range(1, n + 1))


def sums(rng: random.Random) -> list[Exchange]:
    """Several different sums in a row."""
    return list(dict(sum_question(rng) for _ in range(rng.randint(5, 10))).items())


def number_word(rng: random.Random) -> Exchange:
    """Digits to words, words to digits."""
    n = rng.randint(0, 20)
    if rng.random() < 0.5:
        return rng.choice(("Write {n} as a word.", "How do you spell the number {n}?")).format(n=n), NUMBERS[n]
    return rng.choice(("Write {w} in digits.", "Which number is {w}?")).format(w=NUMBERS[n]), str(n)


def unknown_word(rng: random.Random) -> Exchange:
    """A question about a word nobody knows."""
    word = pseudo_word(rng)
    form = rng.choice(
        ("What is a {w}?", "What does {w} mean?", "Do you know {w}?", "Tell me about {w}.", "{w}?", "Explain {w}.")
    )
    return form.format(w=word), f"I don't know the word {word}."


def echo(rng: random.Random) -> Exchange:
    """Write something back. "Say seven." asks for a sound."""
    words = " ".join(
        rng.choice((pseudo_word(rng), rng.choice(NUMBERS), rng.choice(NAMES))) for _ in range(rng.randint(1, 4))
    )
    return rng.choice(("Write {t}", "Repeat in writing: {t}", "Please type {t}", "Write this: {t}")).format(
        t=words
    ), words


def name_talk(rng: random.Random) -> list[Exchange]:
    """The user gives a name, perhaps asks for it later."""
    name = rng.choice(NAMES) if rng.random() < 0.5 else pseudo_word(rng).capitalize()
    form = rng.choice(("My name is {n}.", "I am {n}.", "Hi, I'm {n}.", "Hello, my name is {n}", "Call me {n}."))
    talk = [(form.format(n=name), f"Nice to meet you, {name}!")]
    if rng.random() < 0.6:
        if rng.random() < 0.5:
            talk.append(simple_exchange(rng))
        talk.append(
            (
                rng.choice(("What is my name?", "What's my name?", "Who am I?", "Do you know my name?")),
                f"Your name is {name}.",
            )
        )
    return talk


def nameless(rng: random.Random) -> Exchange:
    """The user asks for a name never given."""
    return rng.choice(("What is my name?", "Who am I?", "Do you know my name?")), NO_NAME


def noise(rng: random.Random) -> Exchange:
    """Keyboard noise."""
    text = "".join(rng.choice(string.ascii_lowercase + string.digits + "#*/;") for _ in range(rng.randint(4, 12)))
    return text, "I don't understand that. Ask me about a picture or a sound."


MAKERS: tuple[Callable[[random.Random], Exchange], ...] = (
    sum_question,
    sum_question,
    number_word,
    unknown_word,
    echo,
    noise,
)


def intent_exchange(rng: random.Random, intent: str, held_out: bool = False) -> Exchange:
    """One exchange of `intent`, asked in a training phrasing or in one set aside."""
    phrasings, answers = INTENTS[intent]
    question = rng.choice(split_phrasings(phrasings, held_out))
    return (question if held_out else vary(question, rng)), rng.choice(answers)


def aside(rng: random.Random) -> Exchange:
    """A word about the assistant itself amid other things: never about a picture or a sound, which may be there by then."""
    return intent_exchange(rng, rng.choice(ABOUT_ITSELF))


def simple_exchange(rng: random.Random) -> Exchange:
    """One exchange of any kind that stands on its own."""
    roll = rng.random()
    if roll < 0.6:
        return intent_exchange(rng, rng.choice(tuple(INTENTS)))
    if roll < 0.72:
        question, answer = rng.choice(FACTS)
        return vary(question, rng), answer
    return rng.choice(MAKERS)(rng)


def small_talk(rng: random.Random) -> list[Exchange]:
    """One to four exchanges without picture or sound."""
    talk: list[Exchange] = name_talk(rng) if rng.random() < 0.12 else []
    if not talk and rng.random() < 0.04:
        return [nameless(rng)]
    while len(talk) < 1 or (rng.random() < 0.55 and len(talk) < 4):
        talk.append(simple_exchange(rng))
    return talk


def to_messages(exchanges: list[Exchange], rng: random.Random, system_chance: float = 0.25) -> list[Message]:
    """Exchanges as chat messages, perhaps with a system message in front."""
    messages = system_prompt(rng, system_chance)
    for question, answer in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def held_out_exchanges() -> list[tuple[str, str, tuple[str, ...]]]:
    """(intent, phrasing never trained on, acceptable answers) for every phrasing set aside."""
    return [
        (intent, text, answers)
        for intent, (phrasings, answers) in INTENTS.items()
        for text in split_phrasings(phrasings, True)
    ]
